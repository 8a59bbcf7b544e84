"""Cached decoding and early exits against whole forward passes and token by token, at every position."""

import collections
import functools
import itertools

import helpers
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.compile_fx
import torch._inductor.config
from decoding import IDX, SIZES, confident, dividing_threshold, expected, gated, make, padded
from functorch.compile import make_boxed_func
from helpers import pairwise
from test_model import PAIRS, options

from model import MLP_ACT, NORM, NORM_PLACE, POS, STATE, UPDATE, Injection, LoopPart, attend
from nanoloop import decode, early_exit, kv_cache, onednn
from nanoloop.bench_decode import decoding_ways
from nanoloop.decode import Decoder, DecodingLinear, Stats, prepare_linears_
from nanoloop.early_exit import EXIT, EarlyExit, ExitInputs, ExitRule
from nanoloop.generate import Generation, generate, stream
from nanoloop.kv_cache import LENGTH_STEP, KVCache
from nanoloop.machine import autocast


def check_decoding(model, lengths, steps, atol=1e-10, n_loop=None):
    """Ragged prompts of IDX, then steps more tokens of it: the logits of every position."""
    total = [n + steps for n in lengths]
    logits = [expected(model, row[:n], n_loop=n_loop).logits for row, n in zip(IDX, total, strict=True)]
    rows = Generation(model, padded(lengths), lengths, max_tokens=max(total), n_loop=n_loop)
    rows.prefill()
    for step in range(steps):
        at = [n + step for n in lengths]
        for i, t in enumerate(at):
            assert torch.allclose(model.logits(rows.head_input)[i], logits[i][t - 1], atol=atol), (i, step)
        rows.append(IDX[range(len(at)), at])


def name(keys):
    return ' '.join(map(str, itertools.chain(*keys.items())))


VARIANTS = pairwise(
    pair=PAIRS, norm_place=NORM_PLACE, norm=NORM, pos=POS, mlp=MLP_ACT, state_update=UPDATE, n_loop=(1, 2, 5),
    res_scale=(1.0, 0.7),
)  # fmt: skip
VARIANTS = [dict(zip(('input_injection', 'state_init'), v.pop('pair'), strict=True), **v) for v in VARIANTS]


@torch.inference_mode()
@pytest.mark.parametrize('pair', PAIRS, ids=str)
def test_cached_decoding_equals_whole_forward_passes(pair):
    """Three rows of unlike lengths, from within block_size to far beyond it. Every two entries meet."""
    chosen = [v for v in VARIANTS if (v['input_injection'], v['state_init']) == pair]
    assert len(chosen) >= 4
    for keys in chosen:
        n_loop, keys = keys['n_loop'], {key: value for key, value in keys.items() if key != 'n_loop'}
        entries = dict(a=STATE[pair[1]], b=UPDATE[keys['state_update']], c=POS[keys['pos']])
        check_decoding(make(**keys, **options(**entries)), [3, 11, 5], 9, n_loop=n_loop)


EXTRAS = [
    dict(),
    dict(n_kv_head=1),
    dict(window_pattern='LS'),
    dict(window_pattern='LS', window_size=12),
    dict(window_pattern='S', window_size=3, n_kv_head=1),
    dict(qk_norm=True, softcap=4.0, norm_emb=True),
    dict(bias=True, block_size=1, n_gram=1, n_gram_rows=16384, emb_scale=2.0),
    dict(n_prelude=0, n_coda=0),
]
LENGTHS = ([9, 9, 9], [2, 12, 14], [13, 30, 1])


@torch.inference_mode()
@pytest.mark.parametrize(
    'case', pairwise(keys=EXTRAS, pos=POS, lengths=LENGTHS, double=(True, False)), ids=name
)
def test_groups_windows_and_long_prompts_in_chunks(case, monkeypatch):
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 5)
    model = make(case['double'], pos=case['pos'], **case['keys'])
    check_decoding(model, case['lengths'], 9, atol=1e-10 if case['double'] else 1e-4)


