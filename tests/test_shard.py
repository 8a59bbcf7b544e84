"""shard=True: two processes with a share of the weights each train as one process does."""

import dataclasses
import os
import socket
import time

import pytest
import torch
import torch._dynamo  # FSDP2 imports it: once here, not in every process
from helpers import load, randomize, read_log
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import GPT, GPTConfig
from nanoloop import machine, muon, parallel, pretraining
from nanoloop.batches import Batch
from nanoloop.objective import OBJECTIVE, TrainingLoss, set_trained_parts
from nanoloop.optimizer import make_optimizers, prepare_step
from nanoloop.training_step import train_step

SIZES = dict(block_size=8, vocab_size=13, n_embd=12, n_head=2, n_prelude=1, n_block=2, n_coda=1)
UNITS = 5  # four blocks, and what is left of the model
CASES = {  # keys of the model, keys of the run, loops of the steps, tolerance
    'bptt_k, tied weights': (dict(bptt_k=2), {}, [1, 8] * 2, 1e-5),
    'all loops, recomputed': (
        dict(exit_gate=True, recompute=True, tie_weights=False, dropout=0.1),
        dict(objective='exit'),
        [2, 4],
        1e-5,
    ),
    'the gate alone': (dict(exit_gate=True), dict(objective='gate'), [2, 8], 1e-5),
    # Newton-Schulz rounds to bfloat16: of a part of a matrix alone the update differs by 0.14 or more
    'muon': (dict(input_injection='gated'), dict(optimizer='muon'), [2], 0.06 * 1e-2),
    # wide and high matrices, of which only the product of all steps is multiplied
    'muon in float32': (dict(n_hidden=40), dict(optimizer='muon'), [2, 2], 1e-4 * 1e-2),
}


def start_two(function, *arguments):
    """Calls function(rank, *arguments) in two processes that find each other."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    arguments = (port, function, *arguments)
    torch.multiprocessing.start_processes(call_as_rank, arguments, nprocs=2, start_method='fork')


def call_as_rank(rank, port, function, *arguments):
    place = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank)
    os.environ.update({name: str(value) for name, value in place.items()})
    function(rank, *arguments)


def cpu_machine(rank=0, world=1):
    return machine.Machine(rank, world, torch.device('cpu'), 'cpu', torch.float32, shard=world > 1)


def batches(m, micros):
    """Yields this rank's micro-batches of random tokens; one of four has fewer targets."""
    for number in range(m.rank, 1000, m.world):
        tokens = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(number))  # (B, T + 1)
        targets = tokens[:, 1:].clone()
        targets[0, : 3 * (number % 4 == 1)] = -1
        yield Batch(tokens[:, :-1], targets, seed=number)


