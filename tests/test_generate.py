"""Cached decoding against whole forward passes, at every position."""

import itertools

import pytest
import torch
import torch._dynamo.utils
from helpers import randomize
from test_model import PAIRS

from model import GPT, MLP_ACT, NORM, NORM_PLACE, POS, GPTConfig
from nanoloop import generate
from nanoloop.generate import Decoder, Exit, Sampler, Sequences, lower, stream, window

SIZES = dict(block_size=12, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=2)
IDX = torch.randint(23, (3, 40), generator=torch.Generator().manual_seed(0))


def make(double=True, **keys):
    model = randomize(GPT(GPTConfig(**SIZES | keys))).eval()
    return model.double() if double else model


def whole(model, row, n_loop=None):
    """The last logits of a row (T,), by a whole forward pass over what is in sight of it."""
    if model.transformer.wpe is not None:
        row = row[len(row) - window(len(row), model.config.block_size) :]
    return model(row[None], n_loop=n_loop)[0][0, 0]


def check_decoding(model, lengths, steps, n_loop=None, atol=1e-10):
    """Ragged prompts of IDX, then steps more tokens of it: the logits of every position."""
    idx = torch.full((len(lengths), max(lengths)), 7)
    for row, n, all_of in zip(idx, lengths, IDX, strict=True):
        row[:n] = all_of[:n]
    rows = Sequences(model, idx, lengths, steps, n_loop=n_loop)
    for step in range(steps):
        logits = model.logits(rows.read)
        for i, n in enumerate(lengths):
            expected = whole(model, IDX[i, : n + step], n_loop)
            assert torch.allclose(logits[i], expected, atol=atol), (i, step)
        rows.append(torch.stack([IDX[i, n + step] for i, n in enumerate(lengths)]))


PARTS = zip(itertools.cycle(NORM), itertools.product(POS, MLP_ACT))
KINDS = [dict(norm=norm, pos=pos, mlp=mlp) for norm, (pos, mlp) in PARTS]


@torch.no_grad()
@pytest.mark.parametrize('place', NORM_PLACE)
@pytest.mark.parametrize('injection, state', PAIRS)
def test_cached_decoding_equals_whole_forward_passes(injection, state, place):
    """Three rows of unlike lengths, from within block_size to far beyond it."""
    i = list(NORM_PLACE).index(place)
    for j, kind in enumerate(KINDS[i :: len(NORM_PLACE)]):
        n_loop = (1, 2, 5)[(2 * i + j) % 3]  # every norm meets every number
        model = make(input_injection=injection, state_init=state, norm_place=place, **kind)
        check_decoding(model, [3, 11, 5], 9, n_loop)


EXTRAS = [
    dict(n_kv_head=1),
    dict(window_pattern='LS'),
    dict(window_pattern='LS', window_size=12),
    dict(window_pattern='S', window_size=3, n_kv_head=1),
    dict(qk_norm=True, softcap=4.0, norm_emb=True),
    dict(bias=True, block_size=1, emb_scale=2.0),
    dict(n_prelude=0, n_coda=0),
]


@torch.no_grad()
@pytest.mark.parametrize('lengths', [[9, 9, 9], [2, 12, 14], [13, 30, 1]], ids=str)
@pytest.mark.parametrize('pos', POS)
@pytest.mark.parametrize('keys', EXTRAS, ids=str)
def test_groups_windows_and_long_prompts_in_chunks(keys, pos, lengths, monkeypatch):
    monkeypatch.setattr(generate, 'CHUNK', 5)
    check_decoding(make(pos=pos, **keys), lengths, 9)
    check_decoding(make(double=False, pos=pos, **keys), lengths, 9, atol=1e-4)