class Indexed(Injection):
    """An injection that differs from loop to loop."""

    reads_loop = True

    def forward(self, e, s, i):
        return torch.lerp(s, e, 1 / (i + 2))


class IndexedUpdate(LoopPart):
    """A state update that differs from loop to loop."""

    reads_loop = True

    def forward(self, s, y, i):
        return torch.lerp(s, y, 1 / (i + 2))


@torch.inference_mode()
def test_every_loop_knows_its_index(monkeypatch):
    """With a cache, shared caches, exits, and speculation, which goes on from the draft's loops."""
    for key, entry in (('input_injection', Indexed), ('state_update', IndexedUpdate)):
        monkeypatch.setitem(helpers.TABLES[key], 'indexed', entry)
        calls, model = [], make(**{key: 'indexed'})
        (model.inject if entry is Indexed else model.update).register_forward_hook(
            lambda part, args, out, calls=calls: calls.append(args[-1])
        )
        model(IDX[:1, :3], n_loop=3)
        assert calls == [0, 1, 2], key
    keys = dict(input_injection='indexed', state_update='indexed', exit_gate=True)
    check_decoding(make(**keys, n_loop=5), [3, 11, 5], 4)
    check_token_by_token(gated(**keys), budget=2)
    check_token_by_token(gated(**keys), rule='diff', budget=3)
    check_exits(gated(**keys), 'diff')
    model = confident(double=True, **keys)
    plain = generate(model, IDX[:1, :5], 20, temperature=0)
    exit = EarlyExit('diff', 0.0)  # with an exit, all loops share a compiled step if they can
    monkeypatch.setattr(decode, 'compile_step', lambda function, device: function)
    assert torch.equal(plain, generate(model, IDX[:1, :5], 20, temperature=0, early_exit=exit, compile=True))
    for draft_loops in (1, 2, 3):
        drafted = generate(model, IDX[:1, :5], 20, temperature=0, speculate=3, draft_loops=draft_loops)
        assert torch.equal(plain, drafted)


@torch.inference_mode()
@torch._inductor.config.patch({'cpp.vec_isa_ok': True, 'cpp_cache_precompile_headers': False})  # saves 6 s
def test_compiled_steps_are_the_same_steps(monkeypatch):
    """Ragged rows, beyond block_size, in float32."""
    monkeypatch.setattr(kv_cache, 'LENGTH_STEP', 8)
    keys = dict(pos='rope', window_pattern='S', n_kv_head=1, n_prelude=0, n_block=1, n_coda=0)
    model, steps = make(double=False, **keys), 9
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows = [Generation(model, IDX[:, :9], [3, 9, 5], compile=compile) for compile in (True, False)]
    for generation in rows:
        generation.prefill()
    assert not rows[0].decoder.compiled  # a prompt is not compiled
    for token in IDX[:, 9 : 9 + steps].T:
        for generation in rows:
            generation.append(token)
        assert torch.allclose(rows[0].head_input, rows[1].head_input, atol=1e-5)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1  # for all lengths
    assert rows[0].decoder.compiled and not rows[1].decoder.compiled


@torch.inference_mode()
@pytest.mark.parametrize('exit, n_steps', [(None, 1), (EarlyExit('diff', 0.0), 3)])
def test_a_compiled_step_changes_and_copies_nothing_large_that_could_move(exit, n_steps, monkeypatch):
    """Else torch would run it without a CUDA graph, or copy the weights for every token."""
    steps = []

    def inner_compile(graph, inputs, static_input_idxs=(), **options):
        places = [node for node in graph.graph.nodes if node.op == 'placeholder']
        writes = [node for node in graph.graph.nodes if node.target is torch.ops.aten.copy_.default]
        steps.append((inputs, set(static_input_idxs), {places.index(node.args[0]) for node in writes}))
        return make_boxed_func(graph.forward)

    real = torch.compile
    backend = functools.partial(torch._inductor.compile_fx.compile_fx, inner_compile=inner_compile)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: real(function, backend=backend))
    keys = dict(pos='rope', window_pattern='SL', n_kv_head=1, n_prelude=1, n_block=1, n_coda=0, block_size=64)
    model = make(double=False, **keys)
    prepare_linears_(model, torch.bfloat16)
    with autocast('cpu', torch.bfloat16):
        generation = Generation(model, IDX[:, :9], early_exit=exit, compile=True)
        for _ in generation.stream(3):
            pass
    assert len(steps) == n_steps  # with an exit: prelude, a loop for both loops, coda
    n_layers = model.config.depth if exit is None else len(model.blocks())
    assert sum(len(written) for _, _, written in steps) == 2 * n_layers + 1  # keys, values; ids
    for inputs, static, written in steps:
        assert written <= static
        moving = [x for i, x in enumerate(inputs) if torch.is_tensor(x) and i not in static]
        assert max(x.numel() for x in moving) <= len(IDX) * LENGTH_STEP  # a mask
        weights = {p.data_ptr() for p in model.parameters()}
        assert sum(isinstance(inputs[i], torch.Tensor) for i in static) <= len(weights) + len(written) + 1


