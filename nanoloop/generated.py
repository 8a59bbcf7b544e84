"""
Data sets that are made while they are needed: rows of a task that loops are for, with one answer each.

    --dataset=mano:10     at most 10 operations in F_23; mano alone is the same
    --dataset=p_hop:4     at most 4 hops of an induction head; p_hop alone is the same

A row is a question, the mark <ans>, the answer, and padding. Only the answer is a target. Whether a row
belongs to val is a hash of its question: about 1 of 16 does. So train and val have no question in common,
whatever the seed and the step. Mano's questions with one operation are the exception: they are the tables
that the others need, and belong to both. Training draws a row's difficulty uniformly.
"""

import functools
import re

import numpy as np

from nanoloop.checks import UserError, check
from nanoloop.files import hash_json

HELD_OUT = 16  # one of so many questions belongs to val
WINDOWS = 10000  # rows of a split that evaluations during training can read
CHUNK = 8192  # rows that are drawn at a time
MODULUS = 23  # of Mano's arithmetic


class Generated:
    """Base class of the tasks. A subclass has these attributes and methods:

    version: a number that changes with the rows that are drawn; runs on other versions have other data
    task: its name in GENERATED; unit: what the size counts, a text
    default, largest: the size of a name without a number, and the largest one
    level, level_word: the name of a difficulty, and how its word begins; difficulties are 1 to size
    tables: questions of at most this difficulty belong to both splits; 0 = none does
    words: the vocabulary; a word's place is its id, and <bos> is the first
    row_len: the number of tokens of a row
    draw_rows(rng, levels): rows of these difficulties, ids (n, row_len) with <bos> and padding
    answer_places(levels): the places of the answers in rows of these difficulties, (n,)
    majority(level): the share of rows of a difficulty whose answer is the most common one
    """

    def __init__(self, size):
        self.size, self.name = size, f'{self.task}:{size}'

    def draw(self, rng, n, split, level=None):
        """Draws n rows of a split with a numpy Generator.

        level: their difficulty; None = each row's is uniform. Returns (rows (n, row_len) int64, levels (n,)).
        """
        rows, levels, missing = [], [], n
        share = 1 / HELD_OUT if split == 'val' else 1 - 1 / HELD_OUT
        while missing > 0:
            drawn = min(CHUNK, int(missing / share * 1.1) + 8)  # mostly enough
            new = rng.integers(1, self.size + 1, drawn) if level is None else np.full(drawn, level)
            made = self.draw_rows(rng, new)  # (drawn, row_len)
            fits = self.held_out(made, new) == (split == 'val')
            tables = new <= self.tables
            fits[tables] = rng.random(tables.sum()) < share  # as often as without tables
            rows.append(made[fits][:missing])
            levels.append(new[fits][:missing])
            missing -= len(rows[-1])
        return np.concatenate(rows), np.concatenate(levels)

    def held_out(self, rows, levels):
        """Returns for every row whether its question belongs to val, (n,) bool."""
        ends = self.answer_places(levels)[:, None]
        questions = np.where(np.arange(self.row_len) < ends, rows, 0)  # (n, row_len): 0 counts nothing
        return hash_rows(questions) % HELD_OUT == 0

    def meta(self):
        """Returns what meta.json holds of a data set in files, see datasets.py."""
        files = {
            split: [dict(name=self.name, tokens=WINDOWS * self.row_len, sha256=self.fingerprint(split))]
            for split in ('train', 'val')
        }
        return dict(
            vocab_size=len(self.words),
            max_id=len(self.words) - 1,
            dtype='uint16',
            tokenizer=dict(kind='words', words=self.words),
            token_bytes=[0] * len(self.words),
            source=f'{self.name}, generated, version {self.version}',
            row_len=self.row_len,
            splits={name: dict(tokens=WINDOWS * self.row_len, files=files[name]) for name in files},
        )

    def fingerprint(self, split):
        """Returns the hash that stands for a split's rows: name and version decide them."""
        return hash_json([self.name, self.version, split])

    def describe(self):
        """Returns the line that a run says about its data."""
        kind = f'rows of {self.row_len} tokens of {len(self.words)} words'
        return f'data set {self.name}: {kind}, drawn when they are needed; 1 of {HELD_OUT} is held out (val)'


