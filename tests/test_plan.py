"""Plans of runs on many GPUs: memory against what autograd saves, bytes on the wire computed by hand."""

import itertools
import re
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import bench
from configurator import configure
from model import GPT, GPTConfig
from nanoloop.activations import activations
from nanoloop.machine import autocast
from nanoloop.objective import OBJECTIVE, TrainingLoss, set_trained_parts
from nanoloop.optimizer import OPTIMIZER, make_optimizers
from nanoloop.plan import WAYS, Wire, optimizer_bytes, ring
from train import TrainConfig

TINY = '--n_embd=16 --n_head=2 --vocab_size=40 --batch_size=2 --n_block=1 --n_prelude=1 --n_coda=1'.split()


def keys(*argv):
    """Returns the keys of train.py and the GPTConfig of a small model."""
    c = configure((TrainConfig, GPTConfig), [*TINY, *argv], say=None)
    return c, c.build(GPTConfig)


def saved_bytes(c, config, dtype):
    """Computes a loss on the CPU and sums what autograd keeps beside the parameters, every storage once."""
    model = GPT(config)
    set_trained_parts(model, OBJECTIVE[c.objective])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = weakref.ref(x.untyped_storage())
        return x

    idx = torch.zeros(c.batch_size, c.block_size, dtype=torch.long)  # (B, T)
    with saved_tensors_hooks(pack, lambda x: x), autocast('cpu', dtype):
        result = TrainingLoss(model, c)(idx, idx, config.n_loop)
    kept = [storage() for start, storage in storages.items() if start not in own]
    del result
    return sum(storage.nbytes() for storage in kept if storage is not None)


OURO = '--input_injection=passthrough --norm_place=branch --mlp=swiglu --pos=rope --n_prelude=0 --n_coda=0'
CASES = {
    'plain': '--n_loop=1 --input_injection=passthrough --n_prelude=0 --n_coda=0 --norm=layernorm --bias=True',
    'truncated': '--n_loop=4 --bptt_k=2 --state_init=random --norm_place=around --qk_norm=True --n_kv_head=1',
    'recomputed': '--n_loop=3 --recompute=True --softcap=15 --mlp=relu2',
    'looped': f'{OURO} --exit_gate=True --objective=exit',
    'gate': f'{OURO} --exit_gate=True --objective=gate',
}
SIZES = {
    torch.float32: '--block_size=16',
    torch.bfloat16: '--block_size=288',
}  # <= 256: see attend(), model.py


@pytest.mark.parametrize('case', CASES)
def test_activations_are_what_autograd_saves_to_the_byte(case):
    for dtype, size in SIZES.items():
        c, config = keys(*CASES[case].split(), size)
        counted = activations(config, c, dtype, config.n_loop, as_gpu=False)
        assert counted.saved == saved_bytes(c, config, dtype), dtype


WIDE = '--n_embd=64 --block_size=32 --batch_size=1 --n_coda=3 --vocab_size=300 --tie_weights=False'.split()


@pytest.mark.parametrize('case, sizes', [('looped', ['--block_size=288']), ('recomputed', WIDE)])
def test_the_peak_is_that_of_the_allocator(case, sizes):
    """WIDE: weights and their gradients, which are not counted, are larger than the activations."""
    c, config = keys(*CASES[case].split(), *sizes)
    model = GPT(config)
    set_trained_parts(model, OBJECTIVE[c.objective])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    idx = torch.zeros(c.batch_size, c.block_size, dtype=torch.long)  # (B, T)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with autocast('cpu', torch.bfloat16):
            loss = TrainingLoss(model, c)(idx, idx, config.n_loop)[0]
        loss.backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    counted = activations(config, c, torch.bfloat16, config.n_loop, as_gpu=False)
    assert peak == pytest.approx(counted.peak, rel=0.02) and counted.peak > counted.saved


