"""Recipes of config/ against their papers' equations, each written out as a plain loop of its own."""

import io

import pytest
import torch
from helpers import randomize, rms, softmax_attention, turn

from configurator import configure
from model import GPT, GPTConfig
from train import TrainConfig

IDX = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(0))
LOOPS = pytest.mark.parametrize('n_loop', [1, 2, 5])


def build(name, *flags):
    """(model, weights, eps) of a recipe in double precision, 24 wide, with random weights everywhere."""
    small = ['--vocab_size=23', '--block_size=16', *flags]
    c = configure((TrainConfig, GPTConfig), [f'config/train_{name}.py', *small], out=io.StringIO())
    model = randomize(GPT(c.build(GPTConfig))).double().eval()
    return model, model.state_dict(), c.norm_eps or 1e-6


def attention(source, x, w, name, heads, base=10000.0, qk_eps=None, window=None):
    """Multi-head attention, queries of source, keys and values of x, before the last projection."""
    q, k, v = (y @ part.T for y, part in zip((source, x, x), w[name].chunk(3), strict=True))
    out = []
    for one in zip(*(y.chunk(heads, dim=-1) for y in (q, k, v)), strict=True):
        q, k = (turn(y, base) for y in one[:2])
        if qk_eps:
            q, k = rms(q, qk_eps), rms(k, qk_eps)
        out.append(softmax_attention(q, k, one[2], window))
    return torch.cat(out, dim=-1)


@LOOPS
@pytest.mark.parametrize('kind', ['flt', 'flt_res', 'lt', 'lt_i', 'lt_ia'])
def test_the_flt_family(kind, n_loop):
    model, w, eps = build(kind, '--n_embd=24', '--n_head=2', '--n_block=3')

    def block(x, i, query=None):
        name = f'transformer.recur.{i}.'
        y = attention(rms(x, eps) if query is None else rms(query, eps), rms(x, eps),
                      w, name + 'attn.c_attn.weight', 2, qk_eps=eps)  # fmt: skip
        x = x + y @ w[name + 'attn.c_proj.weight'].T
        return x + (rms(x, eps) @ w[name + 'mlp.c_fc.weight'].T).relu() ** 2 @ w[name + 'mlp.c_proj.weight'].T

    x_0, h = w['transformer.wte.weight'][IDX], None
    for loop in range(n_loop):
        x = rms(x_0, eps)
        if loop > 0 and kind == 'lt':
            x = h
        if loop > 0 and kind == 'lt_i':
            x = rms(x_0 + h, eps)
        for i in range(3):
            if loop > 0 and kind == 'flt_res':
                x = rms(x + h, eps)
            queried = kind == 'flt' or (kind == 'lt_ia' and i == 0)
            x = block(x, i, h if queried else None)
        h = rms(x, eps)
    expected = 15 * torch.tanh(h @ w['lm_head.weight'].T / 15)
    assert torch.allclose(model(IDX, IDX, n_loop=n_loop)[0], expected, atol=1e-10)


@LOOPS
def test_looped_nanochat(n_loop):
    model, w, eps = build('looped_nanochat', '--size=1')  # one head of 128; windows of 8 keys and itself

    def norm(x, name):
        return rms(x, eps) * w[name + '.weight']

    def block(x, name, letter):
        y = attention(*[norm(x, name + 'ln_1')] * 2, w, name + 'attn.c_attn.weight', 1, qk_eps=eps,
                      window=8 if letter == 'S' else None)  # fmt: skip
        x = norm(x + y @ w[name + 'attn.c_proj.weight'].T, name + 'out_1')
        y = (norm(x, name + 'ln_2') @ w[name + 'mlp.c_fc.weight'].T).relu() ** 2
        return norm(x + y @ w[name + 'mlp.c_proj.weight'].T, name + 'out_2')

    e = norm(w['transformer.wte.weight'][IDX], 'transformer.norm_emb')
    for i in (0, 1):
        e = block(e, f'transformer.prelude.{i}.', 'L')
    s = e
    for _ in range(n_loop):
        s = torch.cat((e, s), dim=-1) @ w['inject.weight'].T
        for i in range(4):
            s = block(s, f'transformer.recur.{i}.', 'SSSL'[i])
        s = norm(s, 'norm_recur')
    for i in (0, 1):
        s = block(s, f'transformer.coda.{i}.', 'L')
    expected = 15 * torch.tanh(norm(s, 'transformer.ln_f') @ w['lm_head.weight'].T / 15)
    assert torch.allclose(model(IDX, IDX, n_loop=n_loop)[0], expected, atol=1e-10)


@LOOPS
@pytest.mark.parametrize('name, normed', [('ouro_1_4b', True), ('ouro_small', False)])
def test_ouro_and_looplm(name, normed, n_loop):
    """Ouro's normed state feeds gate, head and next iteration; LoopLM's head alone reads a normed state."""
    model, w, eps = build(name, '--n_embd=24', '--n_head=2', '--n_block=3', '--n_hidden=40')
    final = 'norm_recur.weight' if normed else 'transformer.ln_f.weight'

    def norm(x, name):
        return rms(x, eps) * w[name]

    h, gates, logits = w['transformer.wte.weight'][IDX], [], []
    for _ in range(n_loop):
        for i in range(3):
            p = f'transformer.recur.{i}.'
            x = norm(h, p + 'ln_1.weight')
            y = attention(x, x, w, p + 'attn.c_attn.weight', 2) @ w[p + 'attn.c_proj.weight'].T
            h = h + norm(y, p + 'post_1.weight')
            gate, up = (norm(h, p + 'ln_2.weight') @ w[p + 'mlp.c_fc.weight'].T).chunk(2, dim=-1)
            h = h + norm(gate * gate.sigmoid() * up @ w[p + 'mlp.c_proj.weight'].T, p + 'post_2.weight')
        read = norm(h, final)
        h = read if normed else h
        gates.append((h @ w['exit_gate.weight'][0] + w['exit_gate.bias']).sigmoid())
        logits.append(read @ w['lm_head.weight'].T)
    assert torch.allclose(model(IDX, IDX, n_loop=n_loop)[0], logits[-1], atol=1e-10)
    ce, halting = model.table(IDX, IDX, n_loop=n_loop, rows=tuple(range(n_loop)))
    assert torch.allclose(halting, torch.stack(gates), atol=1e-10)
    expected = -torch.stack(logits).log_softmax(-1).gather(-1, IDX.expand(n_loop, -1, -1)[..., None])[..., 0]
    assert torch.allclose(ce, expected, atol=1e-10)


RECIPES = [
    'flt',
    'flt_res',
    'lt',
    'lt_i',
    'lt_ia',
    'looped_nanochat',
    'huginn_style',
    'ouro_1_4b',
    'ouro_small',
]


@pytest.mark.parametrize('name', RECIPES)
def test_the_state_neither_dies_nor_explodes(name):
    """Weights of std 0.02: its rms after 64 iterations is within twice that after 4, but for LoopLM small."""
    sizes = ['--size=1'] if name == 'looped_nanochat' else ['--n_embd=64', '--n_head=2', '--n_block=4']
    model, _, _ = build(name, *sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.dim() > 1):
            p.normal_(std=0.02, generator=generator)
        states, _ = model.float().states(IDX, n_loop=64, rows=(3, 63))
    ratio = (states[1].pow(2).mean() / states[0].pow(2).mean()).sqrt().item()
    assert 8 < ratio < 32 if name == 'ouro_small' else 0.5 < ratio < 2