def test_the_layers_of_compiled_steps_are_tensors_of_their_own_in_one_memory():
    """Of views a step would copy all. Its vector instructions want layers that begin at 16 bytes."""
    cache = KVCache(make(double=False, n_kv_head=1), 1, 20, 2, 1, compiled=True)
    cache.layers[3][0].fill_(1.0)
    assert cache.keys[3].eq(1).all() and cache.keys.sum() == cache.keys[3].numel()
    for x in itertools.chain(*cache.layers):
        assert x.untyped_storage().nbytes() == x.nbytes and x.data_ptr() % 16 == 0


@pytest.mark.parametrize('device, lengths', [('cpu', 32), ('meta', 8)])
def test_a_gpu_gets_few_lengths_of_a_step(device, lengths):
    """Each of them is a CUDA graph; torch warns beyond 8."""
    cache = KVCache(make(double=False, block_size=1024), 1, 1000, 1, 1)
    cache.device = torch.device(device)
    seen = [cache.compiled_length(end) for end in range(1, 1001)]
    assert all(length >= end for end, length in enumerate(seen, start=1)) and seen == sorted(seen)
    assert len({*seen}) == lengths and seen[-1] == 1000


@torch.no_grad()
def test_cast_weights_are_what_autocast_makes_of_them():
    model, low = (make(double=False, pos='rope', exit_gate=True) for _ in range(2))
    prepare_linears_(low, torch.bfloat16)
    assert low.transformer.wte.weight.dtype == low.exit_gate.weight.dtype == torch.float32
    assert low.lm_head.weight.dtype == low.inject.weight.dtype == torch.bfloat16
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tokens = [torch.stack([*stream(m, IDX[:, :5], 12, temperature=0)]) for m in (model, low)]
        assert torch.equal(*tokens) and torch.equal(*(m(IDX[:, :9])[0] for m in (model, low)))


@torch.inference_mode()
@pytest.mark.parametrize(
    'keys', [dict(), dict(bias=True, tie_weights=False), dict(pos='rope', exit_gate=True)]
)
def test_float32_layers_that_only_decode_give_the_same_up_to_rounding(keys, monkeypatch):
    """Against float64: all products but the gate's, from one row to a whole prompt."""
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        pytest.skip('needs x86')
    model, calls = make(double=False, **keys), collections.Counter()
    for function in (decode.onednn_linear, decode.multiply_row):

        def counted(*args, function=function):
            calls[function.__name__] += 1
            return function(*args)

        monkeypatch.setattr(decode, function.__name__, counted)
    prepare_linears_(model, torch.float32)
    assert not any(isinstance(module, DecodingLinear) for module in model.modules())  # too small
    monkeypatch.setattr(onednn, 'ONEDNN_MIN_WEIGHTS', 1)
    for _ in range(2):  # doing it twice is doing it once
        prepare_linears_(model, torch.float32)
    check_decoding(model, [3, 11, 5], 4, atol=1e-4)
    n_layers = 4 * SIZES['n_loop'] * SIZES['n_block'] + SIZES['n_loop'] + 4 * 2 + 1  # blocks, W[e; s], head
    for name, tokens in (('multiply_row', IDX[:1, :1]), ('onednn_linear', IDX[:1, :2])):
        calls.clear()
        logits = model(tokens)[0]
        assert calls[name] >= n_layers - 1 and sum(calls.values()) == n_layers  # the head reads one row
        assert torch.allclose(logits.double(), make(**keys)(tokens)[0], atol=1e-5)
    if keys.get('tie_weights', True):
        assert model.lm_head.weight is model.transformer.wte.weight


