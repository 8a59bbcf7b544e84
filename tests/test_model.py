import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import EQUATIONS, TABLES, by_hand, randomize
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from model import (
    GPT,
    INIT,
    INJECT,
    MLP_ACT,
    NORM,
    NORM_PLACE,
    POS,
    STATE,
    UPDATE,
    Act,
    Gate,
    Gated,
    GPTConfig,
    Injection,
    LoopPart,
    NormPlace,
    hash_ngrams,
)
from nanoloop.checkpoint import load_checkpoint
from nanoloop.count import flops, parameters, sections
from nanoloop.generate import Sampler, generate, stream, tokens_in_view
from nanoloop.objective import TrainingLoss
from nanoloop.optimizer import OPTIMIZER, make_optimizers
from train import TrainConfig

SIZES = dict(block_size=16, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=3)
PAIRS = [(injection, state) for injection in INJECT for state in INJECT[injection].states]
PLAIN = dict(input_injection='passthrough', n_prelude=0, n_block=3, n_coda=0, n_loop=1, norm_loop=False)


def make(double=False, **keys):
    model = randomize(GPT(GPTConfig(**SIZES | keys)))
    return (model.double() if double else model).eval()


def tokens(B=3, T=16, seed=0):
    ids = torch.randint(23, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def check_optimized(model):
    """Every parameter is in exactly one group."""
    for optimizer in OPTIMIZER:
        optimizers, _ = make_optimizers(model, TrainConfig(optimizer=optimizer))
        held = [p for o in optimizers for group in o.param_groups for p in group['params']]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


KINDS = [dict(norm=norm, pos=pos, mlp=mlp) for norm, pos, mlp in itertools.product(NORM, POS, MLP_ACT)]
OPTIONS = dict(update_alpha=0.7, state_std=0.5, rope_base=500.0)  # for the entries that read them


def options(**entries):
    """Values for the options of table entries, {name of the entry: its options}."""
    return {key: OPTIONS[key] for entry in entries.values() for key in entry.options}


@pytest.mark.parametrize('place', NORM_PLACE)
@pytest.mark.parametrize('injection, state', PAIRS)
def test_logits_equal_the_equations_written_out(injection, state, place):
    first = PAIRS.index((injection, state)) + 5 * list(NORM_PLACE).index(place)
    rich = dict(norm_emb=True, qk_norm=True, n_kv_head=1, tie_weights=False, softcap=3.0)
    rich.update(n_gram=3, n_gram_rows=64)
    plain = dict(
        norm_loop=False, norm_final=False, bias=True, window_pattern='LSS', window_size=5, emb_scale=2.5
    )
    plain.update(res_scale=0.6)
    for i in range(2):
        kind, update = KINDS[(first + 7 * i) % len(KINDS)], list(UPDATE)[(first + i) % len(UPDATE)]
        keys = dict(
            input_injection=injection, state_init=state, norm_place=place, state_update=update, **kind
        )
        keys.update(options(update=UPDATE[update], state=STATE[state], pos=POS[kind['pos']]))
        model = make(double=True, **keys, **(rich, plain)[i % 2])
        for n_loop in (1, 3):
            logits, _ = model(*tokens(), n_loop=n_loop)
            expected = by_hand(model.state_dict(), model.config, tokens()[0], n_loop)
            assert torch.allclose(logits, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('place', NORM_PLACE)
@pytest.mark.parametrize('injection, state', PAIRS)
def test_every_accepted_combination_works(injection, state, place):
    """Every parameter is initialised, optimised and gets a gradient, and no position sees a later one."""
    first = (PAIRS.index((injection, state)) + list(NORM_PLACE).index(place)) % 6
    for i, (pos, mlp) in list(enumerate(itertools.product(POS, MLP_ACT)))[first::6]:
        keys = dict(
            input_injection=injection, state_init=state, norm_place=place, pos=pos, mlp=mlp, bias=True
        )
        keys.update(n_gram=3, n_gram_rows=4)  # so few that all rows occur
        keys.update(norm=list(NORM)[i % len(NORM)], init=list(INIT)[i % len(INIT)], tie_weights=False)
        keys.update(state_update=list(UPDATE)[i % len(UPDATE)])
        model = GPT(GPTConfig(**SIZES | keys))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        model.init_weights()
        assert all(p.isfinite().all() for p in model.parameters())
        check_optimized(model)
        randomize(model).eval()
        seen = []
        keep = lambda _, __, x, seen=seen: seen.append(x.retain_grad() or x)  # noqa: E731
        hook = model.transformer.wte.register_forward_hook(keep)
        idx, targets = tokens(B=1)
        model(idx, torch.where(torch.arange(16) == 9, targets, -1))[1].backward()
        per_position = seen[0].grad[0].abs().sum(-1)
        assert (per_position[:10] > 0).all() and (per_position[10:] == 0).all(), keys
        hook.remove()
        TrainingLoss(model, TrainConfig())(*tokens(), n_loop=3)[0].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), keys


def test_pairs_of_characters_have_rows_of_their_own_and_runs_end_where_the_text_begins():
    ids = torch.arange(65)
    rows = hash_ngrams(ids[:, None], [ids[None]], 16384)[0]  # of all 65^2 pairs
    assert len(rows.unique()) == 65**2 and 0 <= rows.min() and rows.max() < 16384
    model = make(n_gram=3)
    texts = torch.tensor([[5, 7, 1, 2, 3], [7, 7, 1, 2, 3], [5, 8, 1, 2, 3], [0, 0, 1, 2, 3]])
    x = model.embed(texts, torch.arange(5))  # (4, 5, C)
    for other in (1, 2, 3):
        differs = (x[0] != x[other]).any(-1).tolist()
        assert differs == [texts[0, 0] != texts[other, 0], True, True, other != 1, False], other
    assert not torch.equal(x[3, 1], model.embed(texts[3:, 1:], torch.arange(4))[0, 0])  # 0 is not no token


def test_long_contexts_take_the_kernel_and_agree():
    model = make(double=True, block_size=300)
    idx = torch.randint(23, (1, 300), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(idx, idx)[0], by_hand(model.state_dict(), model.config, idx), atol=1e-10)


def gpt2(vocab=40, act='gelu_new'):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=vocab, n_positions=16, n_embd=12, n_layer=3, n_head=2)
    config.activation_function, config._attn_implementation = act, 'eager'
    return randomize(transformers.GPT2LMHeadModel(config)).eval()


