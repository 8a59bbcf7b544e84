"""
WikiText and LAMBADA, each by two conventions whose numbers do not compare.

    wikitext       lm-evaluation-harness: detokenised pages, rolling windows of block_size that begin with the
                   end-of-text token, every token scored once; ppl = exp(nll / words), bpb of the page's bytes
    wikitext_rows  all lines as one sequence, the end-of-text token in front of each, cut into blocks of
                   block_size tokens; ppl = exp(nll / tokens)
    lambada        lm-evaluation-harness: the last word behind the text before it, no token in front of it;
                   ppl = exp(mean over texts of the nll of the word)
    lambada_bos    the end-of-text token in front; ppl = exp(nll / tokens of the words)

nll: -log p, summed, in nats. In both of LAMBADA the accuracy is the share of words whose tokens are all the
most likely ones. WikiText: arXiv:1609.07843. LAMBADA: arXiv:1606.06031.
"""

import functools
import hashlib
import math
import re
from pathlib import Path

import numpy as np

from nanoloop.checks import check
from nanoloop.core import context_limit, crop
from nanoloop.hub import HubDocuments, reach_hub
from nanoloop.scoring import Evaluation, Item, Text
from nanoloop.tables import READERS, read_table
from nanoloop.tokenizer import read_text
from nanoloop.uncertainty import mean_and_error, ratio_and_error

HUB = dict(  # arguments of HubDocuments; all have a split `test`
    wikitext=dict(path='EleutherAI/wikitext_document_level', name='wikitext-2-raw-v1', column='page'),
    lambada=dict(path='EleutherAI/lambada_openai', name='default', column='text'),
)

# -----------------------------------------------------------------------------
# files


def read_rows(path, key):
    """Returns (the rows of a table, a dict each, a short hash of where they come from).

    key: the flag and the entry of HUB. path: a file of JSON lines or parquet, '' = from the hub. Raises
    UserError for a file that cannot be read, and without a network.
    """
    if path:
        rows = read_table(path, key)
        return rows, hash_text(repr(rows))
    load = HUB[key]
    with reach_hub(load['path'], key, f'{" or ".join(READERS)} with {load["column"]}'):
        texts = list(HubDocuments(**load).texts(['test']))
    return [{load['column']: text} for text in texts], f'{load["path"]}'


