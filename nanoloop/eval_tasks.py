"""
The tasks of eval.py, and the loss on a data set, which is one of them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nanoloop import chat_eval, core, generated_eval, perplexity
from nanoloop.added_tokens import extends
from nanoloop.checks import UserError, check
from nanoloop.datasets import find_data, identify, open_split, read_meta
from nanoloop.scoring import Evaluation, Item, Text
from nanoloop.uncertainty import ratio_and_error


class Windows(Sequence):
    """The evaluation windows of a split as Items, read when they are asked for. n: how many, 0 = all."""

    def __init__(self, split, n):
        self.split, self.windows = split, split.eval_windows(n or None)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        inputs, targets = self.split.read_window(*self.windows[i])  # (T,) each, targets of -1 do not count
        counted = np.append(False, targets != -1)  # (T + 1,)
        last = counted.nonzero()[0].max(initial=1)  # behind it is padding
        ids = [*inputs[:last].tolist(), max(int(targets[last - 1]), 0)]
        return Item([Text(ids, counted[: last + 1])], dict(index=i))


def loss(c, tokenizer, config, say):
    """Returns the Evaluation of the loss on windows of a data set, end to end: a list of one.

    c: the keys dataset ('' = that of the checkpoint), split and windows of eval.py. Raises UserError for data
    that is missing or has other tokens.
    """
    check(c.dataset, 'dataset', c.dataset, 'a data set, the checkpoint names none')
    folder = find_data(c.dataset)
    meta = read_meta(folder)
    own, others = (spec['kind'] for spec in (tokenizer.spec, meta['tokenizer']))
    expected = f'one in the tokens of the model, of kind {own}, not {others}'
    check(extends(tokenizer.spec, meta['tokenizer']), 'dataset', c.dataset, expected)
    split = open_split(folder, meta, c.split, config.block_size, config.vocab_size)
    data = identify(folder, meta)['sha256'][:8]
    settings = f'dataset={c.dataset} split={c.split} windows={c.windows} data={data}'
    judge = functools.partial(judge_window, token_bytes=np.array(meta['token_bytes']))
    return [Evaluation('loss', settings, Windows(split, c.windows), judge, summarise_windows)]


def judge_window(item, ces, predicted, token_bytes):
    """Returns the record of a window: sums over its targets, and over those that have bytes."""
    text = item.texts[0]
    sizes = token_bytes[np.asarray(text.ids)[text.scored]]  # (k,)
    nll = float(ces[0].sum())
    nll_of_bytes = float(ces[0][sizes > 0].sum())
    return dict(nll=nll, tokens=len(sizes), nll_of_bytes=nll_of_bytes, bytes=int(sizes.sum()))


def summarise_windows(records):
    """Returns the columns of a loss: per target, with windows as independent items for the standard error."""
    nll, tokens, nll_of_bytes, size = (
        perplexity.values(records, key) for key in ('nll', 'tokens', 'nll_of_bytes', 'bytes')
    )
    if not tokens.sum():
        raise UserError('the split has no target that counts: its mask leaves none')
    value, error = ratio_and_error(nll, tokens)
    columns = dict(loss=value, loss_se=error, ppl=perplexity.exponential(value), tokens=int(tokens.sum()))
    if size.sum():
        columns['bpb'] = float(nll_of_bytes.sum() / math.log(2) / size.sum())
    return columns


class EvalTask(NamedTuple):
    """A task of eval.py."""

    load: Callable  # (c, tokenizer, config, say) -> a list of Evaluation; c: the keys of eval.py
    # the rows of the Evaluations, with one number of loops and policy -> {column: value} of the row of the
    # task itself; None = there is no such row
    combine: Callable | None = None


TASKS = {
    'loss': EvalTask(loss),
    'wikitext': EvalTask(perplexity.wikitext),
    'wikitext_rows': EvalTask(perplexity.wikitext_rows),
    'lambada': EvalTask(perplexity.lambada),
    'lambada_bos': EvalTask(perplexity.lambada_bos),
    'core': EvalTask(core.core, core.combine),
    'mano': EvalTask(generated_eval.mano, generated_eval.combine),
    'p_hop': EvalTask(generated_eval.p_hop, generated_eval.combine),
    **{name: EvalTask(functools.partial(chat_eval.chat_task, name)) for name in chat_eval.TASKS},
    'chatcore': EvalTask(chat_eval.chatcore, chat_eval.combine),
}