def nanogpt_weights(theirs):
    """nanoGPT's names for weights of transformers' GPT-2: Conv1D matrices are stored the other way round."""
    weights = {}
    for name, w in theirs.state_dict().items():
        turned = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        weights['_orig_mod.' + name] = w.T.contiguous() if turned else w
    return weights


def test_the_gpt2_recipe_is_gpt2():
    theirs = gpt2()
    keys = dict(PLAIN, norm='layernorm', bias=True, mlp='gelu_tanh', vocab_size=40)
    model = GPT(GPTConfig(**SIZES | keys)).eval()
    weights = nanogpt_weights(theirs).items()
    weights = {name.removeprefix('_orig_mod.').replace('.h.', '.recur.'): w for name, w in weights}
    model.load_state_dict(weights)
    idx = torch.randint(40, (2, 16))
    assert torch.allclose(model(idx, idx)[0], theirs(idx).logits, atol=1e-5)
    theirs, model = theirs.double(), model.double()
    assert torch.allclose(model(idx, idx)[0], theirs(idx).logits, atol=1e-10)


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', '_orig_mod.module.', 'module._orig_mod.'])
@pytest.mark.parametrize('head', ['tied', 'own', 'not saved'])
def test_a_nanogpt_checkpoint_loads(tmp_path, prefix, head):
    """Also of its forks and its first versions, which had no key bias and wrote torch's old file format."""
    theirs, early = gpt2(act='gelu'), head == 'not saved'
    weights = {name.removeprefix('_orig_mod.'): w for name, w in nanogpt_weights(theirs).items()}
    weights['transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)  # the mask of old files
    if head == 'own':
        weights['lm_head.weight'] = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
        theirs.lm_head.weight = torch.nn.Parameter(weights['lm_head.weight'])
    args = dict(n_layer=3, n_head=2, n_embd=12, block_size=16, vocab_size=40)
    if early:
        del weights['lm_head.weight']
    else:
        args.update(bias=True, dropout=0.0)
    weights = {prefix + name: w for name, w in weights.items()}
    saved = dict(model=weights, model_args=args, iter_num=7, best_val_loss=torch.tensor(2.0))
    torch.save(saved, tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=not early)
    model, checkpoint = load_checkpoint(tmp_path / 'ckpt.pt')
    idx = torch.randint(40, (2, 16))
    assert torch.allclose(model(idx, idx)[0], theirs(idx).logits, atol=1e-5)
    assert checkpoint['iter_num'] == 7 and model.config.tie_weights == (head != 'own')


@pytest.mark.parametrize('injection', ['inject', 'inject_random', 'passthrough'])
def test_a_nanoloop_checkpoint_loads(tmp_path, injection):
    eps = torch.finfo(torch.float32).eps
    model = make(input_injection=injection, norm_eps=eps)
    names = 'n_prelude n_block n_coda n_loop n_head n_embd block_size bias vocab_size dropout bptt_k'.split()
    args = {name: getattr(model.config, name) for name in names} | dict(input_injection=injection)
    torch.save(dict(model=model.state_dict(), model_args=args), tmp_path / 'ckpt.pt')
    loaded, _ = load_checkpoint(tmp_path / 'ckpt.pt')
    assert loaded.config == model.config
    double = {name: w.double() for name, w in model.state_dict().items()}
    expected = by_hand(double, model.config, tokens()[0]).float()
    assert torch.allclose(loaded.eval()(*tokens())[0], expected, atol=1e-4)


def test_a_checkpoint_refuses_what_changes_its_meaning(tmp_path):
    model = make()
    torch.save(dict(model=model.state_dict(), model_args=vars(model.config)), tmp_path / 'a.pt')
    assert load_checkpoint(tmp_path / 'a.pt', n_loop=7)[0].config.n_loop == 7
    with pytest.raises(ValueError, match='n_head=3, expected 2 as in the checkpoint'):
        load_checkpoint(tmp_path / 'a.pt', n_head=3)
    other = dict(mlp='gelu_tanh', qk_norm=True, norm_eps=1e-4, norm='layernorm', pos='rope', norm_loop=False)
    for key, value in other.items():
        with pytest.raises(ValueError, match=f'{key}=.* as in the checkpoint'):
            load_checkpoint(tmp_path / 'a.pt', **{key: value})
    gated = GPT(GPTConfig(**SIZES, exit_gate=True))
    with pytest.raises(ValueError, match='exit_gate=False, expected True as in the checkpoint'):
        load_checkpoint(dict(model=gated.state_dict(), model_args=vars(gated.config)), exit_gate=False)
    torch.save([1, 2], tmp_path / 'list.pt')
    with pytest.raises(ValueError, match='expected a file with model and model_args'):
        load_checkpoint(tmp_path / 'list.pt')
    with pytest.raises(ValueError, match='vocab_size=24, expected 23'):
        load_checkpoint(tmp_path / 'a.pt', vocab_size=24)
    with pytest.raises(
        ValueError, match='block_size=32, expected at most 16: the checkpoint has no more pos'
    ):
        load_checkpoint(tmp_path / 'a.pt', block_size=32)
    with pytest.raises(ValueError, match='does not fit: it lacks .*ln_f'):
        weights = {name: w for name, w in model.state_dict().items() if 'ln_f' not in name}
        load_checkpoint(dict(model=weights, model_args=vars(model.config)))


def test_a_shorter_context_keeps_the_first_positions():
    model = make(double=True, window_pattern='LS')
    saved = dict(model=model.state_dict(), model_args=vars(model.config))
    shorter, _ = load_checkpoint(saved, block_size=8)
    assert load_checkpoint(saved, block_size=2)[0].config.window_size == 2  # all that is left
    idx = tokens()[0][:, :8]
    assert torch.allclose(shorter.double().eval()(idx, idx)[0], model(idx, idx)[0], atol=1e-10)


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    torch.save(dict(model=Evil(), model_args={}), tmp_path / 'evil.pt')
    with pytest.raises(ValueError, match='broken'):
        load_checkpoint(tmp_path / 'evil.pt')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('state', INJECT['inject'].states)
@pytest.mark.parametrize('bptt_k', [1, 2, 3, None])
def test_gradient_stops_before_the_last_bptt_k_loops(bptt_k, state):
    model = make(double=True, bptt_k=bptt_k, state_init=state)
    idx, targets = tokens()
    model(idx, targets)[1].backward()
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    logits = by_hand(weights, model.config, idx, cut=3 - (bptt_k or 3) or None)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, weights[name].grad, atol=1e-10), name