@torch.no_grad()
def test_compiled_steps_are_the_same_steps(monkeypatch):
    """Ragged rows, beyond block_size, in float32."""
    monkeypatch.setattr(generate, 'SPAN', 8)
    model, steps = make(double=False, pos='rope', window_pattern='LS', n_kv_head=1, n_prelude=0, n_coda=0), 9
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows = [Sequences(model, IDX[:, :9], [3, 9, 5], steps, compile=compile) for compile in (True, False)]
    for token in IDX[:, 9 : 9 + steps].T:
        for sequences in rows:
            sequences.append(token)
        assert torch.allclose(rows[0].read, rows[1].read, atol=1e-5)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1  # for all lengths
    assert 'step' not in vars(Sequences(model, IDX[:1, :1], None, 2, compile=True).decoder)  # the prompt
    assert 'step' in vars(rows[0].decoder) and 'step' not in vars(rows[1].decoder)


@torch.no_grad()
def test_lowered_weights_are_what_autocast_makes_of_them():
    model, low = (make(double=False, pos='rope', exit_gate=True) for _ in range(2))
    lower(low, torch.bfloat16)
    assert low.transformer.wte.weight.dtype == low.exit_gate.weight.dtype == torch.float32
    assert low.lm_head.weight.dtype == low.inject.weight.dtype == torch.bfloat16
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tokens = [torch.stack([*stream(m, IDX[:, :5], 12, temperature=0)]) for m in (model, low)]
        assert torch.equal(*tokens) and torch.equal(*(m(IDX[:, :9])[0] for m in (model, low)))


# -----------------------------------------------------------------------------
# exits


def gated(**keys):
    model = make(**dict(dict(exit_gate=True, n_loop=5, pos='rope'), **keys))
    model.exit_gate.bias.data.zero_()
    return model


def token_by_token(model, row, leave, n_loop, warm=99, budget=None):
    """(logits, loops) of a row's tokens: the rule written out, with a dictionary of keys and values.

    warm: the first token whose loop starts from its predecessor's last state.
    """
    kept, logits, loops, s, budget = {}, [], [], None, budget or n_loop
    c = model.config

    class Store:
        def __init__(self, name):
            self.name = name

        def __call__(self, k, v):
            kept.setdefault(self.name, {})[t] = k, v
            found = [kept[self.name][j] for j in range(max(0, t + 1 - c.block_size), t + 1)]
            return tuple(torch.cat(parts, dim=2) for parts in zip(*found, strict=True))

    def stores(part, blocks):
        return [Store((*part, j)) for j in range(len(blocks))]

    m = model.transformer
    for t, token in enumerate(row):
        pos = torch.tensor([t])
        context = model.attn_inputs(pos)
        e = model.apply_blocks(
            m.prelude, model.embed(token.view(1, 1), pos), context, caches=stores(('prelude',), m.prelude)
        )
        s, memory = model.start(e, pos) if t < warm else s, None
        for i in range(n_loop):
            before, s = s, model.iterate(e, s, i, context, stores(('recur', i % budget), m.recur))
            if leave.reads:
                read = model.run_coda(s, context, stores(('coda', i % budget), m.coda))
            gone, memory = leave(model, i, before, s, read if leave.reads else s, memory)
            if gone.item():
                break
        for later in range(i + 1, n_loop):
            for j in range(len(m.recur)):
                kept.setdefault(('recur', later % budget, j), {})[t] = kept['recur', i % budget, j][t]
            for j in range(len(m.coda) if leave.reads else 0):
                kept.setdefault(('coda', later % budget, j), {})[t] = kept['coda', i % budget, j][t]
        if not leave.reads:
            read = model.run_coda(s, context, stores(('coda', 0), m.coda))
        logits.append(model.logits(read)[0, 0])
        loops.append(i + 1)
    return torch.stack(logits), loops


QUERIED = dict(n_coda=0, input_injection='query_all', state_init='none')
RULES = [('kl', 0.17, {}), ('diff', 1.1, {}), ('gate', 0.85, {})]  # thresholds at which tokens differ
RULES += [('kl', 0.002, QUERIED), ('diff', 0.1, QUERIED), ('gate', 0.8, QUERIED)]


