"""Sampling, speculation, and texts that go on after their end."""

import itertools

import pytest
import torch
from decoding import IDX, confident, dividing_threshold, expected, gated, padded
from helpers import pairwise

from model import POS
from nanoloop import decode, kv_cache, speculation
from nanoloop import generate as generate_file
from nanoloop.decode import Decoder, Stats
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.generate import Generation, Sampler, generate, stream, tokens_in_view
from nanoloop.speculation import verify

# -----------------------------------------------------------------------------
# going on after a text


def simulated_views(total, block_size):
    """The numbers of tokens in view after 1 to total tokens, by the rule of generate.py, one by one."""
    n, views = 0, []
    for _ in range(total):
        n = n + 1 if n < block_size else block_size // 2 + 1
        views.append(n)
    return views


def test_the_tokens_in_view_follow_the_rule_of_learned_positions():
    for block_size in (1, 2, 5, 12):
        views = [tokens_in_view(n, block_size) for n in range(1, 40)]
        assert views == simulated_views(39, block_size)


def recorded(generation):
    """Records the logits (B, V) of every token that the generation draws, in a list that it returns."""
    logits, real = [], generation.sampler.sample
    generation.sampler.sample = lambda x: logits.append(generation.sampler.model.logits(x)) or real(x)
    return logits


TURNS = ((4, [3, 1]), (3, [9, 2]), (5, [1, 4]), (6, [0, 0]))  # tokens generated, then added to each row


def converse(generation, texts):
    """Returns two texts with TURNS after them. Every other stream is left before its end."""
    for i, (n_tokens, n_more) in enumerate(TURNS):
        for token in itertools.islice(generation.stream(n_tokens + 5 * (i % 2)), n_tokens):
            texts = [torch.cat(pair) for pair in zip(texts, token[:, None], strict=True)]
        if any(n_more):
            idx = IDX[:2, 20 + i : 20 + i + max(n_more)].clone()
            generation.extend(idx, n_more)
            texts = [torch.cat((text, row[:n])) for text, row, n in zip(texts, idx, n_more, strict=True)]
    return texts


@torch.inference_mode()
@pytest.mark.parametrize(
    'pos, rule', [*itertools.product(POS, [None, 'diff']), ('rope', 'kl'), ('rope', 'gate')]
)
def test_a_kept_cache_gives_what_one_pass_over_the_conversation_gives(pos, rule, monkeypatch):
    """Two ragged rows, four turns, far beyond block_size, prompts in chunks; no token is computed twice."""
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 4)
    model, lengths = gated(pos=pos, block_size=10), [3, 8]
    threshold = dividing_threshold(model, rule, IDX[0, :10]) if rule else None
    exit = EarlyExit(rule, threshold) if rule else None
    options = dict(temperature=0, early_exit=exit, lockstep=True)
    generation = Generation(model, padded([*lengths, 1])[:2], lengths, **options)
    logits = recorded(generation)
    texts = converse(generation, [IDX[i, :n] for i, n in enumerate(lengths)])
    assert all(len(text) > 30 for text in texts)

    for row, text in enumerate(texts):
        options = dict(rule=rule, threshold=threshold) if rule else {}
        whole = expected(model, text[:-1], **options).logits  # (T, V), what predicts text[1:]
        at = [lengths[row] - 1]  # the token before each that was generated
        for n_tokens, n_more in TURNS:
            at += [at[-1] + i for i in range(1, n_tokens)]
            at.append(at[-1] + 1 + n_more[row])
        at.pop()
        assert torch.allclose(torch.stack(logits)[:, row], whole[at], atol=1e-10)
        assert torch.equal(text[[t + 1 for t in at]], whole[at].argmax(dim=-1))
    if not POS[pos].learned:
        assert generation.stats.tokens == sum(
            len(text) - 1 for text in texts
        )  # the last is not processed yet


@torch.inference_mode()
@pytest.mark.parametrize('block_size', [6, 7])
def test_learned_positions_compute_no_more_anew_than_their_rule_says(block_size):
    """Whatever the pieces are: a row is started anew only where its view moves."""
    model, views = gated(pos='learned', block_size=block_size), simulated_views(200, block_size)
    for n_prompt, n_tokens, n_more in ((3, 2, 1), (20, 1, 4), (5, 9, 17), (1, 3, 30)):
        generation, total, processed = Generation(model, IDX[:1, :n_prompt], temperature=0), n_prompt, 0
        n_view = views[total - 1]
        processed += n_view
        for _ in range(2):
            list(generation.stream(n_tokens))
            for _ in range(n_tokens - 1):  # the last token is processed with the next piece
                total += 1
                processed += 1 if views[total - 1] == n_view + 1 else views[total - 1]
                n_view = views[total - 1]
            assert generation.stats.tokens == processed
            generation.extend(IDX[:1, :n_more])
            total += 1 + n_more
            n_view, before = views[total - 1], n_view
            processed += 1 + n_more if n_view == before + 1 + n_more else n_view
        next(generation.stream(1))
        assert generation.stats.tokens == processed