def hash_rows(rows):
    """Returns a 64-bit hash of each row of ids (n, k): a weighted sum modulo 2^64, mixed as in splitmix64."""
    weights = mix(np.arange(1, rows.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)  # (k,)
    return mix((rows.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64))


def mix(x):
    """Returns the output function of splitmix64 of each number, uint64."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# -----------------------------------------------------------------------------
# the tasks


class Mano(Generated):
    """Arithmetic in F_23: <bos> <len_l> expression <ans> answer, in prefix notation with l operations.

    An expression with l > 0 operations is an operator and two expressions; the left one has 0 to l - 1
    operations, uniformly. Operators + - * and the numbers at the leaves are uniform, too.
    Source: Physics of Language Models, part 4; one question per row, as in Ouro, arXiv:2510.25741.
    """

    task, version, unit, default, largest = 'mano', 2, 'operations', 10, 64
    level, level_word, tables = 'l', '<len_', 1
    OPERATORS = '+-*'
    BOS, ANSWER, PAD, FIRST_OPERATOR, FIRST_NUMBER = 0, 1, 2, 3, 6
    FIRST_LENGTH = FIRST_NUMBER + MODULUS

    def __init__(self, size):
        super().__init__(size)
        lengths = [f'<len_{n}>' for n in range(1, size + 1)]
        self.words = ['<bos>', '<ans>', '<pad>', *self.OPERATORS, *map(str, range(MODULUS)), *lengths]
        self.row_len = 2 * size + 5

    def answer_places(self, levels):
        return 2 * levels + 4

    def draw_rows(self, rng, levels):
        n, each = len(levels), np.arange(len(levels))
        expressions = self.draw_expressions(rng, levels)  # (n, 2 size + 1)
        rows = np.full((n, self.row_len), self.PAD)
        rows[:, 0], rows[:, 1] = self.BOS, self.FIRST_LENGTH + levels - 1
        rows[:, 2:-2] = expressions
        rows[each, 2 * levels + 3] = self.ANSWER
        rows[each, 2 * levels + 4] = self.FIRST_NUMBER + self.evaluate(expressions)
        return rows

    def draw_expressions(self, rng, levels):
        """Draws an expression for each number of operations. Returns ids (n, 2 size + 1), padded."""
        n, each, places = len(levels), np.arange(len(levels)), 2 * self.size + 1
        split = rng.random((n, places))
        operators = self.FIRST_OPERATOR + rng.integers(len(self.OPERATORS), size=(n, places))
        numbers = self.FIRST_NUMBER + rng.integers(MODULUS, size=(n, places))
        ids = np.full((n, places), self.PAD)
        pending = np.zeros((n, self.size + 2), np.int64)  # operations of the expressions still to come
        pending[:, 0], depth = levels, np.ones(n, np.int64)
        for place in range(2 * levels.max(initial=0) + 1):
            running = depth > 0
            inner = pending[each, depth - 1]  # of the next expression; without meaning where none is left
            branches = running & (inner > 0)
            ids[:, place] = np.where(
                branches, operators[:, place], np.where(running, numbers[:, place], self.PAD)
            )
            left = (split[:, place] * inner).astype(np.int64)
            rows = each[branches]
            pending[rows, depth[rows] - 1] = (inner - 1 - left)[rows]  # the right one comes after the left
            pending[rows, depth[rows]] = left[rows]
            depth = depth + np.where(branches, 1, -running.astype(np.int64))
        return ids

    def evaluate(self, ids):
        """Returns the values of expressions, ids (n, 2 size + 1), from the right to the left with a stack."""
        each = np.arange(len(ids))
        stack, depth = np.zeros((len(ids), self.size + 2), np.int64), np.zeros(len(ids), np.int64)
        for column in ids.T[::-1]:
            leaf, node = column >= self.FIRST_NUMBER, (column >= self.FIRST_OPERATOR)
            node &= ~leaf
            stack[each[leaf], depth[leaf]] = column[leaf] - self.FIRST_NUMBER
            rows, last = each[node], depth[node] - 1
            a, b = stack[rows, last], stack[rows, last - 1]  # the left operand was read last
            values = np.stack((a + b, a - b, a * b)) % MODULUS
            stack[rows, last - 1] = values[column[node] - self.FIRST_OPERATOR, np.arange(len(rows))]
            depth += leaf.astype(np.int64) - node
        return stack[:, 0]

    def majority(self, level):
        return float(value_distribution(level).max())


@functools.cache
def value_distribution(operations):
    """Returns the exact probabilities of the values of Mano's expressions by their operations, (23,)."""
    if operations == 0:
        return np.full(MODULUS, 1 / MODULUS)
    a, b = np.indices((MODULUS, MODULUS))
    result = np.zeros(MODULUS)
    for left in range(operations):
        both = np.outer(value_distribution(left), value_distribution(operations - 1 - left))  # (23, 23)
        for value in (a + b, a - b, a * b):
            result += np.bincount((value % MODULUS).ravel(), both.ravel()) / (3 * operations)
    return result


class PHop(Generated):
    """p-hop induction: <bos> <hops_k> context <ans> answer, over an alphabet of 8 letters.

    A hop goes from a letter of the context to the letter that follows its last occurrence before. The answer
    is where k hops from the last letter end. Source: Sanford et al., arXiv:2402.09268, for the function.

    The context is size + 1 blocks. A block has all letters in random order, and no letter follows itself. So
    k hops never leave the context. Counting letters says nothing of the answer, and by symmetry a fixed
    letter is right in 1 of 8 rows. Every hop leads into the block before: rows in which one leads to the
    first letter of its own block are drawn anew. Otherwise that letter would be the answer in 1 of 4 rows
    with one hop. The letter at a fixed place is right in at most 1 of 7 rows.
    """

    task, version, unit, default, largest = 'p_hop', 1, 'hops', 4, 32
    level, level_word, tables = 'hops', '<hops_', 0
    LETTERS = 'abcdefgh'
    BOS, ANSWER, FIRST_LETTER = 0, 1, 2
    FIRST_HOPS = FIRST_LETTER + len(LETTERS)

    def __init__(self, size):
        super().__init__(size)
        self.words = ['<bos>', '<ans>', *self.LETTERS, *(f'<hops_{n}>' for n in range(1, size + 1))]
        self.row_len = len(self.LETTERS) * (size + 1) + 4

    def answer_places(self, levels):
        return np.full(len(levels), self.row_len - 1)

    def draw_rows(self, rng, levels):
        context, again = np.empty((len(levels), self.row_len - 4), np.int64), np.arange(len(levels))
        ends = np.empty(len(levels), np.int64)
        while len(again):
            context[again] = self.draw_contexts(rng, len(again))
            ends[again], allowed = self.hop(context[again], levels[again])
            again = again[~allowed]
        answers = context[np.arange(len(levels)), ends]
        rows = np.empty((len(levels), self.row_len), np.int64)
        rows[:, 0], rows[:, 1] = self.BOS, self.FIRST_HOPS + levels - 1
        rows[:, 2:-2] = self.FIRST_LETTER + context
        rows[:, -2], rows[:, -1] = self.ANSWER, self.FIRST_LETTER + answers
        return rows

    def draw_contexts(self, rng, n):
        """Draws n contexts, letters as numbers from 0 on. Returns (n, 8 (size + 1))."""
        A, each = len(self.LETTERS), np.arange(n)
        blocks = rng.random((n, self.size + 1, A)).argsort(axis=-1)
        other = rng.integers(1, A, size=(n, self.size + 1))
        # exchanging the first letter keeps all allowed orders equally likely
        for i in range(1, self.size + 1):
            block = blocks[:, i]
            rows = each[block[:, 0] == blocks[:, i - 1, -1]]
            places = other[rows, i]
            block[rows, 0], block[rows, places] = block[rows, places], block[rows, 0]
        return blocks.reshape(n, -1)

    def hop(self, context, hops):
        """Returns where `hops` hops from the last letters of contexts (n, N) end, and if all change block."""
        each, places, A = np.arange(len(context)), np.arange(context.shape[1]), len(self.LETTERS)
        at, allowed = np.full(len(context), context.shape[1] - 1), np.ones(len(context), bool)
        for i in range(hops.max(initial=0)):
            same = (context == context[each, at][:, None]) & (places < at[:, None])  # (n, N)
            to = np.where(same, places, -1).max(axis=1) + 1
            allowed &= (to // A < at // A) | (i >= hops)
            at = np.where(i < hops, to, at)
        return at, allowed

    def majority(self, level):
        return 1 / len(self.LETTERS)


GENERATED = {'mano': Mano, 'p_hop': PHop}

# -----------------------------------------------------------------------------
# from a name to a data set, and its windows


def find_generated(dataset):
    """Returns the Generated that a name such as mano:10 means, None if it means none.

    Raises UserError for a size that is not a number, or out of bounds.
    """
    name, colon, size = dataset.partition(':')
    if name not in GENERATED:
        return None
    task = GENERATED[name]
    fits = not colon or (re.fullmatch('[0-9]{1,9}', size) and 1 <= int(size) <= task.largest)
    check(fits, 'dataset', dataset, f'{name}:N with at most N {task.unit}, N from 1 to {task.largest}')
    return task(int(size) if colon else task.default)


class GeneratedSplit:
    """The windows of one split of a Generated: what datasets.Split is for files. A window is a row.

    Evaluations read rows of a fixed list, the same in every run. Raises UserError for a block_size that is
    not that of the rows, and for a vocab_size that is too small.
    """

    def __init__(self, data, meta, name, block_size, vocab_size):
        rows = f'{data.row_len - 1}: {data.name} has rows of {data.row_len} tokens'
        check(block_size == data.row_len - 1, 'block_size', block_size, rows)
        words = f'at least {len(data.words)}, the words of {data.name}'
        check(vocab_size >= len(data.words), 'vocab_size', vocab_size, words)
        if name not in ('train', 'val'):
            raise UserError(f'the data set {data.name} has no {name} split, only train, val')
        self.data, self.name, self.block_size, self.vocab_size = data, name, block_size, vocab_size

    @functools.cached_property
    def fixed_rows(self):
        """The rows of evaluations and their difficulties, see Generated.draw."""
        seed = int(self.data.fingerprint(self.name)[:15], 16)
        return self.data.draw(np.random.default_rng(seed), WINDOWS, self.name)

    def draw(self, rng, n):
        """Draws n rows with a numpy Generator. Returns inputs and targets, each (n, T) int64."""
        return self.inputs_and_targets(*self.data.draw(rng, n, self.name))

    def eval_windows(self, n=None):
        """Returns (0, number) of the rows of evaluations: all, or the first n. They are in random order."""
        return [(0, number) for number in range(WINDOWS if n is None else min(n, WINDOWS))]

    def read_windows(self, windows, n):
        """Reads rows given as (0, number). Returns inputs and targets, each (n, T) int64.

        Rows past the last window have inputs 0 and targets -1.
        """
        inputs = np.zeros((n, self.block_size), np.int64)
        targets = np.full((n, self.block_size), -1)
        rows, levels = self.fixed_rows
        numbers = [number for _, number in windows]
        inputs[: len(numbers)], targets[: len(numbers)] = self.inputs_and_targets(
            rows[numbers], levels[numbers]
        )
        return inputs, targets

    def read_window(self, file, number):
        """Reads one row. Returns inputs and targets, each (T,) int64."""
        inputs, targets = self.read_windows([(file, number)], 1)
        return inputs[0], targets[0]

    def inputs_and_targets(self, rows, levels):
        """Returns inputs and targets of rows, each (n, T). All targets are -1 but the answers."""
        each, places = np.arange(len(rows)), self.data.answer_places(levels)
        targets = np.full((len(rows), self.block_size), -1)
        targets[each, places - 1] = rows[each, places]
        return rows[:, :-1], targets