def test_bptt_under_autocast_keeps_the_gradient_of_shared_weights():
    idx, targets = tokens()
    model = make(bptt_k=1)
    model(idx, targets)[1].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        loss = model(idx, targets)[1]
    loss.backward()
    for name, p in model.named_parameters():
        assert F.cosine_similarity(p.grad.flatten(), expected[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize('injection, state', PAIRS)
def test_the_stream_stays_in_float32_under_autocast(injection, state):
    model, kinds = make(input_injection=injection, state_init=state, norm_place='branch'), []
    norms = (module for module in model.modules() if isinstance(module, torch.nn.RMSNorm))
    for module in (*model.blocks(), *norms):
        module.register_forward_pre_hook(lambda _, args: kinds.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(*tokens())
    assert set(kinds) == {torch.float32}


def test_initialisation_is_scaled_by_the_executed_depth_and_injects_the_input():
    model = GPT(GPTConfig(**SIZES | dict(n_embd=128, n_head=2, n_loop=30)))
    std = model.transformer.recur[0].mlp.c_proj.weight.std().item()
    assert std == pytest.approx(0.02 / math.sqrt(2 * (1 + 2 * 30 + 1)), rel=0.05)
    e, s = torch.randn(2, 1, 3, 128)
    assert torch.equal(model.inject(e, s, 0), e)
    for p in (model.transformer.wte.weight, model.transformer.recur[1].attn.c_attn.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.1)


def test_dropout_acts_everywhere_in_training_and_nowhere_else(monkeypatch):
    shares, calls, real, dropout = [], [], F.scaled_dot_product_attention, F.dropout

    def attention(q, k, v, *args, dropout_p, **options):
        shares.append(dropout_p)
        return real(q, k, v, *args, dropout_p=dropout_p, **options)

    def drop(x, p, training=True, *args):
        calls.append(p * training)
        return dropout(x, p, training, *args)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    monkeypatch.setattr(F, 'dropout', drop)  # of the embedding
    monkeypatch.setattr(torch, 'dropout', drop)  # of the blocks
    model = make(dropout=0.3, n_loop=2)
    layers = model.config.depth
    expected = make(n_loop=2)(*tokens())[0]
    shares.clear()
    assert torch.equal(model(*tokens())[0], expected) and shares == [0.0] * layers and not any(calls)
    calls.clear()
    shares.clear()
    model.train()(*tokens())
    assert shares == [0.3] * layers and calls == [0.3] * (1 + 2 * layers)
    model = make(dropout=0.5, norm_emb=True)
    kept, dropped = (model.train(on).embed(tokens()[0], torch.arange(16)) for on in (False, True))
    assert torch.allclose(dropped[dropped != 0], 2 * kept[dropped != 0])  # after the norm


def test_bfloat16_weights_give_float32_losses_also_at_long_contexts():
    model = make(block_size=300, pos='rope', qk_norm=True, exit_gate=True).bfloat16()
    idx = torch.randint(23, (1, 300), generator=torch.Generator().manual_seed(0))
    ce, _ = model.loss_table(idx, idx)
    assert ce.dtype == model(idx, idx)[1].dtype == torch.float32 and ce.isfinite().all()
    assert len(ce.unique()) > 250  # bfloat16 has few values
    (s,), _ = model.loop_states(idx)
    assert s.dtype == torch.bfloat16 and model.exit_probability(s).dtype == torch.float32


@pytest.mark.parametrize('rows', [(-1,), (0, 1, 2), (2, 0)])
def test_the_table_holds_each_loops_cross_entropy(rows):
    model = make(double=True)
    idx, targets = tokens()
    targets[0, 3:7] = -1
    ce, gates = model.loss_table(idx, targets, loops=rows)
    assert ce.shape == (len(rows), 3, 16) and gates is None and (ce[:, 0, 3:7] == 0).all()
    for row, values in zip(rows, ce, strict=True):
        _, loss = model(idx, targets, n_loop=row % 3 + 1)
        assert torch.allclose(values.sum() / (targets != -1).sum(), loss, atol=1e-12)


def test_reading_out_in_chunks_changes_neither_loss_nor_gradient(monkeypatch):
    results = []
    for chunk in (model_file.HEAD_CHUNK, 23 * 5, 1):  # at least a token, however large the vocabulary
        monkeypatch.setattr(model_file, 'HEAD_CHUNK', chunk)
        model = make(double=True)
        ce, _ = model.loss_table(*tokens(), loops=(0, 2))
        (ce * torch.linspace(0, 1, ce.numel(), dtype=ce.dtype).view_as(ce)).sum().backward()
        results.append([ce, *(p.grad for p in model.parameters())])
    for others in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(results[0], others, strict=True))


def test_chunks_keep_the_heads_gradient_exact_under_autocast(monkeypatch):
    from nanoloop.machine import autocast

    def head_gradient(chunk, dtype):
        monkeypatch.setattr(model_file, 'HEAD_CHUNK', chunk)
        model = make(vocab_size=64, n_embd=64)
        x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1), dtype=dtype)
        y = torch.randint(64, (512,), generator=torch.Generator().manual_seed(2))
        model = model.to(dtype)
        model.loop_states = lambda *_: ([x.view(2, 256, 64)], None)
        model.run_coda = lambda s, attn_inputs: s
        with autocast('cpu', torch.bfloat16 if dtype == torch.float32 else torch.float32):
            model.loss_table(y.view(2, 256), y.view(2, 256))[0].mean().backward()
        return model.lm_head.weight.grad.double()

    exact = head_gradient(2**25, torch.float64)
    whole, chunked = (head_gradient(chunk, torch.float32) for chunk in (2**25, 64 * 2))
    assert (chunked - exact).norm() < 1.5 * (whole - exact).norm()