def test_a_layer_saves_on_a_gpu_what_its_formula_says():
    """Bytes per token: norms in float32 with 1 / rms, matrix products in bfloat16, log-sum-exp in float32.

    C = 16, H = 2, h = 24 channels inside the MLP. RoPE makes new queries and keys, and then the output of
    attention is copied.
    """
    C, H, h, one, two = 16, 2, 24, '--n_block=1', '--n_block=2'
    pre = 2 * (4 * C + 4) + 2 * (C + 3 * C + C) + 4 * H + 2 * C + 2 * (h + h)
    branch = 4 * (4 * C + 4) + 2 * (C + 3 * C + 2 * C + C + C) + 4 * H + 2 * C + 2 * (2 * h + h + h)
    for flags, parts, expected in (('--input_injection=passthrough', 1, pre), (OURO, 2, branch)):
        counted = []
        for n in (one, two):
            c, config = keys(*flags.split(), n, '--n_loop=1', f'--n_hidden={h}', '--block_size=288')
            saved, copies, _ = activations(config, c, torch.bfloat16, 1)
            counted.append((saved - copies, copies))
        assert counted[1][0] - counted[0][0] == expected * 2 * 288
        assert counted[1][1] - counted[0][1] == 2 * (4 * C * C + parts * C * h + h * C)


@pytest.mark.parametrize('optimizer', OPTIMIZER)
def test_optimizers_keep_the_bytes_that_are_planned(optimizer):
    c, config = keys(f'--optimizer={optimizer}', '--block_size=8')
    model = GPT(config)
    optimizers, _ = make_optimizers(model, c)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for part in optimizers:
        part.step()
    states = [x for part in optimizers for state in part.state.values() for x in state.values()]
    kept = sum(x.nbytes for x in states if x.dim())  # without the number of steps
    assert kept == optimizer_bytes(model, c)