@torch.no_grad()
@pytest.mark.parametrize('rule, threshold, keys', RULES, ids=str)
def test_exits_are_those_of_single_tokens(rule, threshold, keys):
    """A ragged prompt at once and then token by token, against one token at a time in every row alone."""
    model, leave = gated(**keys), Exit(rule, threshold)
    lengths, steps = [4, 8, 6], 4
    expected = [token_by_token(model, row[:12], leave, 5) for row in IDX]
    assert len({n for _, loops in expected for n in loops}) > 1
    idx = torch.full((3, 8), 7)
    for row, n, all_of in zip(idx, lengths, IDX, strict=True):
        row[:n] = all_of[:n]
    rows = Sequences(model, idx, lengths, steps, leave=leave)
    for i, n in enumerate(lengths):
        assert rows.decoder.loops[i, :n].tolist() == expected[i][1][:n]
    for step in range(steps):
        for i, n in enumerate(lengths):
            assert torch.allclose(model.logits(rows.read)[i], expected[i][0][n + step - 1], atol=1e-10)
        rows.append(torch.stack([IDX[i, n + step] for i, n in enumerate(lengths)]))
        assert rows.decoder.loops[:, 0].tolist() == [expected[i][1][n + step] for i, n in enumerate(lengths)]


@torch.no_grad()
@pytest.mark.parametrize('rule, threshold, keys', RULES, ids=str)
@pytest.mark.parametrize('budget', [1, 2, 4, None])
def test_exits_with_shared_slots_far_beyond_block_size(rule, threshold, keys, budget, monkeypatch):
    """One token at a time, as shared slots depend on what is processed at once."""
    monkeypatch.setattr(generate, 'CHUNK', 3)
    model, leave = gated(block_size=5, **keys), Exit(rule, threshold)
    expected, loops = token_by_token(model, IDX[0, :20], leave, 5, budget=budget)
    assert len({*loops}) > 1
    decoder = Decoder(model, 1, 20, kv_budget=budget, leave=leave)
    for t in range(20):
        read = decoder.advance(IDX[:1, t : t + 1])
        assert torch.allclose(model.logits(read)[0, 0], expected[t], atol=1e-10), t
        assert decoder.loops.item() == loops[t]
    assert leave.mean() == pytest.approx(sum(loops) / 20)


@torch.no_grad()
@pytest.mark.parametrize('leave', [None, Exit('diff', 0.9)], ids=['all', 'diff'])
def test_rows_that_overflow_do_not_change_their_neighbours(leave):
    """Learned positions, far beyond block_size, with a warm start."""
    model, lengths, steps = gated(pos='learned'), [3, 12, 5], 16
    together = Sequences(model, IDX[:, :12], lengths, steps, leave=leave, warm_start=True)
    alone = [
        Sequences(model, IDX[[i], :n], None, steps, leave=leave, warm_start=True)
        for i, n in enumerate(lengths)
    ]
    for step in range(steps):
        tokens = torch.stack([IDX[i, n + step] for i, n in enumerate(lengths)])
        together.append(tokens)
        for i, rows in enumerate(alone):
            rows.append(tokens[[i]])
            assert torch.allclose(rows.read[0], together.read[i], atol=1e-10), (step, i)


