"""Scores of texts equal those of a whole forward pass per text; the errors cover what they should."""

import itertools
import math
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import randomize

import nanoloop.scoring as scoring
from model import GPT, GPTConfig
from nanoloop.early_exit import EarlyExit
from nanoloop.scoring import Evaluation, Item, Policy, Text, score
from nanoloop.text_losses import batches, common_prefix, pack
from nanoloop.uncertainty import mean_and_error, ratio_and_error

SIZES = dict(block_size=16, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=3)
SIZES.update(n_gram=4, n_gram_rows=64)
MODELS = [
    dict(pos='rope'),
    dict(pos='learned'),
    dict(pos='rope', window_pattern='SL', window_size=3),
    dict(pos='rope', input_injection='query_all', state_init='none'),
    dict(pos='rope', state_init='random'),
]


def machine(rank=0, world=1):
    place = dict(rank=rank, world=world, kind='cpu', cpu_group=None)
    return types.SimpleNamespace(**place, autocast=nullcontext, to_device=lambda x: x)


def make_model(**changes):
    model = GPT(GPTConfig(**SIZES, **changes)).double().eval()
    randomize(model)
    return model


def make_items(longest):
    """Returns items with one text, with choices behind a common beginning, and with scored tokens in it."""
    rng = np.random.default_rng(0)

    def ids(n):
        return rng.integers(SIZES['vocab_size'], size=n).tolist()

    question = ids(5)
    mask = rng.random(9) < 0.5
    mask[0] = False
    endings = [question + ids(n) for n in (3, 1, 4)]
    long = ids(longest - 4)  # a common beginning that, without learned positions, is beyond block_size
    long_endings = [long + ids(n) for n in (3, 4)]
    texts = [
        [Text(ids(4), slice(1, 4))],
        [Text(end, slice(5, len(end))) for end in endings],
        [Text(ids(9), mask)],
        [Text(question + [1, 2, 3], slice(7, 8)), Text(question[:2] + [22, 21], slice(1, 4))],
        [Text(end, slice(len(long), len(end))) for end in long_endings],
        [Text(ids(longest), slice(longest - 3, longest))],
        [Text(question, slice(4, 5)), Text(question + [3], slice(4, 6))],  # one is the start of another
        [Text([1, 2], slice(2, 2))],  # nothing is scored
    ]
    return [Item(part, dict(index=i)) for i, part in enumerate(texts)]


def keep_all(item, ces, predicted):
    return dict(ces=[x.tolist() for x in ces], predicted=[x.tolist() for x in predicted])


def evaluation(items):
    return Evaluation('x', '', items, keep_all, None)


def by_forward(model, text, n_loop):
    """Returns the cross-entropies and most likely tokens of a text from a forward pass over it alone."""
    with torch.no_grad():
        (s,), attn_inputs = model.loop_states(torch.tensor([text.ids])[:, :-1], n_loop)
        log_p = model.logits(model.run_coda(s, attn_inputs))[0].log_softmax(dim=-1)
    places = np.arange(len(text.ids))[text.scored]
    return -log_p[places - 1, np.array(text.ids)[places]], log_p[places - 1].argmax(dim=-1)


@pytest.mark.parametrize('changes', MODELS)
@pytest.mark.parametrize('reuse', [True, False])
def test_loops_together_and_exact_policies_equal_a_forward_pass_per_text(changes, reuse):
    model = make_model(**changes)
    items = make_items(17 if changes['pos'] == 'learned' else 40)
    never = EarlyExit('diff', 0.0)
    policies = [Policy(3), Policy(1), Policy(2), Policy(3, kv_budget=3), Policy(2, never)]
    results = score(model, evaluation(items), policies, machine(), batch_tokens=40, reuse=reuse)
    for policy, result in zip(policies, results, strict=True):
        assert result.mean_loops == policy.n_loop
        assert [record['index'] for record in result.records] == list(range(len(items)))
        for item, record in zip(items, result.records, strict=True):
            for text, ces, tokens in zip(item.texts, record['ces'], record['predicted'], strict=True):
                expected, top = by_forward(model, text, policy.n_loop)
                assert np.allclose(ces, expected, rtol=0, atol=1e-10) and tokens == top.tolist()