def test_without_targets_only_the_last_position_is_read_out():
    model = make()
    idx, targets = tokens()
    logits, loss = model(idx)
    assert loss is None and torch.allclose(logits, model(idx, targets)[0][:, -1:], atol=1e-6)


def test_noise_depends_on_the_position_alone():
    """Not on block_size, default dtype or device; a model made without memory gets it with its weights."""
    keys = dict(SIZES, state_init='random', n_embd=20)
    noise = GPT(GPTConfig(**keys)).start.noise
    assert torch.equal(GPT(GPTConfig(**keys | dict(block_size=5))).start.noise, noise[:5])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(GPT(GPTConfig(**keys)).start.noise, noise.double())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device('meta'):
        model = GPT(GPTConfig(**keys))
    assert model.start.noise.device.type == 'meta'
    model.to_empty(device='cpu').init_weights()
    assert torch.equal(model.start.noise, noise)


def test_several_rows_in_chunks_read_out_twice_not_more(monkeypatch):
    """Once forward, once again in the backward pass."""
    monkeypatch.setattr(model_file, 'HEAD_CHUNK', 23 * 12)
    model, chunks, codas = make(n_coda=1), [], []
    model.lm_head.register_forward_hook(lambda module, args, logits: chunks.append(len(logits)))
    model.transformer.coda[0].register_forward_hook(lambda module, args, x: codas.append(len(x)))
    ce, _ = model.loss_table(*tokens(), loops=(0, 2))
    ce.sum().backward()
    assert sum(chunks) == 2 * 2 * 48 and max(chunks) == 12 and len(codas) == 2 * 2


def test_noise_is_fresh_in_training_and_fixed_in_evaluation():
    model = make(state_init='random', state_std=0.5)
    assert model.state_dict().keys() == make().state_dict().keys()
    idx, targets = tokens()
    assert torch.equal(model(idx, targets)[0], model(idx, targets)[0])
    assert torch.allclose(model(idx[1:2], targets[1:2])[0], model(idx, targets)[0][1:2], atol=1e-5)
    model.train()
    torch.manual_seed(1)
    first, other = model(idx, targets)[0], model(idx, targets)[0]
    torch.manual_seed(1)
    assert not torch.equal(first, other) and torch.equal(first, model(idx, targets)[0])
    assert model.start(torch.zeros(64, 16, 12), None).std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize('bptt_k', [None, 2])
@pytest.mark.parametrize('keys', [dict(), dict(pos='rope', n_loop=6), PLAIN])
def test_flops_equal_torchs_counter(keys, bptt_k):
    config = GPTConfig(**SIZES | keys | (dict(bptt_k=bptt_k) if keys is not PLAIN else {}))
    with torch.device('meta'):
        model = GPT(config)
        idx = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        loss = model(idx, idx)[1]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    ours = [kinds['matmul'] + kinds['attention'] for kinds in flops(model).values()]
    assert tuple(32 * n for n in ours) == counted
    assert flops(model, 7) == flops(GPT(GPTConfig(**vars(config) | dict(n_loop=7))))


