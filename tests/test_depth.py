"""Continuous depth batching: rows that do not wait for each other, against rows in step and rows alone."""

import itertools

import pytest
import torch
from decoding import IDX, dividing_threshold, gated
from helpers import TABLES, pairwise

from model import POS, Injection, LoopPart
from nanoloop import depth
from nanoloop.depth import LoopBatch
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.generate import Generation
from nanoloop.rollout import roll_out

N_TOKENS, LENGTHS = 14, [4, 9, 1, 6, 7]
PROMPTS = torch.randint(23, (5, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def loops_seen(monkeypatch):
    """Records, for every run of a loop, the loops at which its rows are. Rows go apart in every model.

    No rule is asked about no rows.
    """
    monkeypatch.setattr(depth, 'MOST_OUTSIDE', 99)
    rule = EarlyExit.__call__

    def exits(early_exit, model, i, previous, s, x, memory):
        assert len(s)
        return rule(early_exit, model, i, previous, s, x, memory)

    monkeypatch.setattr(EarlyExit, '__call__', exits)
    seen, real = [], LoopBatch.run_one_loop
    monkeypatch.setattr(LoopBatch, 'run_one_loop', lambda batch: seen.append([*batch.taken]) or real(batch))
    return seen


def texts_and_stats(model, idx, lengths, **options):
    generation = Generation(model, idx, lengths, temperature=0, **options)
    return torch.stack([*generation.stream(N_TOKENS)], dim=1), generation.stats


@torch.inference_mode()
@pytest.mark.parametrize(
    'case',
    pairwise(
        rule=EXIT, pos=POS, budget=(None, 1, 3), warm_start=(False, True), min_loops=(1, 2),
        share=(0.1, 0.5, 0.8),
        keys=({}, dict(input_injection='query_all', state_init='random', n_prelude=0, n_coda=0)),
    ),
    ids=str,
)  # fmt: skip
def test_rows_that_do_not_wait_get_the_tokens_of_rows_alone(case, monkeypatch, loops_seen):
    """Greedy, in float64: tokens and numbers of loops."""
    monkeypatch.setattr('nanoloop.depth.SHARE_TO_DRAW', case['share'])
    model, rule = gated(block_size=32, pos=case['pos'], **case['keys']), case['rule']
    threshold = dividing_threshold(model, rule, IDX[0, :12])
    exit = EarlyExit(rule, threshold, case['min_loops'])
    options = dict(early_exit=exit, kv_budget=case['budget'], warm_start=case['warm_start'])
    apart, stats = texts_and_stats(model, PROMPTS, LENGTHS, **options)
    together = case['pos'] == 'learned' and case['warm_start']  # rows are computed in step
    assert any(len({*loops}) > 1 for loops in loops_seen) != together
    loops_seen.clear()
    in_step, stats_in_step = texts_and_stats(model, PROMPTS, LENGTHS, lockstep=True, **options)
    assert all(len({*loops}) == 1 for loops in loops_seen)
    assert torch.equal(apart, in_step) and stats == stats_in_step and len(stats.loops_taken) > 1
    for row, n, text in zip(PROMPTS, LENGTHS, apart, strict=True):
        assert torch.equal(texts_and_stats(model, row[None, :n], None, **options)[0][0], text)


@torch.inference_mode()
@pytest.mark.parametrize('pos', POS)
@pytest.mark.parametrize('rule', EXIT)
def test_a_stream_of_rows_apart_can_be_left_and_answered(rule, pos, loops_seen):
    """Turns that are left early, each followed by tokens from elsewhere, as with rows in step; learned
    positions restart in between. A stream that goes on gives the text of one that was not left.
    """
    model = gated(block_size=24, pos=pos)
    exit = EarlyExit(rule, dividing_threshold(model, rule, IDX[0, :12]))
    rows = [
        Generation(model, PROMPTS, LENGTHS, temperature=0, early_exit=exit, lockstep=lockstep)
        for lockstep in (False, True)
    ]
    ahead = 0
    for turn, n in enumerate((3, 5, 1, 4)):
        texts = []
        for generation in rows:
            text = [*itertools.islice(generation.stream(7), n)]
            text += itertools.islice(generation.stream(6), 2)  # learned positions: too few are left for all 6
            texts.append(torch.stack(text))
            ahead += generation.apart is not None and max(generation.apart.made) > generation.apart.n_yielded
            generation.extend(PROMPTS[:, :3], [1, 3, 2, 3, 1])
        assert torch.equal(*texts), turn
        assert rows[0].stats == rows[1].stats  # without what was ahead and is dropped
        assert rows[0].decoder.cache.lengths == rows[1].decoder.cache.lengths
    assert ahead and any(len({*loops}) > 1 for loops in loops_seen)


@torch.inference_mode()
def test_a_row_is_ahead_by_a_limited_number_of_tokens(monkeypatch, loops_seen):
    """And never by more than are asked for."""
    monkeypatch.setattr('nanoloop.generate.MOST_AHEAD', 3)
    model = gated()
    exit = EarlyExit('diff', dividing_threshold(model, 'diff', IDX[0, :12]))
    generation, most = Generation(model, PROMPTS, LENGTHS, temperature=0, early_exit=exit), 0
    for left, _ in zip(range(20, 0, -1), generation.stream(20), strict=True):
        if generation.apart is not None:
            ahead = [made - generation.apart.n_yielded for made in generation.apart.made]
            assert max(ahead) <= min(2, left - 1)  # besides the one that was yielded
            most = max(most, *ahead)
    assert most == 2 and generation.apart is None
    assert generation.decoder.cache.lengths == [n + 19 for n in LENGTHS]


def test_tokens_of_rows_apart_cannot_be_replaced():
    model = gated(n_prelude=0, n_coda=0)
    generation = Generation(model, PROMPTS, LENGTHS, early_exit=EarlyExit('diff', 0.5))
    next(generation.stream(3))
    with pytest.raises(ValueError, match='lockstep=False, expected True where tokens are replaced'):
        generation.replace(PROMPTS[:, 0])


@pytest.mark.parametrize(
    'keys, n_rows, apart',
    [
        (dict(n_prelude=0, n_coda=0), 2, True),
        (dict(n_prelude=0, n_coda=0), 1, False),
        (dict(n_prelude=0, n_coda=1), 2, True),
        (dict(n_prelude=1, n_coda=1), 2, False),
        (dict(n_prelude=0, n_coda=0, input_injection='add', state_init='none'), 2, False),
        (dict(n_prelude=0, n_coda=0, lockstep=True), 2, False),
        (dict(n_prelude=0, n_coda=0, compile=True), 2, False),
        (dict(n_prelude=0, n_coda=0, pos='learned', warm_start=True), 2, False),
    ],
)
def test_rows_go_apart_where_that_is_possible_and_pays(keys, n_rows, apart):
    options = {key: keys[key] for key in ('lockstep', 'warm_start', 'compile') if key in keys}
    model = gated(**{key: value for key, value in keys.items() if key not in options})
    for exit in (None, EarlyExit('diff', 0.1)):
        generation = Generation(model, PROMPTS[:n_rows], early_exit=exit, **options)
        assert generation.may_go_apart == (apart and exit is not None)


@pytest.mark.parametrize('table', ['input_injection', 'state_update'])
def test_rows_of_a_model_that_reads_the_loops_index_stay_together(table, monkeypatch):
    base = Injection if table == 'input_injection' else LoopPart
    part = type('Part', (base,), dict(reads_loop=True, forward=lambda self, e, s, i: e + s / (i + 1)))
    monkeypatch.setitem(TABLES[table], 'indexed', part)
    model = gated(n_prelude=0, n_coda=0, **{table: 'indexed'})
    assert not Generation(model, PROMPTS, early_exit=EarlyExit('diff', 0.1)).may_go_apart


@torch.inference_mode()
def test_rollouts_draw_the_tokens_of_all_rows_together():
    """Their sampler records what it has drawn for every row, and a tool replaces tokens."""
    model = gated(n_prelude=0, n_coda=0)
    exit = EarlyExit('diff', dividing_threshold(model, 'diff', IDX[0, :12]))
    prompts = [row[:n].tolist() for row, n in zip(PROMPTS, LENGTHS, strict=True)]
    rollouts = roll_out(model, prompts, N_TOKENS, temperature=0, early_exit=exit)
    text, stats = texts_and_stats(model, PROMPTS, LENGTHS, early_exit=exit)
    assert rollouts.answers == text.tolist() and rollouts.stats.loops_taken == stats.loops_taken
    forced = roll_out(model, prompts, 6, tool=lambda ids: [7, 8], temperature=0, early_exit=exit)
    assert all(ids[1:3] == ids[4:6] == [7, 8] for ids in forced.answers)