def test_a_smaller_cache_scores_what_generating_token_by_token_would():
    from nanoloop.decode import Decoder

    model, items = make_model(pos='rope'), [make_items(12)[i] for i in (0, 5, 7)]
    (result,) = score(model, evaluation(items), [Policy(3, kv_budget=1)], machine())
    for item, record in zip(items, result.records, strict=True):
        (text,) = item.texts
        decoder, start = Decoder(model, 1, n_loop=3, kv_budget=1), text.scored.start
        ids = torch.tensor([text.ids])
        with torch.inference_mode():
            xs = [decoder.prefill(ids[:, : start - 1])] if start > 1 else []
            xs += [decoder.prefill(ids[:, i : i + 1]) for i in range(start - 1, ids.size(1) - 1)]
            log_p = model.logits(torch.cat(xs, dim=1))[0].log_softmax(dim=-1)
        expected = [-log_p[i - 1, text.ids[i]].item() for i in range(start, len(text.ids))]
        exact, _ = by_forward(model, text, 3)
        assert np.allclose(record['ces'][0], expected, rtol=0, atol=1e-10)
        assert not expected or not np.allclose(expected, exact, atol=1e-4)


def test_exits_score_the_decoders_tokens_and_count_its_loops():
    from nanoloop.decode import Decoder

    model, items = make_model(pos='rope'), make_items(14)
    policy = Policy(3, EarlyExit('kl', 0.3))
    (result,) = score(model, evaluation(items), [policy], machine(), batch_tokens=30)
    loops, tokens = 0, 0
    for item in items:
        for text in item.texts:
            decoder = Decoder(model, 1, n_loop=3, early_exit=policy.early_exit)
            with torch.inference_mode():
                decoder.prefill(torch.tensor([text.ids[:-1]]))
            loops, tokens = loops + int(decoder.loops.sum()), tokens + decoder.loops.numel()
    assert 1 < loops / tokens < 3 and result.mean_loops == pytest.approx(loops / tokens)
    every_loop, once = Policy(3, policy.early_exit).flops(model, 3.0), Policy(3).flops(model, 3.0)
    assert every_loop > once  # its rule reads coda and head after every loop


def test_two_ranks_give_what_one_gives(monkeypatch):
    model, items, policies = make_model(pos='rope'), make_items(12), [Policy(1), Policy(3)]
    parts = []
    monkeypatch.setattr(scoring, 'gather', lambda m, value: parts.append(value) or [value])
    for rank in (0, 1):
        score(model, evaluation(items), policies, machine(rank, 2))
    monkeypatch.setattr(scoring, 'gather', lambda m, value: parts)
    both = score(model, evaluation(items), policies, machine(0, 2))
    monkeypatch.setattr(scoring, 'gather', lambda m, value: [value])
    alone = score(model, evaluation(items), policies, machine())
    for a, b in zip(both, alone, strict=True):
        assert a.mean_loops == b.mean_loops and [r['index'] for r in a.records] == list(range(len(items)))
        for x, y in zip(a.records, b.records, strict=True):
            assert x['predicted'] == y['predicted']
            assert all(np.allclose(p, q, atol=1e-12) for p, q in zip(x['ces'], y['ces'], strict=True))


def test_a_common_beginning_is_computed_once():
    texts = [Text([1, 2, 3, 4, 5, n, n], slice(5, 7)) for n in (7, 8, 9)]
    assert len(pack(texts).idx) == 5 + 3
    starts = pack([Text([1, 2], slice(1, 2)), Text([1, 2, 3], slice(1, 3))])  # inputs 1, and 1 2
    assert starts.idx.tolist() == [1, 2] and starts.branch.tolist() == [0, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == 2


def test_a_batch_has_at_most_batch_tokens_or_one_row():
    lengths = [5, 30, 7, 7, 1, 12]
    made = list(batches(lengths, 24))
    assert sorted(itertools.chain(*made)) == list(range(6)) and [1] in made and len(made) < 6
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 24 for batch in made)


def test_intervals_of_two_standard_errors_cover_the_truth():
    rng = np.random.default_rng(0)
    inside = {name: 0 for name in ('mean', 'ratio')}
    for _ in range(1000):
        mean, error = mean_and_error(rng.random(300) < 0.3)
        inside['mean'] += abs(mean - 0.3) < 1.96 * error
        counts = rng.integers(1, 40, 200)  # tokens of a window, whose losses share the window's difficulty
        ratio, error = ratio_and_error(counts * (2 + rng.normal(0, 0.5, 200)), counts)
        inside['ratio'] += abs(ratio - 2) < 1.96 * error
    assert all(920 <= n <= 980 for n in inside.values()), inside


def test_errors_equal_a_calculation_by_hand():
    assert mean_and_error([1, 0, 0, 1, 1]) == pytest.approx((0.6, math.sqrt(0.3 / 5)))
    assert mean_and_error([2.0])[0] == 2.0 and math.isnan(mean_and_error([2.0])[1])
    assert ratio_and_error([2, 4, 6], [1, 1, 1]) == pytest.approx(mean_and_error([2, 4, 6]))