@torch.no_grad()
def test_a_compiled_step_has_products_that_inductor_takes():
    """It refuses oneDNN's with weights that are no constants, and would sum over a row by itself."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    layer = DecodingLinear(8, 8)
    for x in (torch.ones(1, 8), torch.ones(3, 8)):
        assert torch.allclose(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    row, rows = graphs
    assert 'nanoloop.multiply_row' in row and 'nanoloop.onednn_linear' in rows
    apart, weight = torch.arange(16.0).view(1, 1, 16)[..., ::2], torch.ones(6, 8)
    assert torch.equal(decode.multiply_row(apart, weight), apart @ weight.T)
    torch.library.opcheck(decode.multiply_row_op, (torch.ones(1, 1, 8), torch.ones(6, 8)))
    torch.library.opcheck(decode.onednn_linear_op, (torch.ones(1, 3, 8), torch.ones(6, 8), torch.ones(6)))


def test_a_single_token_attends_in_float32_on_a_cpu():
    """bfloat16 inputs, one rounding at the end: to the bit. torch's bfloat16 kernel rounds in between."""
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 40, 41))
    q, k, v = q.bfloat16(), k.bfloat16(), v[:, :, 1:].bfloat16()
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    assert torch.equal(attend(q, k, v, None, 0.0), exact)


def test_only_few_tokens_go_without_onednn(monkeypatch):
    """With learned positions half a block is processed anew now and then."""
    seen, model, real = [], confident(pos='learned', block_size=16), Decoder.forward

    def recorded(self, idx, *args):
        seen.append((idx.numel(), torch.backends.mkldnn.enabled))
        return real(self, idx, *args)

    monkeypatch.setattr(Decoder, 'forward', recorded)
    list(stream(model, IDX[:1, :4], 20))
    before = torch.backends.mkldnn.enabled
    assert {(1, False), (9, before), (4, before)} == {*seen}
    for _ in stream(confident(), IDX[:1, :4], 3, speculate=2):
        assert torch.backends.mkldnn.enabled == before


# -----------------------------------------------------------------------------
# early exits: every entry of EXIT is tested


@torch.inference_mode()
@pytest.mark.parametrize('rows, runs', [([0, 2, 3, 6], [2, 2]), ([4, 5], None), ([0, 1, 4], [2, 1])], ids=str)
def test_rows_apart_are_read_in_place(rows, runs, monkeypatch):
    """Each run of evenly spaced rows is a view of the cache. Tokens are those of all rows together."""
    model, seen, real = make(pos='rope', n_kv_head=1), [], kv_cache.attend
    idx = torch.randint(23, (7, 10), generator=torch.Generator().manual_seed(0))
    whole, some = (Decoder(model, 7, 10) for _ in range(2))
    whole.prefill(idx[:, :9]), some.prefill(idx[:, :9])
    monkeypatch.setattr(kv_cache, 'attend', lambda *args: seen.append(args[1]) or real(*args))
    x = some.decode_one_token(idx[rows, 9:], rows)
    assert all(keys.untyped_storage().data_ptr() == some.cache.keys.data_ptr() for keys in seen)
    assert [len(keys) for keys in seen] == (runs or [2]) * model.config.depth
    assert torch.allclose(x, whole.decode_one_token(idx[:, 9:])[rows], atol=1e-12)


