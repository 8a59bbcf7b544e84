"""What only a GPU can show, against eager mode, dense masks or a CPU: `pytest tests/test_cuda.py`.

Without a GPU all of it is skipped. runs/gpu_check.sh runs it beside its measurements, and puts what a test
gives to record_property into its table.
"""

import itertools
import time

import pytest
import torch
import torch._inductor.config
import torch._inductor.cudagraph_trees
from helpers import load, randomize, same

import model as model_file
import train
from configurator import configure
from model import GPT, GPTConfig
from nanoloop.batches import Batch
from nanoloop.early_exit import EarlyExit
from nanoloop.ema import make_average
from nanoloop.generate import Generation
from nanoloop.machine import Machine
from nanoloop.objective import OBJECTIVE, TrainingLoss, set_trained_parts
from nanoloop.optimizer import make_optimizers, prepare_step
from nanoloop.training_step import train_step
from nanoloop.windows import block_mask, flex_attend

DEVICE = torch.device('cuda', 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU with CUDA')
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def as_before():
    """Undoes what a test sets for the whole process."""
    yield
    torch.cuda.set_sync_debug_mode('default')
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision('highest')
    torch.compiler.reset()


def make(**keys):
    """A small model of heads of 64 channels, with random weights."""
    small = dict(n_embd=128, n_head=2, vocab_size=512, block_size=512, n_prelude=1, n_block=1, n_coda=1)
    return randomize(GPT(GPTConfig(**(small | dict(n_loop=2, pos='rope') | keys)))).to(DEVICE)


def tokens(B, T):
    return torch.randint(512, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def loss_and_gradients(model, idx, dtype):
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False):
        loss = model(idx, idx)[1]
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


def assert_close(ours, expected, dtype):
    """Compares lists of tensors by the size of their difference."""
    most = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= most * b.norm()


def peak_bytes(run):
    """Returns the most bytes that run() takes beside what is there before. Memory is taken once before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


# -----------------------------------------------------------------------------
# training


@pytest.mark.parametrize('name', ['gpt2', 'gpt2_looped', 'flt', 'looped_nanochat', 'ouro_1_4b'])
def test_the_host_does_not_wait_in_a_step(name):
    """CUDA raises an error where the host waits, copies from pageable memory among it. Muon has to wait."""
    small = ['--size=1'] if name == 'looped_nanochat' else ['--n_embd=128', '--n_head=2']
    small += ['--vocab_size=512', '--block_size=512', '--gradient_accumulation_steps=2', '--optimizer=adamw']
    small += ['--n_block=2', '--matrix_lr=None', '--ema=0.9']
    c = configure((train.TrainConfig, GPTConfig), [f'config/train_{name}.py', *small], say=None)
    m, model = Machine(0, 1, DEVICE, DEVICE.type, torch.bfloat16), GPT(c.build(GPTConfig)).to(DEVICE)
    set_trained_parts(model, OBJECTIVE[c.objective])
    (optimizers, _), average = make_optimizers(model, c), make_average(model, c)
    idx = torch.randint(512, (2, 513))
    batches = itertools.repeat(Batch(idx[:, :-1].contiguous(), idx[:, 1:].contiguous(), 0))
    for mode in ('default', 'default', 'error'):  # the first steps compile flex attention, and take memory
        torch.cuda.set_sync_debug_mode(mode)
        prepare_step(optimizers, 0, 1e-3)
        result = train_step(TrainingLoss(model, c), optimizers, m.scaler(), batches, c.n_loop, c, m)
        average.update(result.changed)
    torch.cuda.set_sync_debug_mode('default')
    assert result.loss > 0 and result.grad_norm > 0


@pytest.mark.parametrize(
    'way, dtype', [*itertools.product(['eager', 'compiled'], DTYPES), ('recompute', torch.bfloat16)], ids=str
)
def test_flex_windows_equal_dense_masks(monkeypatch, way, dtype):
    """Within block_size and beyond it, with grouped queries."""
    keys = dict(window_pattern='SL', window_size=200, n_kv_head=1, qk_norm=True, recompute=way == 'recompute')
    results = []
    for dense in (False, True):
        if dense:
            monkeypatch.setitem(model_file.WINDOWS, DEVICE.type, model_file.WINDOWS.default_factory())
        model = make(**keys)
        assert (model.attn_inputs(torch.arange(512, device=DEVICE)).attend is flex_attend()) != dense
        for block in model.blocks() if way == 'compiled' else ():
            block.compile()
        results.append([])
        for T in (512, 1024):
            model.zero_grad()
            results[-1] += loss_and_gradients(model, tokens(2, T), dtype)
    assert_close(*results, dtype)


def test_flex_attention_is_faster_than_a_dense_mask(record_property):
    """Forward and backward pass of one layer: 16 heads, 8,192 tokens, a window of 512, bfloat16."""
    size = dict(device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(1, 16, 8192, 64, **size) for _ in range(3))
    pos, seconds = torch.arange(8192, device=DEVICE), []
    for make_mask, attend in ((model_file.make_window_mask, model_file.attend), (block_mask, flex_attend())):
        mask = make_mask(pos, 512)
        for rounds in (3, 20):  # the first ones compile
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(rounds):
                attend(q, k, v, mask, 0.0).sum().backward()
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / rounds)
    record_property('value', f'{seconds[0] / seconds[1]:.2f} (dense / flex)')
    record_property('wanted', 'above 1')
    assert seconds[1] < seconds[0]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_compiled_blocks_equal_eager_ones(dtype):
    results = []
    for compiled in (True, False):
        model = make(bptt_k=1, qk_norm=True, input_injection='query_all', state_init='random')
        for block in model.blocks() if compiled else ():
            block.compile()
        torch.manual_seed(0)
        results.append(loss_and_gradients(model.train(), tokens(2, 256), dtype))
    assert_close(*results, dtype)


@pytest.mark.parametrize('keys', [['--optimizer=muon', '--ema=0.9'], ['--objective=step', '--dropout=0.1']])
def test_a_resumed_run_is_the_same_to_the_bit(call, flags, tmp_path, keys):
    flags = [*flags, *keys, f'--device={DEVICE.type}', '--dtype=bfloat16', '--deterministic=True']
    assert call(train.main, *flags)[0] == 0
    parts = [*flags, f'--out_dir={tmp_path}/parts', '--lr_decay_iters=12']
    assert call(train.main, *parts, '--max_iters=7')[0] == 0
    assert call(train.main, *parts, '--init_from=resume')[0] == 0
    whole, resumed = (load(tmp_path / name / 'ckpt.pt') for name in ('out', 'parts'))
    assert same(whole['model'], resumed['model']) and same(whole['optimizer'], resumed['optimizer'])


def test_reinforcement_learns_on_a_gpu(call, tmp_path):
    here = [f'--device={DEVICE.type}', f'--out_dir={tmp_path}/rl', '--max_iters=2', '--eval_interval=1']
    base = [*here, '--dataset=mano:1', '--n_embd=64', '--n_head=2', '--n_loop=2', '--eval_iters=1']
    assert call(train.main, *base, f'--out_dir={tmp_path}/base', '--sample_tokens=0')[0] == 0
    keys = '--rl_task=mano:1 --rl_samples=4 --batch_size=8 --eval_iters=1 --sample_tokens=0'.split()
    status, out, err = call(train.main, *here, *keys, f'--init_from={tmp_path}/base')
    assert status == 0 and 'reward' in out, err


def test_recomputing_loops_takes_less_memory(record_property):
    peaks = []
    for recompute in (False, True):
        model, idx = make(n_loop=12, n_embd=512, n_head=8, recompute=recompute), tokens(8, 512)
        peaks.append(peak_bytes(lambda model=model, idx=idx: loss_and_gradients(model, idx, torch.bfloat16)))
    record_property('value', f'{peaks[1] / peaks[0]:.3f} (recompute / not, 12 loops)')
    record_property('wanted', 'at most 0.5')
    assert peaks[1] <= 0.5 * peaks[0]


def test_a_head_in_chunks_takes_less_memory(record_property):
    idx, peaks = tokens(8, 1024), []
    for chunk in (2**30, 4 * 2**25 // 50304):
        model = make(vocab_size=50304, block_size=1024)
        model.head_chunk = chunk
        loss = TrainingLoss(model, train.TrainConfig())
        peaks.append(peak_bytes(lambda loss=loss: loss(idx, idx, 2)[0].backward()))
    record_property('value', f'{peaks[1] / peaks[0]:.3f} (in chunks / at once)')
    record_property('wanted', 'at most 0.5')
    assert peaks[1] <= 0.5 * peaks[0]


# -----------------------------------------------------------------------------
# decoding


@torch.inference_mode()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@torch._inductor.config.patch({'triton.cudagraph_or_error': True})  # else torch only warns
def test_a_compiled_step_of_decoding_equals_an_eager_one(dtype):
    """Three rows of unlike lengths, over several lengths of the visible columns."""
    low = torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False)
    model, idx = make(window_pattern='SL', n_kv_head=1, block_size=128).eval(), tokens(3, 300)
    with low:
        ways = [Generation(model, idx[:, :40], [40, 3, 17], compile=compile) for compile in (True, False)]
        for generation in ways:
            generation.prefill()
        for token in idx[:, 40:].T:
            for generation in ways:
                generation.append(token)
            assert_close([ways[0].head_input], [ways[1].head_input], dtype)
    assert torch._inductor.cudagraph_trees.get_container(DEVICE.index).tree_manager is not None


@torch.inference_mode()
@pytest.mark.parametrize(
    'exit, rows, speculate', [(None, 1, 3), (EarlyExit('kl', 0.1), 1, 3), (EarlyExit('diff', 0.5), 3, 0)]
)
@torch._inductor.config.patch({'triton.cudagraph_or_error': True})
def test_compiled_exits_and_drafts_give_the_tokens_of_eager_ones(exit, rows, speculate):
    """In float64, greedy."""
    model = make(n_loop=6).double().eval()
    options = dict(temperature=0, early_exit=exit, speculate=speculate)
    both = []
    for compile in (True, False):
        generation = Generation(model, tokens(rows, 10), compile=compile, **options)
        both.append(torch.stack([*generation.stream(40)]))  # (40, rows)
    assert torch.equal(*both)


@torch.inference_mode()
@pytest.mark.parametrize('rule', ['kl', 'diff'])
def test_exits_of_a_gpu_are_those_of_a_cpu(rule):
    """In float64, with a threshold at which tokens take unlike numbers of loops."""
    results = []
    for threshold in torch.logspace(-4, 1, 11).tolist():
        both = []
        for device in ('cpu', DEVICE):
            model = make(n_loop=6).double().eval().to(device)
            options = dict(temperature=0, early_exit=EarlyExit(rule, threshold))
            generation = Generation(model, tokens(4, 10).to(device), **options)
            ids = torch.stack([token.cpu() for token in generation.stream(20)])  # (20, 4)
            both.append((ids.tolist(), generation.stats.loops_taken))
        assert both[0] == both[1]
        results.append(len(both[0][1]))
    assert max(results) > 1