@torch.inference_mode()
@pytest.mark.parametrize('pos', POS)
def test_a_stream_that_is_left_early_goes_on_with_the_same_text(pos):
    model = confident(pos=pos)
    for options in ({}, dict(speculate=4), dict(speculate=4, draft_loops=3)):
        for idx in (IDX[:1, :4], IDX[1:2, :9]):
            whole = [int(token) for token in stream(model, idx, 24, temperature=0, **options)]
            generation, parts = Generation(model, idx, temperature=0, **options), []
            for n in (1, 2, 3, 5, 2, 4, 7):
                parts += [int(token) for token in itertools.islice(generation.stream(9), n)]
            assert parts == whole


@torch.inference_mode()
@pytest.mark.parametrize('pos', POS)
def test_drafts_that_nobody_has_seen_are_no_part_of_the_text(pos):
    """A text by speculation is left after any number of tokens and answered: as without speculation."""
    model, dropped = confident(pos=pos, double=True), set()
    for n in range(1, 9):
        options = dict(temperature=0, draft_loops=3)
        rows = [Generation(model, IDX[:1, :4], speculate=speculate, **options) for speculate in (0, 5)]
        for n_more in (3, 5, 7, 1):
            texts = [[int(x) for x in itertools.islice(generation.stream(14), n)] for generation in rows]
            assert texts[0] == texts[1]
            dropped.add(len(rows[1].unyielded))
            for generation in rows:
                generation.extend(IDX[:1, 10 : 10 + n_more])
                next(generation.stream(1))
            assert torch.allclose(rows[0].head_input, rows[1].head_input, atol=1e-10)
    assert len(dropped) > 3


@torch.inference_mode()
def test_tokens_can_be_added_several_times_and_before_the_first_stream():
    model = gated()
    whole = generate(model, IDX[:1, :9], 5, temperature=0)[:, 9:]
    generation = Generation(model, IDX[:1, :3], temperature=0)
    for start, end in ((3, 4), (4, 8), (8, 9)):
        generation.extend(IDX[:1, start:end])
    assert generation.stats.tokens == 0
    assert torch.equal(torch.stack([*generation.stream(5)], dim=1), whole) and generation.stats.tokens == 13
    for idx, lengths, told in (
        (IDX[:2, :4], None, r'idx=\(2, 4\), expected 1 rows'),
        (IDX[:1, :4], [5], r'lengths=\[5\], expected from 1 to the 4 tokens of idx'),
        (IDX[:1, :4], [0], r'lengths=\[0\], expected from 1'),
        (IDX[:1, :4], [1, 1], r'lengths=\[1, 1\], expected from 1'),
    ):
        with pytest.raises(ValueError, match=told):
            generation.extend(idx, lengths)


@torch.inference_mode()
def test_a_text_that_goes_on_heeds_max_tokens():
    generation = Generation(gated(), IDX[:1, :4], max_tokens=10, temperature=0)
    assert len(list(generation.stream(3))) == 3
    generation.extend(IDX[:1, :4])
    with pytest.raises(ValueError, match='max_tokens=10, expected at least the 11 tokens of a row'):
        next(generation.stream(1))


# -----------------------------------------------------------------------------
# speculation


@pytest.mark.parametrize(
    'keys', [dict(), dict(n_coda=1), dict(pos='learned'), dict(window_pattern='LS')], ids=str
)
def test_greedy_speculation_is_greedy_decoding(keys, monkeypatch):
    """Many prompts, and far beyond block_size."""
    model, sizes = confident(**keys), set()
    dice, real = torch.Generator().manual_seed(1), speculation.draft_and_verify

    def recorded(*args, **options):
        tokens = real(*args, **options)
        sizes.add(len(tokens))
        return tokens

    monkeypatch.setattr(generate_file, 'draft_and_verify', recorded)
    for i in range(40 if not keys else 15):
        prompt = torch.randint(23, (1, 1 + i % 9), generator=dice)
        plain = generate(model, prompt, 9, temperature=0)
        options = dict(speculate=3 + i % 3, draft_loops=1 + i % 2)
        assert torch.equal(generate(model, prompt, 9, temperature=0, **options), plain)
    assert len(sizes) > 3  # some drafts were accepted, some were not