@pytest.mark.parametrize(
    'rows, runs',
    [
        ([0], [[0]]),
        ([2, 3, 5], [[2, 3], [5]]),
        ([2, 3, 5, 4, 7, 10], [[2, 3], [5], [4, 7, 10]]),
        ([9, 1, 3, 5, 6], [[9], [1, 3, 5], [6]]),
    ],
)
def test_rows_are_split_into_evenly_spaced_runs(rows, runs):
    found = [[*range(run.start, run.stop, run.step)] for run in kv_cache.even_runs(rows)]
    assert found == runs and sum(found, []) == rows


def test_every_exit_rule_has_an_equation():
    missing = ', '.join(EXIT.keys() - helpers.EXIT.keys())
    assert not missing, f'write the equation of the exit rule {missing} into EXIT of tests/helpers.py'


CASES = {
    'plain': {},
    'queries': dict(n_coda=0, input_injection='query_all', state_init='none', state_update='damp',
                    update_alpha=0.6, res_scale=0.7),
}  # fmt: skip


def check_exits(model, rule):
    """A ragged prompt at once and then token by token, against one token at a time in every row alone."""
    threshold = dividing_threshold(model, rule, IDX[0, :12])
    results = [expected(model, row[:12], rule=rule, threshold=threshold) for row in IDX]
    assert len({n for result in results for n in result.loops}) > 1
    lengths, steps = [4, 8, 6], 4
    rows = Generation(model, padded(lengths), lengths, early_exit=EarlyExit(rule, threshold))
    rows.prefill()
    for i, n in enumerate(lengths):
        assert rows.decoder.loops[i, :n].tolist() == results[i].loops[:n]
    for step in range(steps):
        at = [n + step for n in lengths]
        logits = torch.stack([result.logits[t - 1] for result, t in zip(results, at, strict=True)])
        assert torch.allclose(model.logits(rows.head_input), logits, atol=1e-10)
        rows.append(IDX[range(3), at])
        loops = [result.loops[t] for result, t in zip(results, at, strict=True)]
        assert rows.decoder.loops[:, 0].tolist() == loops
    taken = [loops for result, n in zip(results, lengths, strict=True) for loops in result.loops[: n + steps]]
    assert rows.stats.mean_loops == pytest.approx(sum(taken) / len(taken)) and rows.stats.tokens == len(taken)


def check_token_by_token(model, rule=None, budget=None):
    """Far beyond block_size; one token at a time, as shared caches depend on what is processed at once."""
    threshold = dividing_threshold(model, rule, IDX[0, :20], budget=budget) if rule else None
    result = expected(model, IDX[0, :20], rule=rule, threshold=threshold, budget=budget)
    exit = EarlyExit(rule, threshold) if rule else None
    decoder = Decoder(model, 1, kv_budget=budget, early_exit=exit)
    for t in range(20):
        x = decoder.prefill(IDX[:1, t : t + 1])
        assert torch.allclose(model.logits(x)[0, 0], result.logits[t], atol=1e-10), t
        assert int(decoder.loops) == result.loops[t]
    assert decoder.stats.mean_loops == pytest.approx(sum(result.loops) / 20)
    assert rule is None or len({*result.loops}) > 1


@torch.inference_mode()
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('rule', EXIT)
def test_exits_are_those_of_single_tokens(rule, case):
    check_exits(gated(**CASES[case]), rule)


@torch.inference_mode()
@pytest.mark.parametrize('keys', pairwise(rule=[*EXIT, None], budget=(1, 2, 4, None), case=CASES), ids=name)
def test_exits_with_shared_caches_far_beyond_block_size(keys, monkeypatch):
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 3)
    check_token_by_token(gated(block_size=5, **CASES[keys['case']]), keys['rule'], keys['budget'])