def test_generate_is_greedy_at_temperature_zero_and_within_top_k_and_top_p():
    model = make()
    idx, _ = tokens(B=2, T=5)
    model.transformer.recur[0].register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    graphs = []
    generate(model, idx, 1)
    assert graphs == [False] * 3
    greedy = generate(model, idx, 20, temperature=0, n_loop=2)  # past block_size as well
    for t in range(5, 25):
        logits = model(greedy[:, t - tokens_in_view(t, 16) : t], n_loop=2)[0][:, -1]
        assert torch.equal(logits.argmax(-1), greedy[:, t])
    assert torch.equal(generate(model, idx, 20, top_k=1, n_loop=2), greedy)
    assert torch.equal(generate(model, idx, 20, top_p=1e-6, n_loop=2), greedy)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    generator, model.logits = torch.Generator().manual_seed(0), lambda x: x

    def draws(x, **options):
        sampler = Sampler(model, generator=generator, **options)
        return sampler.draw(sampler.probabilities(x))

    drawn = draws(logits, top_p=0.7)
    assert drawn.unique().tolist() == [0, 1]
    assert (drawn == 0).float().mean().item() == pytest.approx(0.625, abs=0.03)
    assert draws(logits, top_k=3).max() == 2
    share = (draws(logits, temperature=0.5) == 0).float().mean().item()
    assert share == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)


def count_graphs(n_loops, backend):
    """Graphs that dynamo makes for training and evaluating with each of n_loops."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = GPT(GPTConfig(**SIZES | dict(bptt_k=2, n_loop=max(n_loops), dropout=0.1)))
    for block in model.blocks():
        block.compile(backend=count if backend is None else backend)
    for n_loop in n_loops:
        model.train().loss_table(*tokens(), n_loop=n_loop)[0].mean().backward()
        with torch.no_grad():
            model.eval().loss_table(*tokens(), n_loop=n_loop)
    return len(graphs)


def test_the_number_of_compiled_graphs_does_not_grow_with_loops():
    assert count_graphs([3], None) == count_graphs([3, 4, 5, 8, 16], None) <= 4


def test_compiled_equals_eager():
    losses = []
    for compiled in (False, True):
        model = make(bptt_k=2, pos='rope', qk_norm=True)
        if compiled:
            for block in model.blocks():
                block.compile()
        loss = model(*tokens())[1]
        loss.backward()
        losses.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize(
    'keys, told',
    [
        (dict(input_injection='injct'), "input_injection='injct', expected one of passthrough, inject"),
        (dict(norm='rms'), "norm='rms', expected one of layernorm, rmsnorm"),
        (dict(n_embd=10, n_head=3), 'n_head=3, expected a divisor of n_embd=10'),
        (dict(n_embd=6, n_head=2, pos='rope'), 'expected learned'),
        (dict(bptt_k=0), 'bptt_k=0, expected at least 1'),
        (dict(n_loop=0), 'n_loop=0, expected at least 1'),
        (dict(n_coda=-1), 'n_coda=-1, expected at least 0'),
        (dict(dropout=1.0), 'dropout=1.0, expected at least 0 and below 1'),
        (dict(input_injection='passthrough', bptt_k=2), 'the prelude would get no gradient'),
        (dict(input_injection='passthrough', state_init='zero'), "state_init='zero', expected prelude with"),
        (dict(state_std=0.5), "state_std=0.5, expected None with state_init='prelude'"),
        (dict(rope_base=500.0), "rope_base=500.0, expected 10000.0 with pos='learned'"),
        (dict(norm_eps=0.0), 'norm_eps=0.0, expected above 0'),
        *[
            (dict(keys, **{key: math.inf}), f'{key}=inf, expected')
            for key, keys in dict(
                n_embd={},
                size={},
                softcap={},
                emb_scale={},
                rope_base=dict(pos='rope'),
                norm_eps={},
                state_std=dict(state_init='random'),
            ).items()
        ],
        (dict(norm_emb=True, emb_scale=2.0, pos='rope'), 'emb_scale=2.0, expected 1 with norm_emb'),
        (dict(n_gram_rows=8), 'n_gram_rows=8, expected 16384 with n_gram=1'),
        (dict(n_gram=2, n_gram_rows=12), 'n_gram_rows=12, expected a power of two'),
        (dict(n_gram=17, block_size=16), 'n_gram=17, expected at most block_size=16'),
        (dict(dropout=-0.1), 'dropout=-0.1, expected at least 0'),
        (dict(vocab_size=0), 'vocab_size=0, expected at least 1'),
        (
            dict(input_injection='inject_random', state_init='none'),
            "state_init='none', expected no value with input_injection=inject_random",
        ),
        (dict(bias='no'), "bias='no', expected True or False"),
        (dict(n_loop='4'), "n_loop='4', expected int"),
        (dict(n_loop=True), 'n_loop=True, expected int'),
        (dict(bptt_k=2.5), 'bptt_k=2.5, expected int or None'),
        (dict(bptt_k=math.inf), 'bptt_k=inf, expected int or None'),
    ],
)
def test_a_config_refuses_what_has_no_meaning(keys, told):
    with pytest.raises(ValueError) as error:
        GPTConfig(**keys)
    assert told in str(error.value)


def test_the_states_that_go_with_an_injection():
    """The pairs of the README's table."""
    accepted = dict(
        passthrough='prelude',
        inject='prelude random zero',
        gated='prelude random zero',
        add='prelude random zero none',
    )
    accepted |= dict.fromkeys(('query_first', 'query_all'), 'none prelude random')
    accepted |= dict(residual_all='prelude random zero none')
    for injection, states in accepted.items():
        assert sorted(INJECT[injection].states) == sorted(states.split()), injection
    assert not hasattr(make(state_init='prelude').start, 'noise')