class Calls(TorchDispatchMode):
    """Counts the collective operations inside it by name, step by step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition('.')[0].removeprefix('c10d::')
        if name != op.name().partition('.')[0]:
            self.steps[-1][name] = self.steps[-1].get(name, 0) + 1
        return op(*args, **(kwargs or {}))


def train_case(case, m, calls):
    """Returns [(loss, gradient norm)] of the steps of a case, the model and the optimizers."""
    model_keys, keys, loops, _ = CASES[case]
    c = train.TrainConfig(gradient_accumulation_steps=4, learning_rate=1e-2, min_lr=0.0, **keys)
    model, lines = GPT(GPTConfig(**SIZES, **model_keys)), []
    for block in randomize(model).blocks():
        block.attn.c_proj.weight.data *= 0.1  # else rounding grows from loop to loop
    set_trained_parts(model, OBJECTIVE[c.objective])
    training_loss = parallel.wrap(TrainingLoss(model, c), m)
    optimizers, _ = make_optimizers(model, c)
    source = batches(m, 4)
    muon.choose_dtype = lambda *_: (torch.float32 if case == 'muon in float32' else torch.bfloat16, '')
    for step, n_loop in enumerate(loops):
        calls.steps.append({})
        prepare_step(optimizers, step, c.learning_rate)
        with calls:
            result = train_step(training_loss, optimizers, m.scaler(), source, n_loop, c, m)
        loss = parallel.reduce_sum(m, torch.tensor([result.loss])) / m.world
        lines.append((loss.item(), result.grad_norm))
    return lines, model, optimizers


def bytes_of(tensors):
    """Returns the bytes that tensors take on this rank, and the bytes of the whole ones."""
    tensors = [x for x in tensors if x.dim()]  # Adam's number of steps is not sharded
    sizes = [x.to_local().untyped_storage().nbytes() for x in tensors]
    return sum(sizes), sum(x.numel() * x.element_size() for x in tensors)


def check_cases(rank, expected):
    """Runs in each of two processes. expected: {case: (lines, weights)} of one process."""
    m = cpu_machine(rank, 2)
    parallel.join(m, 'gloo')
    for case, (lines, weights) in expected.items():
        tolerance, calls = CASES[case][-1], Calls()
        own_lines, model, optimizers = train_case(case, m, calls)
        assert own_lines == [pytest.approx(line, rel=1e-4) for line in lines], case
        state = parallel.whole_state(m, model)
        for name, value in state.items():
            if rank == 0:
                assert torch.allclose(value, weights[name], rtol=0, atol=tolerance), (case, name)
            else:
                assert value is None
        tied = model.config.tie_weights and rank == 0
        assert not tied or state['lm_head.weight'] is state['transformer.wte.weight']
        # every unit is gathered once per step, and reduced once, a unit of the loop at most twice
        assert {step['_allgather_base_'] for step in calls.steps} == {UNITS}, (case, calls.steps)
        if case == 'the gate alone':
            assert {step['_reduce_scatter_base_'] for step in calls.steps} == {1}
        else:
            assert all(UNITS <= step['_reduce_scatter_base_'] <= UNITS + 3 for step in calls.steps), case
        kept = [x for optimizer in optimizers for values in optimizer.state.values() for x in values.values()]
        own, whole = bytes_of([*model.parameters(), *kept])
        assert own <= 0.51 * whole, (case, own, whole)
    check_whole_weights(model)
    check_buckets(m)
    mesh = next(model.parameters()).device_mesh
    parts = [distribute_tensor(torch.tensor(x), mesh, [Shard(0)]) for x in ([3.0, 0.0], [0.0, torch.inf])]
    assert parallel.total_norm(parts[:1]) == 3 and parallel.total_norm(parts).isinf()  # on both ranks
    parallel.leave(m)


@torch.no_grad()
def check_whole_weights(model):
    """Checks that weights are gathered anew each time, also after a rank has used none of them."""
    weight = model.transformer.recur[0].mlp.c_fc.weight
    for expected in (weight.full_tensor(), weight.full_tensor() + 1):
        with parallel.whole_weights(model):
            pass
        weight.to_local().copy_(distribute_tensor(expected, weight.device_mesh, [Shard(0)]).to_local())
        with parallel.whole_weights(model):
            model(torch.zeros(1, 8, dtype=torch.int64))
            assert torch.equal(model.transformer.recur[0].mlp.c_fc.weight, expected)
        assert model.transformer.recur[0].mlp.c_fc.weight is weight


def check_buckets(m):
    """Checks that without shard DDP reduces gradients in the order in which they are ready."""
    ready, model = [], GPT(GPTConfig(**SIZES))
    names = [name for name, _ in model.named_parameters()]
    training_loss = parallel.wrap(
        TrainingLoss(model, train.TrainConfig()), dataclasses.replace(m, shard=False)
    )
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: ready.append(name))
    for idx in torch.zeros(3, 1, 8, dtype=torch.int64):  # the buckets are made anew after the first pass
        ready.clear()
        training_loss(idx, idx, n_loop=4)[0].backward()
    buckets = (
        training_loss._get_ddp_logging_data()['rebuilt_per_bucket_param_indices'].replace(',', '').split()
    )
    assert [names[int(i)] for i in buckets] == ready


def test_two_sharded_processes_train_as_one_and_gather_a_weight_once_per_step(monkeypatch):
    monkeypatch.setattr(muon, 'choose_dtype', muon.choose_dtype)  # train_case sets it
    expected = {}
    for case in CASES:
        lines, model, _ = train_case(case, cpu_machine(), Calls())
        expected[case] = lines, model.state_dict()
    start_two(check_cases, expected)


# -----------------------------------------------------------------------------
# runs of train.py


def run_as_rank(rank, argv):
    """Runs train.py in each of two processes."""
    for module in (machine, train):
        module.RANK = rank
    machine.WORLD, pretraining.LOCAL_RANK = 2, rank
    train.main(argv)


KEYS = '--gradient_accumulation_steps=4 --dropout=0.1 --loop_sampling=poisson --loop_max=5 --diagnose=7'
KEYS = [
    *KEYS.split(),
    '--eval_loops=1,6',
    '--learning_rate=1e-3',
    '--lr_decay_iters=24',
    '--shard=True',
    '--ema=0.7',
]


def test_a_run_goes_on_with_two_sharded_processes_or_with_one(call, flags, tmp_path):
    argv = [*flags, *KEYS, '--init_from=auto']
    status, out, _ = call(train.main, *argv, '--max_iters=24', f'--out_dir={tmp_path}/whole')
    assert status == 0 and 'processes: 1, not sharded: one process' in out
    start_two(run_as_rank, [*argv, '--max_iters=12', '--sample_tokens=3'])
    sharded = load(tmp_path / 'out' / 'ckpt.pt')
    assert sharded['machine']['processes'] == 2
    assert call(train.main, *argv, '--max_iters=16')[0] == 0
    alone = load(tmp_path / 'out' / 'ckpt.pt')
    for part in 'model', 'optimizer', 'ema':
        assert describe(sharded[part]) == describe(alone[part])
    start_two(run_as_rank, [*argv, '--max_iters=24'])
    logs = [read_log(tmp_path / name) for name in ('out', 'whole')]
    for two, one in zip(*logs, strict=True):
        assert two.keys() == one.keys()
        for name in one.keys() - {'train/ms', 'train/tok_per_sec', 'mfu'}:
            assert two[name] == pytest.approx(one[name], abs=1e-5, rel=1e-4), (name, two, one)


def describe(state):
    """Returns a state dict with types and shapes in the place of its tensors."""
    if isinstance(state, dict):
        return {name: describe(value) for name, value in state.items()}
    return (type(state), state.dtype, state.shape) if isinstance(state, torch.Tensor) else type(state)


def join_and_end(rank):
    """Meets the other process and ends as if killed. Rank 0 comes later: its old address would be read."""
    time.sleep(1.5 * (rank == 0 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '1'))
    m = cpu_machine(rank, 2)
    parallel.join(m, 'gloo')
    os._exit(0 if parallel.reduce_sum(m, torch.tensor([1.0])).item() == 2 else 3)


def test_processes_that_torchrun_starts_anew_find_each_other(monkeypatch):
    """Its agent keeps one store, which has the addresses of the processes that were killed."""
    agent = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    for attempt in range(2):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(attempt))
        arguments = agent.port, join_and_end
        torch.multiprocessing.start_processes(call_as_rank, arguments, nprocs=2, start_method='fork')


def test_sharded_blocks_are_not_compiled(monkeypatch):
    monkeypatch.setattr(machine, 'WORLD', 2)
    with pytest.raises(ValueError, match='compile=True, expected False or auto with shard=True'):
        machine.setup(train.TrainConfig(device='cpu', compile=True, shard=True))