@torch.inference_mode()
def test_an_exit_rule_is_an_entry_of_the_table(monkeypatch):
    def entropy(x):
        log_p = x.logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1), None

    monkeypatch.setitem(EXIT, 'entropy', ExitRule(entropy, 2.0, 'nats', needs_logits=True))
    equation = helpers.ExitEquation(lambda before, s, p, g: -(p[-1] * p[-1].log()).sum(), reads_logits=True)
    monkeypatch.setitem(helpers.EXIT, 'entropy', equation)
    model = gated()
    check_exits(model, 'entropy')
    check_token_by_token(model, 'entropy', budget=2)
    assert 'exit=entropy at 2' in decoding_ways(model, 1)
    # a rule that does not say what it reads fails at once: it is never given anything else in its place
    monkeypatch.setitem(EXIT, 'entropy', ExitRule(entropy, 2.0, 'nats'))
    with pytest.raises(RuntimeError, match='NoneType.*log_softmax'):
        Decoder(model, 3, early_exit=EarlyExit('entropy', 2.0)).prefill(IDX)
    monkeypatch.setitem(EXIT, 'other_gate', EXIT['gate']._replace(needs_gate=False))
    with pytest.raises(RuntimeError, match='NoneType'):
        Decoder(model, 3, early_exit=EarlyExit('other_gate', 0.5)).prefill(IDX)
    for statistic, told in (
        (lambda x: (x.s, None), 'statistic'),
        (lambda x: (x.s[..., 0] > 0, None), 'statistic'),
        (lambda x: (x.s[..., 0], x.s[:1]), 'memory'),
    ):
        monkeypatch.setitem(EXIT, 'wrong', ExitRule(statistic, 2.0, 'nats'))
        with pytest.raises(RuntimeError, match=f'exit rule wrong: its {told} is'):
            Decoder(model, 3, early_exit=EarlyExit('wrong', 2.0)).prefill(IDX)


@torch.inference_mode()
@pytest.mark.parametrize('early', [None, EarlyExit('diff', 0.9)], ids=['all', 'diff'])
def test_rows_that_overflow_do_not_change_their_neighbours(early):
    """Learned positions, far beyond block_size, with a warm start."""
    model, lengths, steps = gated(pos='learned'), [3, 12, 5], 16
    keys = dict(early_exit=early, warm_start=True)
    rows = [Generation(model, IDX[:, :12], lengths, **keys)]
    rows += [Generation(model, IDX[[i], :n], **keys) for i, n in enumerate(lengths)]
    for generation in rows:
        generation.prefill()
    for step in range(steps):
        tokens = IDX[range(3), [n + step for n in lengths]]
        rows[0].append(tokens)
        for i, generation in enumerate(rows[1:]):
            generation.append(tokens[[i]])
            assert torch.allclose(generation.head_input[0], rows[0].head_input[i], atol=1e-10), (step, i)