@torch.no_grad()
@pytest.mark.parametrize('length', [1, 5, 6, 7])
def test_a_prompt_is_not_warm_however_it_is_cut(length, monkeypatch):
    monkeypatch.setattr(generate, 'CHUNK', 5)
    model = gated(block_size=64)
    cold, warm = (
        Sequences(model, IDX[:2, :length], [length, 1], 3, warm_start=warm) for warm in (False, True)
    )
    assert torch.equal(cold.read, warm.read)
    for rows in (cold, warm):
        rows.append(IDX[:2, length])
    assert not torch.allclose(cold.read, warm.read, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('rule, threshold', [('diff', 0.0), ('diff', 1.1), ('kl', 0.17)])
def test_a_warm_start_goes_on_from_the_last_state(rule, threshold):
    model, leave = gated(), Exit(rule, threshold)
    lengths, steps = [4, 7, 6], 4
    idx = torch.where(torch.arange(7) < torch.tensor(lengths)[:, None], IDX[:, :7], 7)
    rows = Sequences(model, idx, lengths, steps, warm_start=True, leave=leave if threshold else None)
    for step in range(steps):
        rows.append(torch.stack([IDX[i, n + step] for i, n in enumerate(lengths)]))
        for i, n in enumerate(lengths):
            expected, _ = token_by_token(model, IDX[i, : n + step + 1], leave, 5, warm=n)
            assert torch.allclose(model.logits(rows.read)[i], expected[-1], atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize('rule, never, always', [('kl', 0.0, 1e9), ('diff', 0.0, 1e9), ('gate', 1.0, 0.0)])
def test_thresholds_at_their_ends(rule, never, always):
    model = gated(double=False)
    plain = Decoder(model, 3, 12).advance(IDX[:, :12])
    assert torch.equal(Decoder(model, 3, 12, leave=Exit(rule, never)).advance(IDX[:, :12]), plain)
    model.exit_gate.bias.data.fill_(100.0)  # sure to leave, to the last bit
    if rule == 'gate':
        assert torch.equal(Decoder(model, 3, 12, leave=Exit(rule, never)).advance(IDX[:, :12]), plain)
    for least in (1, 3):
        early = Decoder(model, 3, 12, leave=Exit(rule, always, least))
        x = early.advance(IDX[:, :12])
        assert torch.allclose(x, Decoder(model, 3, 12, n_loop=least).advance(IDX[:, :12]), atol=1e-4)
        assert (early.loops == least).all()


@torch.no_grad()
def test_a_higher_threshold_of_the_gate_takes_more_loops():
    model, means = gated(), []
    for threshold in (0.0, 0.3, 0.6, 0.8, 0.9, 0.99, 1.0):
        decoder = Decoder(model, 3, 12, leave=Exit('gate', threshold))
        decoder.advance(IDX[:, :12])
        means.append(decoder.loops.double().mean().item())
    assert means == sorted(means) and means[0] == 1 and means[-1] == 5 and len(set(means)) > 4


@torch.no_grad()
@pytest.mark.parametrize('rule, threshold, keys', RULES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(rule, threshold, keys):
    model, leave = gated(**keys), Exit(rule, threshold)
    one = Decoder(model, 3, 12, leave=leave).advance(IDX[:, :12])
    other = Decoder(model, 3, 12, leave=leave).advance(torch.stack([IDX[1, :12], IDX[1, 12:24], IDX[2, :12]]))
    assert torch.allclose(one[1], other[0], atol=1e-10) and torch.allclose(one[2], other[2], atol=1e-10)


@torch.no_grad()
def test_thresholds_are_compared_as_they_say():
    model = gated()
    s = torch.ones(1, 1, 12, dtype=torch.double)
    model.exit_gate.weight.data.zero_()  # a half, exactly
    for rule, threshold, expected in (('diff', 0.0, False), ('gate', 0.5, True), ('diff', 1e-9, True)):
        gone, _ = Exit(rule, threshold)(model, 0, s, s, s, None)
        assert gone.item() is expected
    p = model.logits(s).log_softmax(dim=-1)
    assert not Exit('kl', 0.0)(model, 1, s, s, s, p)[0].item()


# -----------------------------------------------------------------------------
# shared slots


@torch.no_grad()
def test_a_budget_shares_the_slots_of_the_loop():
    model, sizes = gated(n_loop=4), {}
    for budget in (1, 2, 4):
        decoder = Decoder(model, 3, 12, kv_budget=budget)
        decoder.advance(IDX[:, :4])
        sizes[budget] = decoder.bytes()
        D, G, c = 6, 2, model.config
        slots = c.n_prelude + budget * c.n_block + c.n_coda
        assert sizes[budget] == slots * 2 * 3 * G * (12 + 1) * D * 8
    whole = model(IDX[:, :4], IDX[:, :4])[0]
    first = model.logits(Decoder(model, 3, 12, kv_budget=1).advance(IDX[:, :4]))
    assert torch.allclose(first, whole, atol=1e-10)  # a prompt at once is exact
    shared = Decoder(model, 3, 12, kv_budget=1)
    shared.advance(IDX[:, :4])
    assert not torch.allclose(
        model.logits(shared.advance(IDX[:, 4:5])[:, 0]), model(IDX[:, :5])[0][:, 0], atol=1e-3
    )


@torch.no_grad()
def test_slots_are_of_the_precision_and_number_that_are_needed():
    model = gated(double=False, n_coda=1)
    plain = Decoder(model, 2, 12).bytes()
    assert Decoder(model, 2, 12, leave=Exit('diff', 0.1)).bytes() == plain
    assert Decoder(model, 2, 12, leave=Exit('kl', 0.1)).bytes() == plain * (1 + 10 + 5) // (1 + 10 + 1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert Decoder(model, 2, 12).bytes() == plain // 2


# -----------------------------------------------------------------------------
# speculation


def confident(**keys):
    """A model whose loops change little, so that drafts are right now and then."""
    sizes = dict(double=False, n_loop=4, pos='rope', norm_loop=False, n_prelude=0, n_block=1, n_coda=0)
    model = make(**sizes | keys)
    for name, p in model.named_parameters():
        p.data *= 0.3 if 'recur' in name and p.dim() > 1 else 1
    return model


@pytest.mark.parametrize(
    'keys', [dict(), dict(n_coda=1), dict(pos='learned'), dict(window_pattern='LS')], ids=str
)
def test_greedy_speculation_is_greedy_decoding(keys, monkeypatch):
    """200 prompts, and far beyond block_size."""
    model, sizes = confident(**keys), set()
    dice, real = torch.Generator().manual_seed(1), generate.speculation
    monkeypatch.setattr(generate, 'speculation', lambda *a: sizes.add(len((x := real(*a))[0])) or x)
    for i in range(200 if not keys else 20):
        prompt = torch.randint(23, (1, 1 + i % 9), generator=dice)
        plain = [int(x) for x in stream(model, prompt, 7, temperature=0)]
        fast = stream(model, prompt, 7, temperature=0, speculate=3 + i % 3, draft_loops=1 + i % 2)
        assert [int(x) for x in fast] == plain
    assert len(sizes) > 3  # some drafts were kept, some were not


REFUSED = [
    (dict(speculate=2), 2, 'speculate=2, expected 0 for several rows'),
    (dict(speculate=2, compile=True), 1, 'compile=True, expected False with speculate=2'),
    (dict(speculate=2, n_loop=1), 1, 'speculate=2, expected 0 with n_loop=1'),
    (dict(speculate=-1), 1, 'speculate=-1, expected at least 0'),
    (dict(speculate=2, kv_budget=2), 1, 'speculate=2, expected 0 with kv_budget=2'),
    (dict(speculate=2, warm_start=True), 1, 'speculate=2, expected 0 with warm_start'),
    (dict(speculate=2, draft_loops=4), 1, 'draft_loops=4, expected at least 1, below n_loop=4'),
    (dict(leave=Exit('diff', 0.1), compile=True), 1, 'compile=True, expected False with an exit'),
    (dict(lengths=[0, 2]), 2, 'lengths=\\[0, 2\\], expected from 1 to the 4 tokens'),
    (dict(lengths=[5]), 1, 'lengths=\\[5\\], expected from 1 to the 4 tokens'),
]


@pytest.mark.parametrize('options, rows, told', REFUSED, ids=[told for _, _, told in REFUSED])
def test_what_does_not_go_together_is_refused_before_the_prompt(options, rows, told, monkeypatch):
    monkeypatch.setattr(Decoder, 'pass_through', None)
    with pytest.raises(ValueError, match=told):
        next(stream(confident(), IDX[:rows, :4], 5, **options))


def test_no_tokens_and_lengths_of_generate():
    model = confident()
    assert torch.equal(model.generate(IDX[:1, :4], 0), IDX[:1, :4])
    drawn = model.generate(IDX[:1, :4], 3)
    model(drawn, drawn)[1].backward()  # as reinforcement learning does
    with pytest.raises(ValueError, match='lengths'):
        model.generate(IDX[:2, :4], 3, lengths=[2, 4])


def test_only_few_tokens_go_without_onednn(monkeypatch):
    """With learned positions half a block is processed anew now and then."""
    seen, model = [], confident(pos='learned', block_size=16)
    real = Decoder.pass_through

    def told(self, idx, *args):
        seen.append((idx.numel(), torch.backends.mkldnn.enabled))
        return real(self, idx, *args)

    monkeypatch.setattr(Decoder, 'pass_through', told)
    list(stream(model, IDX[:1, :4], 20))
    before = torch.backends.mkldnn.enabled
    assert {(1, False), (9, before), (4, before)} == {*seen}


def test_few_tokens_leave_the_settings_as_they_were():
    before = torch.backends.mkldnn.enabled
    for _ in stream(confident(), IDX[:1, :4], 3, speculate=2):
        assert torch.backends.mkldnn.enabled == before


def test_drawing_at_the_edges():
    model = confident()
    x = torch.ones(1, 12)
    for temperature in (1e-38, 1e-50, 1e-5):
        p = Sampler(model, temperature=temperature).predict(x)
        assert p.isfinite().all() and p.sum() == 1 and p.max() == 1
    model.lm_head = torch.nn.Identity()
    even = torch.tensor([[0.5, 0.5]]).log()
    assert Sampler(model, top_p=0.5).predict(even).count_nonzero() == 1
    p, q = torch.tensor([[0.5 - 2**-24, 0.5]]), torch.tensor([[0.5, 0.5]])
    sampler, one = Sampler(model), torch.zeros(1, dtype=torch.long)
    monkey = torch.rand
    try:
        torch.rand = lambda n, **options: torch.full((n,), 1 - 2**-24)
        tokens, kept = sampler.verify(p, q, one)
    finally:
        torch.rand = monkey
    assert kept == 0 and tokens.item() in (0, 1)


def chi_square(counts, p):
    """The statistic, and what it exceeds with a probability of about 1e-4 (Wilson and Hilferty)."""
    expected, free = p * counts.sum(), (p > 0).sum().item() - 1
    assert (counts[p == 0] == 0).all()
    value = ((counts - expected) ** 2 / expected)[p > 0].sum().item()
    return value, free * (1 - 2 / (9 * free) + 3.72 * (2 / (9 * free)) ** 0.5) ** 3


@torch.no_grad()
@pytest.mark.parametrize('options', [dict(), dict(temperature=0.7, top_k=4, top_p=0.8)], ids=str)
def test_speculation_draws_from_the_models_distribution(options):
    """block_size 1 makes the model a Markov chain: the transitions of one long stream."""
    model = confident(block_size=1, vocab_size=6)
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(1, 1, dtype=torch.long)
    found = stream(model, start, 1500, generator=generator, speculate=4, **options)
    chain = [0, *(int(x) for x in found)]
    counts = torch.zeros(6, 6)
    for a, b in itertools.pairwise(chain):
        counts[a, b] += 1
    for a in range(6):
        logits = model(torch.tensor([[a]]))[0][0, 0] / options.get('temperature', 1.0)
        p = logits.softmax(-1)
        order = p.argsort(descending=True)
        keep = order[: options.get('top_k', 6)]
        if 'top_p' in options:  # of what top_k has left
            share = p[keep] / p[keep].sum()
            keep = keep[: int((share.cumsum(0) < options['top_p']).sum()) + 1]
        p = torch.zeros(6).index_put((keep,), p[keep] / p[keep].sum())
        if counts[a].sum() > 100 and len(keep) > 1:
            value, limit = chi_square(counts[a], p)
            assert value < limit, (a, value, limit)


@torch.no_grad()
def test_verified_drafts_are_distributed_as_the_verification_says():
    """50,000 draws from a vocabulary of 5, the draft far off."""
    p = torch.tensor([[0.1, 0.5, 0.0, 0.3, 0.1]])
    q = torch.tensor([[0.6, 0.05, 0.25, 0.1, 0.0]])
    sampler = Sampler(None, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(5)
    for draft in torch.multinomial(q[0], 50_000, replacement=True, generator=sampler.generator):
        counts[sampler.verify(p, q, draft[None])[0][0]] += 1
    value, limit = chi_square(counts, p[0])
    assert value < limit