def ring_by_hand(n, node):
    """Bytes that the busiest GPU sends to its node and to others when n GPUs pass n x node bytes around.

    node rings take a byte of every chunk each. Ring r runs through the nodes one after the other, and through
    each from GPU r on, so that GPU r - 1 of a node sends to the next node.
    """
    inside, across = [0] * n, [0] * n
    for r in range(node):
        order = [first + (r + i) % node for first in range(0, n, node) for i in range(node)]
        for _ in range(n - 1):  # steps: every GPU passes a chunk on
            for here, there in zip(order, [*order[1:], order[0]], strict=True):
                (inside if here // node == there // node else across)[here] += 1
    return max(inside), max(across)


@pytest.mark.parametrize('n', [1, 2, 4, 12])
def test_a_ring_sends_what_a_ring_sends_step_by_step(n):
    node = min(n, 4)
    assert ring(n * node, n, node) == ring_by_hand(n, node)


def test_bytes_on_the_wire_by_hand():
    """1e9 parameters: 4 GB. 63 / 64 of it leave a GPU in a reduce-scatter, 1 / 8 of them for other nodes."""
    (none, reduce), (gather, scatter) = (WAYS[way].wires(1e9, 1e9, 64) for way in ('ddp', 'fsdp'))
    assert none == Wire(0.0, 0.0) and gather == scatter == pytest.approx((3.4453125e9, 0.4921875e9))
    assert reduce == pytest.approx((6.890625e9, 0.984375e9))
    assert reduce.seconds(450, 400) == pytest.approx(0.984375 / 50)  # longer than 6.890625 / 450
    assert reduce.seconds(45, 400) == pytest.approx(6.890625 / 45)
    assert WAYS['ddp'].wires(1e9, 1e6, 8)[1] == pytest.approx((7e6, 0.0))  # only what is trained


def figures(out):
    """The table that bench.py prints, {name: the numbers of its columns}."""
    rows = re.findall(r'^  (\S.*?) {2,}([\d.,]+) +([\d.,]+)$', out, re.MULTILINE)
    return {name: [float(x.replace(',', '')) for x in pair] for name, *pair in rows}


def test_bench_plans_a_run_without_allocating_its_model(call):
    flags = (
        '--gpu=H100 --peak_flops=1e15 --plan_mfu=0.5 --nvlink=100 --infiniband=80 --max_iters=1000'.split()
    )
    small = ['--n_block=1']  # of 1.4 billion parameters 252 million are left
    status, out, err = call(bench.main, 'config/train_ouro_1_4b.py', '--plan=16', *flags, *small)
    assert status == 0, err
    P = 2 * 49152 * 2048 + 4 * 2048**2 + 3 * 2048 * 5632 + 5 * 2048 + 2049
    assert (
        f'\n16 H100: 4,194,304 tokens per step, a GPU has 64 micro-batches of 1 x 4,096\n{P:,} parameters'
        in out
    )
    table, GB = figures(out), 4 * P / 1e9
    assert table['weights'] == pytest.approx([4 * P / 2**30, 4 * P / 16 / 2**30], abs=0.01)
    assert table['gathered weights'] == pytest.approx([0, 4 * P / 2**30], abs=0.01)
    assert table['optimizer states'] == pytest.approx([8 * P / 2**30, 8 * P / 16 / 2**30], abs=0.01)
    memory = list(table)[: list(table).index('sum, of 79')]
    assert table['sum, of 79'][0] == pytest.approx(sum(table[name][0] for name in memory), abs=0.05)
    assert table['to other nodes, at 80 Gb/s'] == pytest.approx([2 * GB * 15 / 16 / 8] * 2, abs=0.001)
    seconds = table['communication'][0]
    assert seconds == pytest.approx(2 * GB * 15 / 16 / 8 / 10, abs=1e-4)  # 80 Gb/s are 10 GB/s
    busy = float(re.search(r'trained; (\S+) FLOPs', out)[1]) / 16 / 0.5e15
    exposed = table['communication not hidden, at best'][0]
    window = 2 * 4096 * (2 * (P - 2 * 49152 * 2048) + 4 * 2048 * 4096) / 0.5e15  # a loop's backward pass
    assert exposed == pytest.approx(seconds - window, abs=2e-4) and window > 0.05 * seconds
    mfu = [float(x) for x in re.findall(r'MFU, % +([\d.]+)', out)]
    assert mfu == pytest.approx([50 * busy / (busy + wait) for wait in (exposed, seconds)], abs=0.02)
    hours = float(re.findall(r'hours for 1,000 steps +([\d.]+)', out)[-1])
    assert hours == pytest.approx(1000 * (busy + seconds) / 3600, abs=0.01)


def test_a_plan_has_the_bytes_of_the_average(call):
    argv = 'config/train_ouro_1_4b.py --plan=8 --n_block=1 --optimizer=muon'.split()
    plain, averaged = (figures(call(bench.main, *argv, *more)[1]) for more in ([], ['--ema=0.999']))
    assert averaged.pop('average of the weights') == plain['weights']  # as many, and shared in the same way
    sums = [table['sum, of 79'] for table in (plain, averaged)]
    assert sums[1] == pytest.approx([a + b for a, b in zip(sums[0], plain['weights'], strict=True)], abs=0.02)
    assert plain.keys() == averaged.keys()


@pytest.mark.parametrize(
    'flags, expected',
    [
        ('--plan=16', '--batch_size=10 --gradient_accumulation_steps=48 has the same tokens per step'),
        ('--plan=64', '--gradient_accumulation_steps=64 has 1.60 times the tokens per step'),
        ('--plan=12', 'plan=12, expected at most 8 GPUs, or a multiple of 8: whole nodes'),
        ('--plan=8 --dtype=float32', 'peak_flops=None, expected the FLOP/s of one H100 with dtype=float32'),
        ('--plan=8 --init_from=gpt2', "init_from='gpt2', expected scratch"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_one_that_can(call, flags, expected):
    status, _, err = call(bench.main, 'config/train_gpt2.py', *flags.split())
    assert status == 2 and expected in err and err.count('\n') == 1


@pytest.mark.parametrize('rows, over', [(18, ''), (19, 'ddp'), (20, 'ddp and fsdp')])
def test_a_plan_says_what_does_not_fit(call, rows, over):
    flags = '--plan=8', '--n_block=2', '--gradient_accumulation_steps=64', f'--batch_size={rows}'
    out = call(bench.main, 'config/train_ouro_1_4b.py', *flags)[1]
    sums = figures(out)['sum, of 79']
    assert [size > 79 for size in sums] == [way in over for way in WAYS]
    assert re.findall('^does not fit: (.*);', out, re.MULTILINE) == [over] * bool(over)