def hash_text(text):
    """Returns a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_wikitext(path):
    """Returns (the raw text of WikiText, its pages, a short hash). A page begins with a title, ` = Title = `.

    path: a raw text, or a table with a column page, or with a column text of lines; '' = from the hub.
    """
    if path and Path(path).suffix not in READERS:
        text = read_text(path)
        source, pages = hash_text(text), split_pages(text)
    else:
        rows, source = read_rows(path, 'wikitext')
        column = next((name for name in ('page', 'text') if name in rows[0]), '')
        check(column, 'wikitext', path, f'a file with page or text, it has {", ".join(rows[0])}')
        for number, row in enumerate(rows, 1):
            where = f'{path}, row {number}: {column}'
            check(isinstance(row.get(column), str), where, row.get(column), 'a text')
        texts = [row[column] for row in rows]
        if column == 'page':
            text, pages = '\n'.join(texts), [page for page in texts if page.strip()]
        else:  # tables of lines have '' for a blank line, ' ' in the raw text
            text = ''.join((line.removesuffix('\n') or ' ') + '\n' for line in texts)
            pages = split_pages(text)
    check(pages, 'wikitext', path, 'a file with text, it is blank')
    return text, pages, source


def split_pages(text):
    """Returns the pages of a raw text: each begins with the line of its title."""
    pages = [[]]
    for line in text.split('\n'):
        if is_title(line):
            pages.append([])
        pages[-1].append(line)
    pages = ['\n'.join(page) for page in pages]
    return [page for page in pages if page.strip()]


def is_title(line):
    """Returns whether a line is ` = Title = `, which begins a page; ` = = Section = = ` does not."""
    line = line.replace('= =', '==').strip()
    return line.startswith('= ') and line.endswith(' =')


# -----------------------------------------------------------------------------
# WikiText

# (text or expression, replacement), in this order, as lm-evaluation-harness restores a text from its words
DETOKENISE = (
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),  # it replaces by the expression itself, and hits nothing
    *((f' @{sign}@ ', sign) for sign in '-,.'),
    *((f' {sign} ', f'{sign} ') for sign in ':;.!?,'),
    (re.compile(r'\(\s*([^\)]*?)\s*\)'), r'(\1)'),
    (re.compile(r'\[\s*([^\]]*?)\s*\]'), r'[\1]'),
    (re.compile(r'{\s*([^}]*?)\s*}'), r'{\1}'),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ('= = = =', '===='),
    ('= = =', '==='),
    ('= =', '=='),
    (' \u00b0 ', '\u00b0'),
    (' \n', '\n'),
    ('\n ', '\n'),
    (' N ', ' 1 '),
    (" 's", "'s"),
)


def detokenise(page):
    """Returns a page of WikiText as it was before blanks were put between its words and signs."""
    for old, new in DETOKENISE:
        page = page.replace(old, new) if isinstance(old, str) else old.sub(new, page)
    return page


def rolling_windows(ids, first, size):
    """Returns Texts in which every one of ids is scored once, by a model of context `size`.

    first: the id in front of the first of ids. The last Text begins early enough to have size + 1 ids, of
    which the model reads all but the last.
    """
    ids = [first, *ids]
    windows = []
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        begin = max(0, end - size - 1)
        windows.append(Text(ids[begin:end], slice(start - begin, end - begin)))
    return windows


def wikitext(c, tokenizer, config, say):
    """Returns the Evaluation of WikiText by the harness's convention, in a list: see the head of the file."""
    _, pages, source = read_wikitext(c.wikitext)
    items = []
    for number, page in enumerate(pages[: c.max_per_task]):
        windows = rolling_windows(tokenizer.encode(detokenise(page)), tokenizer.eot_token, config.block_size)
        for i, window in enumerate(windows):
            # words and bytes of the page before detokenisation, counted once
            size = dict(words=len(re.split(r'\s+', page)), bytes=len(page.encode())) if i == 0 else {}
            items.append(Item([window], dict(index=len(items), page=number, **size)))
    settings = f'max_per_task={c.max_per_task} data={source}'
    return [Evaluation('wikitext', settings, items, sum_losses, summarise_pages)]


def wikitext_rows(c, tokenizer, config, say):
    """Returns the Evaluation of WikiText as one sequence of lines, in a list. See the head of this file."""
    text, _, source = read_wikitext(c.wikitext)
    # as in the tables of the hub, a blank line is ''
    lines = [f'{line}\n' if line.strip() else '' for line in text.removesuffix('\n').split('\n')]
    ids = [i for line in lines for i in (tokenizer.eot_token, *tokenizer.encode(line))]
    size = config.block_size
    blocks = [ids[start : start + size + 1] for start in range(0, len(ids) - size, size)][: c.max_per_task]
    check(blocks, 'wikitext', c.wikitext, f'a text of more than block_size={size} tokens')
    items = [Item([Text(block, slice(1, size + 1))], dict(index=i)) for i, block in enumerate(blocks)]
    settings = f'max_per_task={c.max_per_task} data={source}'
    return [Evaluation('wikitext_rows', settings, items, sum_losses, summarise_blocks)]


def sum_losses(item, ces, predicted):
    """Returns the record of an item with one text: the sum of its cross-entropies and their number."""
    return dict(nll=float(ces[0].sum()), tokens=len(ces[0]))


def values(records, key):
    """Returns the values of a key in all records, 0 where there is none, float64 (n,)."""
    return np.array([record.get(key, 0) for record in records], dtype=np.float64)