def speculated(model, prompt, rule, threshold, min_loops, **options):
    """The greedy tokens after a prompt (1, T) with an exit, and the Stats."""
    exit = None if rule is None else EarlyExit(rule, threshold, min_loops)
    generation = Generation(model, prompt, temperature=0, early_exit=exit, **options)
    return torch.cat([*generation.stream(9)]), generation.stats


@torch.inference_mode()
@pytest.mark.parametrize(
    'case', pairwise(rule=EXIT, pos=POS, min_loops=(1, 2), draft_loops=(1, 2, 3)), ids=str
)
def test_speculation_with_exits_gives_the_tokens_of_exits_alone(case):
    """In float64, far beyond block_size. Tokens leave in the draft, if they may, and after it."""
    rule, min_loops, draft_loops = case['rule'], case['min_loops'], case['draft_loops']
    model, stats, last = gated(n_loop=4, pos=case['pos']), Stats(), max(min_loops, draft_loops)
    values = torch.tensor(expected(model, IDX[0, :12], rule=rule).values)[:, min_loops - 1 : last]
    nearest = values.amax(1) if EXIT[rule].above else values.amin(1)  # of a token, to leaving by then
    threshold = nearest.median().item()
    for i in range(8):
        prompt = IDX[i % 3, i : 2 * i + 1][None]
        plain, _ = speculated(model, prompt, rule, threshold, min_loops)
        options = dict(speculate=3 + i % 2, draft_loops=draft_loops)
        drafted, drafting = speculated(model, prompt, rule, threshold, min_loops, **options)
        assert torch.equal(plain, drafted)
        stats += drafting
    assert min(stats.loops_taken) <= last < max(stats.loops_taken)
    assert 0 < stats.accepted < stats.drafted


@torch.inference_mode()
@pytest.mark.parametrize(
    'rule, n_rows, speculate, parts',
    [
        (None, 1, 3, ['from_loop', 'from_start']),
        ('kl', 1, 3, ['loop', 'prelude']),  # the coda is a part of the loop
        ('diff', 3, 0, ['coda', 'loop', 'prelude']),
        ('never', 1, 3, ['coda', 'coda', 'loop', 'loop', 'prelude']),  # of a draft, and of its verification
    ],
)
def test_compiled_steps_go_with_exits_and_speculation(rule, n_rows, speculate, parts, monkeypatch):
    """Beyond block_size, in float64. All loops share a compiled step."""
    compiled = []

    def compile_step(function, device):
        def count(graph, inputs):
            compiled.append(function.__name__)
            return graph.forward

        return torch.compile(function, backend=count)

    monkeypatch.setattr(decode, 'compile_step', compile_step)
    monkeypatch.setattr(kv_cache, 'LENGTH_STEP', 8)
    torch._dynamo.reset()
    model, idx = confident(double=True, exit_gate=True, n_coda=1, n_gram_rows=128), IDX[:n_rows, :9]
    threshold = dividing_threshold(model, rule, IDX[0, :12]) if rule in EXIT else 0.0
    rule = 'diff' if rule == 'never' else rule
    plain, stats = speculated(model, idx, rule, threshold, 1)
    options = dict(compile=True, speculate=speculate, draft_loops=2 if speculate else 1)
    tokens, compiled_stats = speculated(model, idx, rule, threshold, 1, **options)
    assert torch.equal(plain, tokens)
    assert speculate or stats.loops_taken == compiled_stats.loops_taken
    assert sorted(compiled) == parts


REFUSED = [
    (dict(speculate=2), 2, 'speculate=2, expected 0 for several rows'),
    (dict(speculate=2, n_loop=1), 1, 'speculate=2, expected 0 with n_loop=1'),
    (dict(speculate=-1), 1, 'speculate=-1, expected at least 0'),
    (dict(speculate=2, kv_budget=2), 1, 'speculate=2, expected 0 with kv_budget=2'),
    (dict(speculate=2, warm_start=True), 1, 'speculate=2, expected 0 with warm_start'),
    (dict(speculate=2, draft_loops=4), 1, 'draft_loops=4, expected at least 1, below n_loop=4'),
    (dict(speculate=2, draft_loops=0), 1, 'draft_loops=0, expected at least 1, below n_loop=4'),
    (dict(early_exit=EarlyExit('diff', 0.1, 5)), 1, 'min_loops=5, expected at most n_loop=4'),
    (dict(early_exit=EarlyExit('gate', 0.5)), 1, "exit='gate', expected kl or diff: the model has no exit"),
    (dict(n_loop=0), 1, 'n_loop=0, expected at least 1'),
    (dict(kv_budget=5), 1, 'kv_budget=5, expected from 1 to n_loop=4'),
    (dict(kv_budget=0), 1, 'kv_budget=0, expected from 1 to n_loop=4'),
    (dict(lengths=[0, 2]), 2, r'lengths=\[0, 2\], expected from 1 to the 4 tokens'),
    (dict(lengths=[5]), 1, r'lengths=\[5\], expected from 1 to the 4 tokens'),
]


