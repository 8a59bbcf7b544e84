"""Windows through flex attention equal those through dense masks, and leave out what a window hides.

The kernels of a GPU are tried in test_cuda.py. Here flex attention runs as torch's reference for it, with the
same masks, on a CPU.
"""

import functools

import pytest
import torch
from helpers import randomize
from torch.nn.attention import flex_attention as flex

import model as model_file
from model import GPT, GPTConfig, attend, make_window_mask
from nanoloop import machine, windows
from nanoloop.windows import BLOCK, block_mask, flex_attend, flex_windows


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Lets rows of two blocks have flex attention: they are enough, and quick."""
    monkeypatch.setattr(windows, 'MIN_LENGTH', 2 * BLOCK)


@pytest.fixture
def reference(monkeypatch):
    """Makes flex attention run on the CPU, also with gradients, which torch refuses there."""
    monkeypatch.setattr(flex, '_validate_device', lambda *qkv: None)
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    monkeypatch.setitem(model_file.WINDOWS, 'cpu', flex_windows)
    flex_attend.cache_clear()
    yield
    flex_attend.cache_clear()
    torch.compiler.reset()


def make(**keys):
    small = dict(n_embd=64, n_head=4, vocab_size=50, block_size=2 * BLOCK, n_prelude=1, n_loop=2, n_coda=1)
    shape = dict(n_block=1, pos='rope', window_pattern='SL', window_size=70, n_kv_head=2, qk_norm=True)
    return randomize(GPT(GPTConfig(**(small | shape | keys))))


@pytest.mark.parametrize('window', [1, 100, 126, 127, 128, 129, 254, 255, 256, 300, 383])
def test_a_block_mask_is_torchs_and_hides_what_the_dense_mask_hides(window):
    T = 3 * BLOCK
    pos = torch.arange(T)
    ours, dense = block_mask(pos, window), make_window_mask(pos, window)
    theirs = flex.create_block_mask(lambda row, head, i, j: dense[i, j], None, None, T, T, 'cpu')
    for a, b in zip(ours.as_tuple()[:-1], theirs.as_tuple()[:-1], strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert torch.equal(flex.create_mask(ours.mask_mod, 1, 1, T, T, 'cpu')[0, 0], dense)


def test_the_number_of_computed_blocks_grows_linearly_with_the_context():
    blocks = []
    for n in (8, 16, 32):
        mask = block_mask(torch.arange(n * BLOCK), 300)
        blocks.append(int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()))
    # the first query of a block sees 300 keys before it: blocks i - 3 to i are computed
    assert blocks == [4 * n - (1 + 2 + 3) for n in (8, 16, 32)]


@pytest.mark.parametrize('window', [1, 130])
def test_flex_attention_equals_dense_attention_in_float64(reference, window):
    T, generator = 3 * BLOCK, torch.Generator().manual_seed(0)
    results = []
    q, k, v, grad = (
        torch.randn(2, heads, T, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    for make_mask, attention in ((make_window_mask, attend), (block_mask, flex_attend())):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention(*leaves, make_mask(torch.arange(T), window), 0.0)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    'lengths, keys',
    [
        # the second length is beyond block_size, where layers without a window have one of block_size
        ([2 * BLOCK, 4 * BLOCK], dict(recompute=True)),
        ([2 * BLOCK], dict(window_pattern='S', n_prelude=0, n_coda=0, bptt_k=1)),  # blocks are compiled
    ],
)
def test_a_model_with_flex_windows_equals_one_with_dense_masks(reference, monkeypatch, lengths, keys):
    idx, results = torch.randint(50, (2, 4 * BLOCK)), []
    for windowing in (model_file.WINDOWS.default_factory(), flex_windows):
        monkeypatch.setitem(model_file.WINDOWS, 'cpu', windowing)
        model = make(**keys)
        for block in model.blocks() if windowing is flex_windows and 'bptt_k' in keys else ():
            block.compile()
        losses = [model(idx[:, :T], idx[:, :T])[1] for T in lengths]
        sum(losses).backward()
        results.append([*losses, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))


def test_masks_are_made_once_per_length_and_serve_training_after_evaluation(reference):
    model, pos = make(), torch.arange(2 * BLOCK)
    windows.cached_block_mask.cache_clear()
    with torch.inference_mode():
        inputs = model.attn_inputs(pos)
    assert inputs.mask is None  # plain causal attention
    assert inputs.window_mask is model.attn_inputs(pos).window_mask
    model(pos[None] % 50, pos[None] % 50)[1].backward()
    assert model.attn_inputs(torch.arange(3 * BLOCK)).mask.shape == (1, 1, 3 * BLOCK, 3 * BLOCK)


# what keeps dense masks: keys of the model, number of positions
DENSE = [
    (dict(), 2 * BLOCK + 1),  # no multiple of a block
    (dict(window_size=20), BLOCK),  # a short row
    (dict(dropout=0.1), 2 * BLOCK),
    (dict(n_embd=32), 2 * BLOCK),  # heads of 8 channels
    (dict(n_embd=2 * 264, n_head=2), 2 * BLOCK),  # heads of 264
    (dict(window_pattern='L', window_size=None), 2 * BLOCK),  # no window: causal attention needs no mask
    (dict(window_size=2 * BLOCK - 1), 2 * BLOCK),
]


@pytest.mark.parametrize('keys, T', DENSE)
def test_dense_masks_stay_where_flex_attention_cannot_serve(monkeypatch, keys, T):
    def works():
        raise AssertionError('compiling was tried')

    monkeypatch.setitem(model_file.WINDOWS, 'cpu', functools.partial(flex_windows, works=works))
    assert make(**keys).attn_inputs(torch.arange(T)).attend is attend


def test_flex_attention_serves_where_it_is_compiled():
    model, dense, flexible = make(), (make_window_mask, attend), (block_mask, flex_attend())
    assert flex_windows(model, 256, 70) == flex_windows(make(dropout=0.1).eval(), 256, 70) == flexible
    assert flex_windows(model, 256, 70, works=lambda: False) == dense
    with torch.compiler.set_stance('force_eager'):
        assert flex_windows(model, 256, 70) == dense
    assert flex_windows(model.double(), 256, 70) == dense


@pytest.mark.parametrize('fault, make_mask', [(None, block_mask), ('no compiler', make_window_mask)])
def test_a_gpu_has_flex_windows_if_it_can_compile(monkeypatch, fault, make_mask):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: fault)
    machine.can_compile.cache_clear()
    assert model_file.WINDOWS['cuda'](make(), 256, 70)[0] is make_mask
    machine.can_compile.cache_clear()