def exponential(x):
    """Returns exp(x) as a finite number."""
    return math.exp(min(x, 700))


def summarise_pages(records):
    """Returns word perplexity and bits per byte of the records of windows; an item is a page."""
    page = [record['page'] for record in records]
    nll, tokens, words, size = (
        np.bincount(page, values(records, key)) for key in ('nll', 'tokens', 'words', 'bytes')
    )
    loss, error = ratio_and_error(nll, tokens)
    return dict(
        loss=loss,
        loss_se=error,
        ppl=exponential(nll.sum() / words.sum()),
        bpb=float(nll.sum() / size.sum() / math.log(2)),
        items=len(nll),
        tokens=int(tokens.sum()),
        note='ppl per word, pages (lm-evaluation-harness)',
    )


def summarise_blocks(records):
    """Returns token perplexity of the records of blocks."""
    loss, error = ratio_and_error(values(records, 'nll'), values(records, 'tokens'))
    tokens = int(values(records, 'tokens').sum())
    note = 'ppl per token, lines as one sequence'
    return dict(loss=loss, loss_se=error, ppl=exponential(loss), tokens=tokens, note=note)


# -----------------------------------------------------------------------------
# LAMBADA


def lambada(c, tokenizer, config, say, bos=False):
    """Returns the Evaluation of LAMBADA by the harness's convention, in a list. See the head of this file.

    bos: by the other convention, the end-of-text token in front.
    """
    rows, source = read_rows(c.lambada, 'lambada')
    limit = context_limit(config)
    limit = limit and limit + 1  # the model reads all tokens but the last
    items = []
    for index, row in enumerate(rows[: c.max_per_task]):
        text = text_of(row, f'{c.lambada}, row {index + 1}')
        context = tokenizer.encode(text[: text.rindex(' ')].rstrip() if ' ' in text else '')
        ids = tokenizer.encode(text)
        first = [tokenizer.eot_token] if bos or not context else []
        start = min(len(context), len(ids) - 1) + len(first)
        scored, cut = crop([*first, *ids], start, limit)
        info = dict(index=index, target=scored.ids[scored.scored])
        items.append(Item([scored], dict(info, cut=True) if cut else info))
    settings = f'max_per_task={c.max_per_task} data={source}'
    summary = functools.partial(summarise_words, per_text=not bos)
    return [Evaluation('lambada_bos' if bos else 'lambada', settings, items, judge_word, summary)]


lambada_bos = functools.partial(lambada, bos=True)


def text_of(row, where):
    """Returns the text of a row of LAMBADA: its text, or context and continuation as CORE's file has them."""
    if 'text' not in row and 'context' in row:
        row = dict(text=f'{row["context"]} {row.get("continuation")}')
    text = row.get('text')
    check(isinstance(text, str) and text.strip(), f'{where}: text', text, 'a text that is not blank')
    return text


def judge_word(item, ces, predicted):
    """Returns the record of a word: right if all its tokens are the most likely ones."""
    tokens = [int(i) for i in predicted[0]]
    right = tokens == item.info['target'] and not item.info.get('cut')
    return dict(sum_losses(item, ces, predicted), predicted=tokens, correct=int(right))


def summarise_words(records, per_text):
    """Returns accuracy and perplexity, per text or per token of the words."""
    nll, tokens = values(records, 'nll'), values(records, 'tokens')
    loss, loss_error = ratio_and_error(nll, tokens)
    accuracy, error = mean_and_error(values(records, 'correct'))
    return dict(
        loss=loss,
        loss_se=loss_error,
        ppl=exponential(nll.mean() if per_text else loss),
        accuracy=accuracy,
        accuracy_se=error,
        tokens=int(tokens.sum()),
        note='ppl per word, no BOS (lm-evaluation-harness)' if per_text else 'ppl per token, with BOS',
    )
