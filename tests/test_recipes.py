"""Recipes of config/ against their papers' equations, each written out as a plain loop of its own."""

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
    c = configure((TrainConfig, GPTConfig), [f'config/train_{name}.py', *small], say=None)
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
    ce, halting = model.loss_table(IDX, IDX, n_loop=n_loop, loops=tuple(range(n_loop)))
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
        states, _ = model.float().loop_states(IDX, n_loop=64, loops=(3, 63))
    ratio = (states[1].pow(2).mean() / states[0].pow(2).mean()).sqrt().item()
    assert 8 < ratio < 32 if name == 'ouro_small' else 0.5 < ratio < 2


FLT = dict(n_prelude=0, n_block=6, n_coda=0, n_loop=12, n_embd=384, n_head=3, block_size=1024,
           bias=False, norm='rmsnorm_fixed', norm_place='pre', norm_emb=True, norm_loop=True,
           norm_final=False, norm_eps=1.1920929e-07, pos='rope', rope_base=10000.0, qk_norm=True,
           mlp='relu2', tie_weights=False, softcap=15.0, init='nanochat', optimizer='muon', matrix_lr=0.02,
           head_lr=None, learning_rate=0.004, embedding_lr=0.2, lr_width=768, beta1=0.8, beta2=0.95,
           adam_eps=1e-10, weight_decay=0.0, grad_clip=1.0, warmup_iters=0, lr_schedule='linear',
           warmdown_frac=0.2, min_lr=0.0, max_iters=5000, objective='end', loop_sampling='fixed')  # fmt: skip
OURO = dict(n_prelude=0, n_coda=0, n_loop=4, input_injection='passthrough', norm='rmsnorm', norm_eps=None,
            norm_place='branch', norm_emb=False, pos='rope', qk_norm=False, mlp='swiglu', exit_gate=True,
            softcap=None, bias=False, vocab_size=49152, objective='exit', beta=0.1, learning_rate=3e-4,
            beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0)  # fmt: skip
LARGE = OURO | dict(n_embd=2048, n_head=16, n_hidden=5632, norm_loop=True, norm_final=False,
                    tie_weights=False, decay_lr=False)  # fmt: skip
STAGE = LARGE | dict(n_block=24, batch_size=1)
PUBLISHED = {  # what the papers and their programs say
    'train_flt': FLT | dict(input_injection='query_all', state_init='none'),
    'train_flt_res': FLT | dict(input_injection='residual_all', state_init='none'),
    'train_lt': FLT | dict(input_injection='passthrough', state_init='prelude'),
    'train_lt_i': FLT | dict(input_injection='add', state_init='zero', norm_emb=False),
    'train_lt_ia': FLT | dict(input_injection='query_first', state_init='none'),
    'train_looped_nanochat': dict(
        size=20, n_embd=1280, n_head=10, n_prelude=2, n_block=4, n_coda=2, n_loop=4, bptt_k=4,
        input_injection='inject', norm='rmsnorm', norm_eps=None, norm_place='around', norm_emb=True,
        norm_loop=True, norm_final=True, pos='rope', rope_base=10000.0, qk_norm=True, mlp='relu2',
        tie_weights=False, softcap=15.0, window_pattern='LLSSSLLL', block_size=2048, init='nanochat',
        loop_sampling='poisson', loop_max=16, optimizer='muon', matrix_lr=0.02, embedding_lr=0.3,
        head_lr=0.004, learning_rate=0.005, lr_width=768, beta1=0.8, beta2=0.95, adam_eps=1e-10,
        grad_clip=0.0, warmup_iters=0, lr_schedule='linear', warmdown_frac=0.4, min_lr=0.0, max_iters=7666),
    'train_huginn_style': dict(
        n_prelude=2, n_block=4, n_coda=2, n_loop=32, bptt_k=8, input_injection='inject', state_init='random',
        state_std=0.6325, norm='rmsnorm', norm_eps=None, norm_place='around', norm_emb=False, norm_loop=True,
        norm_final=True, pos='rope', rope_base=50000.0, qk_norm=False, mlp='swiglu', tie_weights=True,
        emb_scale=768**0.5, init='huginn', loop_sampling='poisson', warmup_iters=4096, decay_lr=False),
    'train_ouro_1_4b': LARGE | dict(n_block=24),
    'train_ouro_2_6b': LARGE | dict(n_block=48),
    'train_ouro_small': OURO | dict(n_block=6, n_embd=768, n_head=12, n_hidden=2048, norm_loop=False,
                                    norm_final=True, tie_weights=True, block_size=2048),
    'ouro_stage1a': STAGE | dict(n_loop=8, beta=0.1, rope_base=1e4, block_size=4096, min_lr=6e-5),
    'ouro_stage1b': STAGE | dict(n_loop=4, beta=0.05, rope_base=1e4, block_size=4096),
    'ouro_stage2': STAGE | dict(n_loop=4, beta=0.05, rope_base=4e4, block_size=16384, decay_lr=True,
                                lr_schedule='cosine', min_lr=3e-5),
    'ouro_gate': LARGE | dict(n_block=24, objective='gate', learning_rate=3e-5, max_iters=10000),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_constants_are_the_published_ones(name):
    files = (
        [f'config/{name}.py']
        if name.startswith('train')
        else ['config/train_ouro_1_4b.py', f'config/{name}.py']
    )
    c = configure((TrainConfig, GPTConfig), files, say=None)
    c.build(GPTConfig)
    assert {key: c[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize(
    'name, tokens', [('ouro_stage1a', 3e12), ('ouro_stage1b', 3e12), ('ouro_stage2', 1.4e12)]
)
def test_ouros_stages_see_their_tokens(name, tokens):
    files = ['config/train_ouro_1_4b.py', f'config/{name}.py']
    c = configure((TrainConfig, GPTConfig), files, say=None)
    step = c.gradient_accumulation_steps * c.batch_size * c.block_size
    assert step == 2**23 and step * c.max_iters == pytest.approx(tokens, rel=1e-5)