def test_numbers_of_other_kinds_become_those_of_the_field():
    config = GPTConfig(n_loop=np.int64(3), n_head=2.0, n_embd=8, emb_scale=np.float32(2), dropout=0)
    assert (config.n_loop, config.n_head, config.emb_scale) == (3, 2, 2.0)
    assert [type(value) for value in (config.n_loop, config.n_head, config.dropout)] == [int, int, float]


class Half(Injection):
    """Parameters of every kind: a matrix in a Linear, a table, a vector, a number."""

    groups, reads_loop = {'mix.weight': 'injection'}, True

    def __init__(self, config):
        super().__init__(config)
        self.mix = torch.nn.Linear(config.n_embd, config.n_embd, bias=False)
        torch.nn.init.constant_(self.mix.weight, 0.25)
        self.index = torch.nn.Parameter(torch.zeros(config.n_loop, config.n_embd))
        self.vector = torch.nn.Parameter(torch.full((config.n_embd,), 0.125))
        self.number = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, e, s, i):
        index = self.index[min(i, len(self.index) - 1)]
        return self.number * (e + self.mix(s)).to(e.dtype) + self.vector * s + index


class Attracted(Injection):
    """The first block of a loop without parameters takes its queries from the state."""

    states, hooked_blocks = ('none', 'zero'), 1

    def forward(self, e, s, i):
        return e

    def block_hook(self, x, state):
        return x - state, x


class DyT(torch.nn.Module):
    """Dynamic tanh, whose alpha starts at a half. Source: arXiv:2503.10622."""

    def __init__(self, config):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.full((1,), 0.5))
        self.weight = torch.nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x):
        return self.weight * torch.tanh(self.alpha * x)


class Leak(LoopPart):
    """A state update with a number of its own."""

    reads_loop = True

    def __init__(self, config):
        super().__init__(config)
        self.leak = torch.nn.Parameter(torch.tensor(0.75))

    def forward(self, s, y, i):
        return self.leak * y + s / (i + 2)


START = {'mix': 0.25, 'index': 0.0, 'vector': 0.125, 'number': 0.5, 'alpha': 0.5, 'leak': 0.75}


@pytest.mark.parametrize(
    'key, entry, keys',
    [
        ('input_injection', Half, {}),
        ('input_injection', Half, dict(init='huginn')),
        ('input_injection', Attracted, dict(state_init='none')),
        ('mlp', Act(torch.sin, 1, lambda C: 3 * C), dict(init='huginn')),
        ('norm', DyT, {}),
        ('norm', DyT, dict(init='nanochat', tie_weights=False)),
        ('norm_place', NormPlace(True, True, True), {}),
        ('state_update', Leak, dict(bptt_k=2)),
    ],
)
def test_a_variant_is_an_entry_of_a_table(key, entry, keys, monkeypatch):
    """It starts as its author wrote, trains in the groups that it names, is counted and cached."""
    monkeypatch.setitem(TABLES[key], 'new', entry)
    model = GPT(GPTConfig(**SIZES | {key: 'new'} | keys))
    for _ in range(2):
        for name, p in model.named_parameters():
            part = next((part for part in name.split('.') if part in START), None)
            assert part is None or (p == START[part]).all(), name
        model.to_empty(device='cpu').init_weights()
    optimizers, _ = make_optimizers(model, TrainConfig(optimizer='muon'))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizers[0].param_groups for p in group['params']}
    inside = {name for name in names.values() if name.startswith(('inject.', 'update.'))}
    assert by_muon & inside == ({'inject.mix.weight'} if entry is Half else by_muon & {'inject.weight'})
    randomize(model).train()
    TrainingLoss(model, TrainConfig())(*tokens(), n_loop=3)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    check_optimized(model)
    assert sum(parameters(model)[part] for part in sections(model)) == model.get_num_params()
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to('meta')(*(x.to('meta') for x in tokens(B=1)))
    counted = flops(model)['forward']
    assert counter.get_total_flops() == 16 * sum(counted[kind] for kind in ('matmul', 'attention'))
    if entry is DyT:  # two norms in each of four blocks, one of them three times
        assert counted['norm'] == 2 * 2 * (12 + 1) * (1 + 3 * 2 + 1)
    idx = tokens()[0][:, :6]
    for token in stream(model.double().eval(), idx, 9, temperature=0):
        assert torch.equal(token, model(idx)[0][:, -1].argmax(dim=-1))
        idx = torch.cat((idx, token[:, None]), dim=1)