@pytest.mark.parametrize('options, rows, told', REFUSED, ids=[told for _, _, told in REFUSED])
def test_what_does_not_go_together_is_refused_before_the_prompt(options, rows, told, monkeypatch):
    monkeypatch.setattr(Decoder, 'read', None)
    with pytest.raises(ValueError, match=told):
        stream(confident(), IDX[:rows, :4], 5, **options)


def test_an_exit_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="exit='kk', expected one of kl, diff, gate"):
        EarlyExit('kk', 0.1)


def test_generated_ids_can_be_trained_on_and_have_one_length():
    model = confident()
    assert torch.equal(generate(model, IDX[:1, :4], 0), IDX[:1, :4])
    drawn = generate(model, IDX[:2, :4], 3, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 7) and torch.equal(drawn[:, :4], IDX[:2, :4])
    model(drawn, drawn)[1].backward()  # as reinforcement learning does
    with pytest.raises(ValueError, match=r'lengths=\[2, 4\], expected None: all rows have 4 tokens'):
        generate(model, IDX[:2, :4], 3, lengths=[2, 4])


def test_drawing_at_the_edges(monkeypatch):
    model, x = confident(), torch.ones(1, 12)
    for temperature in (1e-38, 1e-50, 1e-5):
        p = Sampler(model, temperature=temperature).probabilities(x)
        assert p.isfinite().all() and p.sum() == 1 and p.max() == 1
    model.lm_head = torch.nn.Identity()
    even = torch.tensor([[0.5, 0.5]]).log()
    assert Sampler(model, top_p=0.5).probabilities(even).count_nonzero() == 1
    p, q = torch.tensor([[0.5 - 2**-24, 0.5]]), torch.tensor([[0.5, 0.5]])  # p - q is nowhere positive
    monkeypatch.setattr(torch, 'rand', lambda n, **options: torch.full((n,), 1 - 2**-24))
    tokens, n_accepted = verify(Sampler(model), p, q, torch.zeros(1, dtype=torch.long))
    assert n_accepted == 0 and tokens.item() in (0, 1)


def chi_square(counts, p):
    """The statistic, and what it exceeds with a probability of about 1e-4 (Wilson and Hilferty)."""
    mean, free = p * counts.sum(), (p > 0).sum().item() - 1
    assert (counts[p == 0] == 0).all()
    value = ((counts - mean) ** 2 / mean)[p > 0].sum().item()
    return value, free * (1 - 2 / (9 * free) + 3.72 * (2 / (9 * free)) ** 0.5) ** 3


@torch.no_grad()
@pytest.mark.parametrize('options', [dict(), dict(temperature=0.7, top_k=4, top_p=0.8)], ids=str)
def test_speculation_draws_from_the_models_distribution(options):
    """block_size 1 makes the model a Markov chain: the transitions of one long stream."""
    model = confident(block_size=1, n_gram=1, n_gram_rows=16384, vocab_size=6)
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(1, 1, dtype=torch.long)
    chain = generate(model, start, 800, generator=generator, speculate=4, **options)[0].tolist()
    counts, tested = torch.zeros(6, 6), 0
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
            tested += 1
    assert tested > 1


@torch.no_grad()
def test_verified_drafts_are_distributed_as_the_verification_says():
    """10,000 draws from a vocabulary of 5, the draft far off."""
    p = torch.tensor([[0.1, 0.5, 0.0, 0.3, 0.1]])
    q = torch.tensor([[0.6, 0.05, 0.25, 0.1, 0.0]])
    sampler = Sampler(None, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(5)
    for draft in torch.multinomial(q[0], 10_000, replacement=True, generator=sampler.generator):
        counts[verify(sampler, p, q, draft[None])[0][0]] += 1
    value, limit = chi_square(counts, p[0])
    assert value < limit