@torch.inference_mode()
@pytest.mark.parametrize('length', [1, 5, 6, 7])
def test_a_prompt_is_not_warm_however_it_is_cut(length, monkeypatch):
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 5)
    model = gated(block_size=64)
    rows = [Generation(model, IDX[:2, :length], [length, 1], warm_start=warm) for warm in (False, True)]
    for generation in rows:
        generation.prefill()
    assert torch.equal(rows[0].head_input, rows[1].head_input)
    for generation in rows:
        generation.append(IDX[:2, length])
    assert not torch.allclose(rows[0].head_input, rows[1].head_input, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize('rule', [None, 'diff', 'kl'])
def test_a_warm_start_goes_on_from_the_last_state(rule):
    model, lengths, steps = gated(), [4, 7, 6], 4
    threshold = dividing_threshold(model, rule, IDX[0, :12]) if rule else None
    exit = EarlyExit(rule, threshold) if rule else None
    rows = Generation(model, padded(lengths), lengths, warm_start=True, early_exit=exit)
    rows.prefill()
    results = [
        expected(model, IDX[i, : n + steps], rule=rule, threshold=threshold, warm=n).logits
        for i, n in enumerate(lengths)
    ]
    for step in range(steps):
        rows.append(IDX[range(3), [n + step for n in lengths]])
        for i, n in enumerate(lengths):
            assert torch.allclose(model.logits(rows.head_input)[i], results[i][n + step], atol=1e-10)


@torch.inference_mode()
@pytest.mark.parametrize('rule', EXIT)
def test_thresholds_at_their_ends(rule):
    """From `never` on nothing changes, to the bit; past the other end every token exits after min_loops."""
    model, entry = gated(double=False), EXIT[rule]
    plain = Decoder(model, 3, 12).prefill(IDX[:, :12])
    for bias in (0.0, 100.0):  # 100: the gate is sure to the last bit
        model.exit_gate.bias.data.fill_(bias)
        for threshold in {entry.never, torch.inf if entry.above else -torch.inf} - {None}:
            decoder = Decoder(model, 3, 12, early_exit=EarlyExit(rule, threshold))
            assert torch.equal(decoder.prefill(IDX[:, :12]), plain) and (decoder.loops == 5).all()
    for min_loops in (1, 3):
        always = EarlyExit(rule, -1e9 if entry.above else 1e9, min_loops)
        decoder = Decoder(model, 3, 12, early_exit=always)
        x = decoder.prefill(IDX[:, :12])
        assert torch.allclose(x, Decoder(model, 3, 12, n_loop=min_loops).prefill(IDX[:, :12]), atol=1e-4)
        assert (decoder.loops == min_loops).all()


@torch.inference_mode()
def test_a_higher_threshold_of_the_gate_takes_more_loops():
    model, means = gated(), []
    for threshold in (0.0, 0.3, 0.6, 0.8, 0.9, 0.99, 1.0):
        decoder = Decoder(model, 3, 12, early_exit=EarlyExit('gate', threshold))
        decoder.prefill(IDX[:, :12])
        means.append(decoder.stats.mean_loops)
    assert means == sorted(means) and means[0] == 1 and means[-1] == 5 and len(set(means)) > 4


@torch.inference_mode()
@pytest.mark.parametrize('rule', EXIT)
def test_a_row_does_not_depend_on_its_neighbours(rule):
    model = gated()
    keys = dict(early_exit=EarlyExit(rule, dividing_threshold(model, rule, IDX[0, :12])))
    one = Decoder(model, 3, 12, **keys).prefill(IDX[:, :12])
    other = Decoder(model, 3, 12, **keys).prefill(torch.stack([IDX[1, :12], IDX[1, 12:24], IDX[2, :12]]))
    assert torch.allclose(one[1], other[0], atol=1e-10) and torch.allclose(one[2], other[2], atol=1e-10)


def test_thresholds_are_compared_as_they_say():
    """Below the threshold, or, with `above`, from the threshold on; at never and beyond not at all."""
    value = torch.tensor([-0.1, 0.0, 0.5, 1.0])
    below, above = ExitRule(None, 0, '', never=0.0), ExitRule(None, 0, '', above=True, never=1.0)
    for rule, threshold, exits in (
        (below, 0.5, [1, 1, 0, 0]), (below, 0.0, [0, 0, 0, 0]), (below, -1.0, [0, 0, 0, 0]),
        (below._replace(never=None), 0.0, [1, 0, 0, 0]),
        (above, 0.5, [0, 0, 1, 1]), (above, 1.0, [0, 0, 0, 0]), (above, 2.0, [0, 0, 0, 0]),
        (above._replace(never=None), 1.0, [0, 0, 0, 1]),
    ):  # fmt: skip
        assert rule.exits(value, threshold).int().tolist() == exits


def test_rounding_lets_no_token_exit_at_kls_end():
    """KL of equal predictions rounds to less than 0."""
    logits = torch.randn(1, 200, 50, generator=torch.Generator().manual_seed(0))
    value, _ = EXIT['kl'].statistic(ExitInputs(None, None, logits, None, logits.log_softmax(dim=-1) - 1e-6))
    assert (value < 0).any() and not EXIT['kl'].exits(value, 0.0).any()


def test_every_rule_says_what_to_try():
    for name, rule in EXIT.items():
        assert rule.advised > 0 and rule.unit and f'{rule.advised:g} ({rule.unit})' in rule.advice, name
        assert rule.never is None or (rule.advised < rule.never if rule.above else rule.advised > rule.never)
    ways = decoding_ways(gated(), 2)
    assert [way for way in ways if 'exit' in way] == [f'exit={n} at {r.advised:g}' for n, r in EXIT.items()]
    ungated = decoding_ways(make(), 2, exit_threshold=0.3)
    names = [name for name, rule in EXIT.items() if not rule.needs_gate]
    assert [way for way in ungated if 'exit' in way] == [f'exit={n} at 0.3' for n in names]


def test_the_advice_is_the_rules_own_and_no_other_line_tests_a_rules_name():
    sources = [helpers.ROOT / name for name in ('sample.py', 'bench.py')]
    sources += [path for path in (helpers.ROOT / 'nanoloop').glob('*.py') if path.name != 'early_exit.py']
    for path in sources:
        for name in ('kl', 'diff'):
            assert f"'{name}'" not in path.read_text(), (path, name)
    assert early_exit.EXIT is EXIT


# -----------------------------------------------------------------------------
# the cache


@torch.inference_mode()
def test_a_budget_shares_the_caches_of_the_loops():
    model, whole = gated(n_loop=4), gated(n_loop=4)(IDX[:, :5], IDX[:, :5])[0]
    c = model.config
    for budget in (1, 2, 4):
        decoder = Decoder(model, 3, 12, kv_budget=budget)
        layers = c.n_prelude + budget * c.n_block + c.n_coda
        assert decoder.stats.cache_bytes == layers * 2 * 3 * c.n_head * (12 + 1) * 6 * 8  # heads of 6 doubles
        first = model.logits(decoder.prefill(IDX[:, :4]))
        assert torch.allclose(first, whole[:, :4], atol=1e-10)  # a prompt at once is exact
        second = model.logits(decoder.prefill(IDX[:, 4:5]))[:, 0]
        assert torch.allclose(second, whole[:, 4], atol=1e-3) == (budget == 4)


@torch.inference_mode()
def test_caches_are_of_the_precision_and_number_that_are_needed():
    model = gated(double=False, n_coda=1)
    plain = Decoder(model, 2, 12).stats.cache_bytes
    assert Decoder(model, 2, 12, early_exit=EarlyExit('diff', 0.1)).stats.cache_bytes == plain
    every_loop = Decoder(model, 2, 12, early_exit=EarlyExit('kl', 0.1)).stats.cache_bytes
    assert every_loop == plain * (1 + 10 + 5) // (1 + 10 + 1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert Decoder(model, 2, 12).stats.cache_bytes == plain // 2
    for pos, columns in (('learned', 12), ('rope', 12 + kv_cache.PREFILL_CHUNK - 1)):
        assert Decoder(make(pos=pos), 2).cache.capacity == columns
        assert Decoder(make(pos=pos), 2, 5).cache.capacity == 5


@torch.inference_mode()
def test_a_row_does_not_grow_beyond_max_tokens():
    decoder = Decoder(make(), 2, 8)
    decoder.prefill(IDX[:2, :7], counts=[7, 3])
    decoder.decode_one_token(IDX[:2, 7:8])
    with pytest.raises(ValueError, match='max_tokens=8, expected at least the 9 tokens of a row'):
        decoder.decode_one_token(IDX[:2, 8:9])
    assert decoder.cache.lengths == [8, 4]  # nothing was reserved
    decoder.decode_one_token(IDX[1:2, 8:9], rows=[1])
    assert decoder.cache.lengths == [8, 5]


@torch.inference_mode()
def test_a_piece_that_would_overwrite_what_it_sees_is_not_read(monkeypatch):
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 4)
    decoder = Decoder(make(pos='rope'), 3)
    decoder.prefill(IDX[:, :15])  # all 12 + 4 - 1 columns at once: nothing is overwritten
    decoder.prefill(IDX[:, 15:19])
    with pytest.raises(AssertionError):
        decoder.prefill(IDX[:, 19:24])


def test_stats_add_up():
    one, other = Stats(3, drafted=4, accepted=1), Stats(5, drafted=2, accepted=2)
    one.loops_taken.update({1: 2, 4: 1})
    other.loops_taken.update({4: 1})
    total = one + other
    assert (total.cache_bytes, total.drafted, total.accepted) == (5, 6, 3)
    assert total.tokens == 4 and total.mean_loops == 2.5 and one.tokens == 3