@pytest.mark.parametrize(
    'table, base, members, told',
    [
        (
            'input_injection',
            Injection,
            dict(forward=lambda self, e, s, i: e[:, :1]),
            r'New.forward with loop 0: .*1, 1, 12',
        ),
        (
            'input_injection',
            Injection,
            dict(forward=lambda self, e, s, i: None),
            'New.forward with loop 0: .*None',
        ),
        ('input_injection', Injection, dict(forward=lambda self, e, s, i: e.double()), 'dtype torch.float32'),
        (
            'state_update',
            LoopPart,
            dict(forward=lambda self, s, y, i: [s, s][i]),
            'New.forward with loop 3: IndexE',
        ),
        (
            'input_injection',
            Injection,
            dict(forward=lambda self, e, s, i: e + (i + 1) * s),
            'New.forward without reads_loop: .*2, 1, 2, 12',
        ),
        (
            'input_injection',
            Injection,
            dict(forward=lambda self, e, s, i: e if i == 0 else s),
            'New.forward without reads_loop: RuntimeError',
        ),
        ('state_update', LoopPart, {}, 'New.forward with loop 0: NotImplementedError'),
        ('state_init', LoopPart, dict(forward=lambda self, e, pos: e[0]), 'New.forward: '),
        ('state_update', Gate, dict(vector=dict(gate=-1.0)), 'New.vector has no meaning, see LoopPart'),
        ('input_injection', Gated, dict(state=('zero',)), 'New.state has no meaning, see Injection'),
        ('input_injection', Gated, dict(states='prelude'), "New.states='prelude' is a text"),
        (
            'state_update',
            Gate,
            dict(options=('alpah',)),
            'options of an entry of state_update: there is no key alpah',
        ),
    ],
)
def test_mistakes_of_a_parts_author_end_the_construction(table, base, members, told, monkeypatch):
    monkeypatch.setitem(TABLES[table], 'new', type('New', (base,), members))
    monkeypatch.setattr(INJECT['inject'], 'states', ('prelude', 'new'))
    key = 'replace' if 'options' in members else 'new'
    with pytest.raises(RuntimeError, match=told):
        GPT(GPTConfig(**SIZES | {table: key}))


def test_a_vector_starts_with_a_whole_number_and_a_part_may_add_to_a_linear_layer(monkeypatch):
    new = type('New', (INJECT['inject'],), dict(vectors=dict(gate=-1)))
    monkeypatch.setitem(INJECT, 'new', new)
    model = GPT(GPTConfig(**SIZES, input_injection='new'))
    assert (model.inject.gate == -1).all() and torch.equal(model.inject.weight[:, :12], torch.eye(12))


def test_a_parameter_that_nothing_claims_ends_the_construction(monkeypatch):
    real = model_file.MLP.__init__
    for part in (torch.nn.Linear(3, 3), torch.nn.Parameter(torch.zeros(3))):

        def init(self, config, part=part, real=real):
            real(self, config)
            self.c_extra = part

        monkeypatch.setattr(model_file.MLP, '__init__', init)
        with pytest.raises(RuntimeError, match=r'no rule says how transformer.prelude.0.mlp\.?(c_extra)'):
            GPT(GPTConfig(**SIZES))


@pytest.mark.parametrize('table', [key for key in TABLES if key != 'init'])
def test_every_entry_has_its_equation_in_the_tests(table):
    """A new entry is compared with an equation of its own: write it into tests/helpers.py."""
    assert set(TABLES[table]) == set(EQUATIONS[table]), f'write the equation of {table} into tests/helpers.py'


def test_a_library_user_is_told_too():
    with pytest.raises(ValueError, match='n_loop=2.5'):
        make()(tokens()[0], n_loop=2.5)
    for row in (3, -4):
        with pytest.raises(ValueError, match=rf'loops=\({row},\), expected indices of n_loop=3'):
            make().loss_table(*tokens(), loops=(row,))
    with pytest.raises(ValueError, match='n_loop=None'):
        GPTConfig(n_loop=None)
    truncated = make(input_injection='passthrough', bptt_k=3)
    assert truncated.train()(*tokens(), n_loop=2)[1] > 0 and truncated.eval()
    assert truncated(*tokens(), n_loop=5)[1] > 0  # to look further than trained is fine
    with pytest.raises(ValueError, match='n_loop=5, expected at most bptt_k=3: the prelude'):
        truncated.train()(*tokens(), n_loop=5)
    with torch.no_grad():
        assert truncated(*tokens(), n_loop=5)[1] > 0
    with pytest.raises(ValueError, match=r'loops=\(\), expected indices'):
        make().loss_table(*tokens(), loops=())
    with pytest.raises(ValueError, match='of another program'):
        load_checkpoint(dict(model={}, model_args=dict(norm='rmsnorm', layers=3)))


def test_a_shorter_context_keeps_the_windows():
    model = make(double=True, pos='rope', window_pattern='LS', block_size=16)
    saved = dict(model=model.state_dict(), model_args=vars(model.config))
    shorter, _ = load_checkpoint(saved, block_size=12)
    idx = tokens(T=12)[0]
    assert torch.allclose(shorter.double().eval()(idx, idx)[0], model(idx, idx)[0], atol=1e-10)


def test_what_may_change_in_a_checkpoint():
    model = make(input_injection='query_all', state_init='none', pos='rope')
    saved = dict(model=model.state_dict(), model_args=vars(model.config))
    changes = dict(state_init='random', state_std=0.5, rope_base=5e4, dropout=0.1, bptt_k=1, n_loop=9)
    changes.update(recompute=True, block_size=32)
    config = load_checkpoint(saved, **changes)[0].config
    assert all(getattr(config, key) == value for key, value in changes.items())


@pytest.mark.parametrize('T', [5, 6, 7, 16])
def test_inputs_shorter_than_the_context(T):
    keys = dict(state_init='random', window_pattern='S', window_size=4)
    model, (idx, _) = make(double=True, **keys), tokens(T=T)
    assert torch.allclose(model(idx, idx)[0], by_hand(model.state_dict(), model.config, idx), atol=1e-10)


