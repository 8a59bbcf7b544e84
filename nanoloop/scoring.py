"""
Scores items, such as the questions of a test: what a model makes of their texts, for several numbers of loops
and exit policies.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanoloop.count import flops
from nanoloop.early_exit import EarlyExit
from nanoloop.parallel import gather
from nanoloop.text_losses import losses_by_loops, losses_by_policy

ITEMS_AT_ONCE = 256  # items that are rendered together, and then sorted by length


class Text(NamedTuple):
    """Token ids of which some are scored: each of these is predicted from all ids before it."""

    ids: list  # token ids, the beginning-of-text token included
    scored: slice | np.ndarray  # slice(start, end) with start >= 1, or a bool array of the length of ids


class Item(NamedTuple):
    """A question: its texts are the choices, or one."""

    texts: list  # of Text
    info: dict  # what `judge` needs and the file of items shows, plain values: at least index


class Evaluation(NamedTuple):
    """What gives one row of eval.csv for every number of loops or exit policy."""

    name: str  # such as core/arc_easy
    settings: str  # what decides the items beside the name, see results.py
    items: list  # of Item, or another sequence, that makes them when they are asked for
    # (item, ces, predicted) -> what its record has beside item.info, plain values. Of every text ces has the
    # cross-entropies of its scored tokens, a float64 array (k,), and predicted the most likely tokens there,
    # an int array (k,)
    judge: Callable
    summarise: Callable  # the records of all items, in their order -> {column of eval.csv: number}
    # None = score, below; or a function with its arguments, for which `judge` is what it needs
    score: Callable | None = None


class Policy(NamedTuple):
    """How many loops a token takes, and what its cache keeps."""

    n_loop: int  # the most loops
    early_exit: EarlyExit | None = None
    kv_budget: int | None = None  # None = n_loop, which is exact

    @property
    def plain(self):
        """Whether every token takes all loops, exactly. Such policies are computed together."""
        return self.early_exit is None and self.kv_budget is None

    @property
    def name(self):
        """The policy as text, '' for all loops."""
        exits, parts = self.early_exit, []
        if exits is not None:
            least = f' min_loops={exits.min_loops}' if exits.min_loops > 1 else ''
            parts.append(f'exit={exits.name} {exits.threshold:g}{least}')
        if self.kv_budget is not None:
            parts.append(f'kv_budget={self.kv_budget}')
        return ' '.join(parts)

    def flops(self, model, mean_loops):
        """Returns the FLOPs per token of a forward pass with that many loops on average, see count.py."""
        every_loop = self.early_exit is not None and self.early_exit.rule.needs_logits
        one, two = (sum(flops(model, n, n if every_loop else 1)['forward'].values()) for n in (1, 2))
        return one + (mean_loops - 1) * (two - one)


class Result(NamedTuple):
    """What a policy gave."""

    records: list  # of all items, in their order: item.info and what `judge` returned
    mean_loops: float  # per token that went through the model


def score(model, evaluation, policies, m, batch_tokens=8192, tell=lambda done, n: None, reuse=True):
    """Returns a Result per policy. All ranks call it together; rank r takes every world-th item from r on.

    model: in eval mode. m: a Machine. batch_tokens: see text_losses.py. tell: called with the number of items
    that this rank has done, and with the number of all that it has. reuse: the texts of an item share the
    computation of their common beginning.
    """
    plain = [i for i, policy in enumerate(policies) if policy.plain]
    passes = [plain] * bool(plain) + [[i] for i in range(len(policies)) if i not in plain]
    own = range(m.rank, len(evaluation.items), m.world)
    records = [[] for _ in policies]
    loops, tokens = np.zeros(len(policies)), np.zeros(len(policies))  # sums over tokens: of loops, of 1
    for start in range(0, len(own), ITEMS_AT_ONCE):
        items = [evaluation.items[i] for i in own[start : start + ITEMS_AT_ONCE]]
        size = len(items) / len(passes)  # items that a pass counts for
        for n_passes, together in enumerate(passes):
            tell_share = functools.partial(tell_part, tell, start + n_passes * size, size, len(own))
            tell_share(0)
            chosen = [policies[i] for i in together]
            scored, taken = score_texts(model, items, chosen, m, batch_tokens, reuse, tell_share)
            for place, i in enumerate(together):
                records[i] += judge_items(evaluation.judge, items, scored, place)
                loops[i] += sum(n * count for n, count in taken[place].items())
                tokens[i] += sum(taken[place].values())
        tell(start + len(items), len(own))
    ranks = gather(m, (records, loops, tokens))
    mean_loops = sum(part[1] for part in ranks) / sum(part[2] for part in ranks)  # (policies,)
    return [
        Result(interleave([part[0][i] for part in ranks]), float(mean_loops[i])) for i in range(len(policies))
    ]


def tell_part(tell, first, n, total, share):
    """Calls tell, see score, when a share of n items after the `first` is done."""
    tell(int(first + n * share), total)


def score_texts(model, items, policies, m, batch_tokens, reuse, tell):
    """Returns [(ces, predicted)] of all texts of items, each (P, k), for policies that are computed together.

    Also returns per policy {number of loops: tokens that took so many}. tell: called with the share done.
    """
    texts = [text for item in items for text in item.texts]
    if not policies[0].plain:
        scored, taken = losses_by_policy(model, texts, policies[0], m, batch_tokens, tell)
        return scored, [taken]
    groups = [item.texts for item in items] if reuse else [[text] for text in texts]
    loops = [policy.n_loop for policy in policies]
    scored, n_tokens = losses_by_loops(model, groups, loops, m, batch_tokens, tell)
    return scored, [{n: n_tokens} for n in loops]


def judge_items(judge, items, scored, place):
    """Returns the records of items. scored: see score_texts; place: of the policy among its policies."""
    results = iter(scored)
    records = []
    for item in items:
        own = [next(results) for _ in item.texts]
        ces, predicted = ([x[place] for x in arrays] for arrays in zip(*own, strict=True))
        records.append(item.info | judge(item, ces, predicted))
    return records


def interleave(parts):
    """Returns the elements of lists in turns: those of rank r are the world-th ones from r on."""
    merged = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        merged[rank :: len(parts)] = part
    return merged