def test_default_widths_and_biases_of_the_parts():
    widths = {
        C: GPT(GPTConfig(**SIZES | dict(n_embd=C, mlp='swiglu'))).transformer.recur[0].mlp for C in (24, 48)
    }
    assert [mlp.c_proj.in_features for mlp in widths.values()] == [64, 128]
    for norm in NORM:
        names = [name for name, _ in make(norm=norm).named_parameters()]
        assert not any('bias' in name for name in names)
    model = GPT(GPTConfig(**SIZES | dict(bias=True, mlp='swiglu', init='huginn')))
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith('bias'))


def test_probabilities_are_taken_in_float32_under_autocast():
    model = make(exit_gate=True, softcap=5.0, n_embd=64)
    with torch.autocast('cpu', torch.bfloat16):
        (s,), context = model.loop_states(tokens()[0])
        gates, logits = model.exit_probability(s), model.logits(model.run_coda(s, context))
    w, b = model.exit_gate.weight[0].double(), model.exit_gate.bias.double()
    assert torch.allclose(gates.double(), (s.double() @ w + b).sigmoid(), atol=1e-6)
    assert gates.dtype == logits.dtype == torch.float32


@pytest.mark.parametrize('T', [16, 300])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_in_a_low_precision_work_at_all_lengths(dtype, T):
    model = make(block_size=300, pos='rope').to(dtype)
    idx = torch.randint(23, (1, T), generator=torch.Generator().manual_seed(0))
    expected = make(block_size=300, pos='rope')(idx, idx)[1]
    assert model(idx, idx)[1].item() == pytest.approx(expected.item(), rel=0.05)


def saved_bytes(rows=(-1,), **keys):
    """Bytes kept for the backward pass of the loss table, weights aside."""
    model, kept = make(vocab_size=200, **keys).train(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    idx = torch.randint(200, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss_table(idx, idx, loops=rows)
    return sum(size for size, _ in kept.values())


def test_memory_neither_grows_with_rows_nor_with_loops_beyond_bptt_k(monkeypatch):
    state = 8 * 16 * 12 * 4
    end, steps = saved_bytes(n_loop=8), saved_bytes(rows=range(8), n_loop=8)
    assert (
        steps < end + 8 * 2 * state
    )  # a row keeps its state, not its logits (17 times as large) or its coda
    assert saved_bytes(n_loop=20, bptt_k=2) == saved_bytes(n_loop=4, bptt_k=2) < 0.6 * end
    assert saved_bytes(n_loop=8, recompute=True) < 0.4 * end
    whole = saved_bytes(n_loop=8)
    monkeypatch.setattr(model_file, 'HEAD_CHUNK', 200 * 10)
    assert saved_bytes(n_loop=8) < whole - 8 * 16 * 200 * 4  # chunks keep no logits


def test_too_long_an_input_and_no_loops_are_refused():
    with pytest.raises(ValueError, match='at most block_size=16 tokens'):
        make()(torch.zeros(1, 17, dtype=torch.long))
    for n in (0, -1):
        with pytest.raises(ValueError, match=f'n_loop={n}, expected'):
            make()(tokens()[0], n_loop=n)


def test_initialisations_are_their_papers():
    keys = dict(SIZES, block_size=128, vocab_size=256, n_embd=128, n_head=2, mlp='swiglu', tie_weights=False)
    wide, std, depth = 128**-0.5, (2 / (5 * 128)) ** 0.5, 1 + 2 * 3 + 1
    low, eye = std / (2 * depth) ** 0.5, (1 / 256) ** 0.5
    normal, uniform, truncated = (3.4, 6.0), (1.7, 1.735), (2.9, 3.05)  # of the largest by the deviation
    expected = dict(
        gpt2=dict(
            dict.fromkeys(('q', 'gate', 'up', 'wte', 'wpe', 'head'), (0.02, normal)),
            down=(0.02 / (2 * depth) ** 0.5, normal),
            inject=(eye, (15, 17)),
        ),
        nanochat=dict(
            dict.fromkeys(('q', 'gate', 'up'), (wide, uniform)),
            down=(0.0, (0, 0)),
            wte=(1.0, normal),
            wpe=(0.02, normal),
            head=(0.001, normal),
            inject=(eye, (15, 17)),
        ),
        huginn=dict(
            dict.fromkeys(('q', 'gate', 'wte', 'wpe', 'head', 'inject'), (std, truncated)),
            down=(low, truncated),
            up=(low, truncated),
        ),
    )
    assert expected.keys() == INIT.keys()
    for init, parts in expected.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**keys, init=init))
        block, wte = model.transformer.recur[0], model.transformer.wte
        gate, up = block.mlp.c_fc.weight.chunk(2)
        found = dict(
            q=block.attn.c_attn.weight, down=block.mlp.c_proj.weight, gate=gate, up=up, wte=wte.weight
        )
        found.update(head=model.lm_head.weight, inject=model.inject.weight, wpe=model.transformer.wpe.weight)
        for name, (std, (least, most)) in parts.items():
            p = found[name]
            assert p.std(correction=0).item() == pytest.approx(std, rel=0.03), (init, name)
            assert least * std <= p.abs().max() <= most * std, (init, name)
            assert abs(p.mean()) <= 0.03 * std or name == 'inject', (init, name)
