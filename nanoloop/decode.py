"""
Decoding with a KV cache: a looped model processes tokens chunk by chunk.

Without early exit and warm start, and with kv_budget = n_loop, the result of a token equals that of a full
forward pass over the tokens in view.

With an early exit (nanoloop/early_exit.py) every token leaves the loop by itself, and the cache of the deeper
loops gets copies of its last keys and values. Exits are causal: a token's number of loops depends on itself
and on earlier tokens only. So with kv_budget = n_loop a prompt gives the same result in one chunk and token
by token.

Shapes: n rows of T tokens each; C, V as in model.py.
"""

import collections
import math
from dataclasses import dataclass, field

import torch

from nanoloop.checks import check
from nanoloop.depth import LoopBatch
from nanoloop.kv_cache import KVCache, layer_caches
from nanoloop.machine import compile_step
from nanoloop.onednn import onednn_for, onednn_linear, onednn_linear_is_faster
from nanoloop.tokens_in_loop import start_tokens


def multiply_row(x, weight):
    """Returns F.linear(x, weight), (..., out), of a single row x (..., in), up to rounding, by all threads.

    In float32 torch computes a single row with one thread, at 11 GB/s of weights. Here every thread has a
    part of the outputs: two threads reach 28 to 30 GB/s, oneDNN's product 18 (384 wide, AVX-512).
    """
    n_outputs, n_inputs = weight.shape
    n = math.gcd(torch.get_num_threads(), n_outputs)
    # (n, in, 1), laid out as (1, in) transposed: as (in, 1) the product takes four times as long
    columns = x.reshape(-1).contiguous().as_strided((n, n_inputs, 1), (0, 1, n_inputs))
    y = torch.bmm(weight.view(n, -1, n_inputs), columns)  # (n, out / n, in) -> (n, out / n, 1)
    return y.view(x.shape[:-1] + (n_outputs,))


def as_operation(function, schema):
    """Returns a product of x and a weight as an operation of its own, which torch.compile takes as it is.

    It would replace a row's product by a slower sum, and takes oneDNN's with constant weights only.
    """
    name = f'nanoloop::{function.__name__}'
    operation = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    operation.register_fake(lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], len(weight)))
    return operation


multiply_row_op = as_operation(multiply_row, '(Tensor x, Tensor weight) -> Tensor')
onednn_linear_op = as_operation(onednn_linear, '(Tensor x, Tensor weight, Tensor? bias) -> Tensor')


class DecodingLinear(torch.nn.Linear):
    """A Linear layer of a model that only decodes, in float32 on a CPU: it cannot be trained."""

    def forward(self, x):
        compiling = torch.compiler.is_compiling()
        if x.numel() > x.size(-1):
            return (onednn_linear_op if compiling else onednn_linear)(x, self.weight, self.bias)
        y = (multiply_row_op if compiling else multiply_row)(x, self.weight)
        return y if self.bias is None else y + self.bias


def prepare_linears_(model, dtype):
    """Makes all Linear layers fast for decoding under autocast in dtype, in place. No more training then.

    In a low precision weights and biases are cast, so that autocast casts none per token; a tied head becomes
    a copy of its own. In float32 layers become DecodingLinear where that is faster. Embeddings, norms and the
    exit gate stay as they are.
    """
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for module in linears:
        kind = type(module)
        if module is model.exit_gate:
            continue
        if dtype != torch.float32:
            weight = module.weight.detach()  # a head's is no longer the embedding's
            module.weight = torch.nn.Parameter(weight)
            module.to(dtype)
        elif onednn_linear_is_faster(module.weight) and not issubclass(kind, DecodingLinear):
            is_plain = kind is torch.nn.Linear  # else a class with a forward of its own, which calls Linear's
            module.__class__ = DecodingLinear if is_plain else type(kind.__name__, (kind, DecodingLinear), {})


@dataclass
class Stats:
    """Counts of the work of a decoder."""

    cache_bytes: int = 0
    loops_taken: collections.Counter = field(default_factory=collections.Counter)  # {loops: number of tokens}
    drafted: int = 0  # tokens drafted by speculation
    accepted: int = 0  # drafted tokens that the verification accepted

    @property
    def tokens(self):
        """The number of tokens that were processed: prompts and rejected drafts are among them."""
        return self.loops_taken.total()

    @property
    def mean_loops(self):
        """Loops per token."""
        return sum(loops * n for loops, n in self.loops_taken.items()) / self.tokens

    def __add__(self, other):
        """Returns the sum of the counts, and the larger cache_bytes."""
        cache_bytes = max(self.cache_bytes, other.cache_bytes)
        loops_taken = self.loops_taken + other.loops_taken
        return Stats(cache_bytes, loops_taken, self.drafted + other.drafted, self.accepted + other.accepted)


def scatter_last(target, rows, x, counts):
    """Sets target[rows[i]] = x[i, counts[i] - 1] for every i with counts[i] > 0. x: (n, T, C)."""
    some = [i for i, count in enumerate(counts) if count]
    target[[rows[i] for i in some]] = x[some, [counts[i] - 1 for i in some]].to(target.dtype)


class Decoder:
    """Runs a model in eval mode over rows of tokens, with a KV cache. It does not sample.

    It is built under the autocast under which it runs: its cache has that dtype.

    n_rows: number of rows
    max_tokens: the most tokens that a row will have; None = any number
    n_loop: None = the model's
    kv_budget: number of loops with a cache of their own, see kv_cache.py; None = n_loop, which is exact
    early_exit: an EarlyExit; None = every token takes n_loop loops
    warm_start: a generated token starts its loop from the last state of the token before it, instead of
        s_0: an approximation (continuous chain of thought, Huginn)
    compile: compile the steps of generated tokens, as CUDA graphs on a GPU, see compile_step; a step of some
        of the rows alone is not compiled

    loops: the number of loops of each token of the last prefill or decode_one_token, (n, T), or an int for
    all. stats: a Stats.
    """

    def __init__(self, model, n_rows, max_tokens=None, n_loop=None, kv_budget=None, early_exit=None,
                 warm_start=False, compile=False):  # fmt: skip
        c, self.model, self.n_rows = model.config, model, n_rows
        self.n_loop = self.loops = c.n_loop if n_loop is None else n_loop
        budget = self.n_loop if kv_budget is None else kv_budget
        check(self.n_loop >= 1, 'n_loop', n_loop, 'at least 1')
        check(1 <= budget <= self.n_loop, 'kv_budget', kv_budget, f'from 1 to n_loop={self.n_loop}')
        self.early_exit, self.warm_start, self.compile = early_exit, warm_start, compile
        self.compiled = {}  # {method: the compiled one}
        self.reads_loop = model.inject.reads_loop or model.update.reads_loop
        self.coda_in_loop = False  # whether coda and head run after every loop
        if early_exit is not None:
            early_exit.check_model(model, self.n_loop)
            self.coda_in_loop = early_exit.rule.needs_logits
        n_codas = budget if self.coda_in_loop else 1
        self.cache = KVCache(model, n_rows, max_tokens, budget, n_codas, compile)
        self.stats = Stats(self.cache.bytes())
        self.last_state = model.transformer.wte.weight.new_zeros(n_rows, c.n_embd)  # for warm_start

    def prefill(self, idx, rows=None, counts=None):
        """Reads the next tokens of rows, a whole piece at once. Returns the head's input (n, T, C).

        idx: (n, T); rows: a list of n rows, None = all; counts: how many tokens of each row of idx are real,
        a list, None = all; the others are padding at the end. T: at most cache.chunk if a row ends beyond
        cache.capacity.
        """
        return self.read(idx, rows, counts, generated=False)

    def decode_one_token(self, idx, rows=None):
        """Reads one generated token of each row. Returns the head's input (n, 1, C). idx: (n, 1).

        Unlike in prefill, its loop may start warm and its step may be compiled.
        """
        return self.read(idx, rows, None, generated=True)

    def read(self, idx, rows, counts, generated):
        """Runs tokens idx (n, T). Returns the head's input (n, T, C). See prefill and decode_one_token."""
        n, T = idx.shape
        rows = None if rows == list(range(self.n_rows)) else rows
        counts = None if counts is not None and min(counts) == T else counts
        compiled = generated and self.compiles(rows)
        if self.early_exit is not None and T == 1 < n and counts is None:
            return self.step_with_exits(idx, rows or list(range(n)), warm=generated and self.warm_start)
        index = self.cache.reserve(T, rows, counts, compiled)
        s = None
        if generated and self.warm_start:
            s = (self.last_state if rows is None else self.last_state[rows])[:, None]  # (n, 1, C)
        with onednn_for(n * T):
            if self.early_exit is not None:
                tokens = start_tokens(self, idx, index, s, counts)
                tokens.run(0, self.n_loop)
                (s, x), self.loops = tokens.finish(), tokens.loops
            else:
                _, s, x = self.forward(idx, index, s, self.n_loop)
                self.stats.loops_taken[self.n_loop] += n * T if counts is None else sum(counts)
        if self.warm_start:
            scatter_last(self.last_state, rows or range(self.n_rows), s, counts or [T] * n)
        return x

    def compiles(self, rows):
        """Returns whether single tokens of rows, a list, None = all, go through compiled steps."""
        return self.compile and rows in (None, list(range(self.n_rows)))

    def step(self, function, index):
        """Returns a method of this class as a function of the decoder and its arguments.

        It is compiled if the tokens of the index go through compiled steps.
        """
        if not index.compiled:
            return function
        # not the bound method: its reference to the decoder would keep the cache until garbage is collected
        if function not in self.compiled:
            self.compiled[function] = compile_step(function, self.cache.device)
        return self.compiled[function]

    def run_prelude(self, idx, index):
        """Returns the prelude's output e and the first state s_0 of tokens idx (n, T), (n, T, C) each."""
        e, s = self.step(Decoder.prelude, index)(self, idx, index)
        return e, s.clone() if s is e else s  # one tensor as two arguments would be compiled anew

    def run_loop(self, e, s, index, i):
        """Runs loop i alone. Returns the state after it, (n, T, C), and the head's input (n, T, C).

        The latter is None if the coda does not run after every loop.
        """
        cache = self.cache
        codas = cache.coda[i % len(cache.coda)] if self.coda_in_loop else None
        # all loops share a compiled step: their caches are arguments, and so is i, where something reads it
        layers, i = cache.recur[i % cache.kv_budget], i if self.reads_loop or not index.compiled else None
        return self.step(Decoder.loop, index)(self, e, s, index, layers, codas, i)

    def run_coda(self, s, index):
        """Returns the head's input (n, T, C) for the state s after the last loop."""
        return self.step(Decoder.coda, index)(self, s, index, self.cache.coda[0])

    def forward(self, idx, index, s, n_loop):
        """Runs tokens idx (n, T) through the first n_loop loops and the coda. s: (n, T, C), None = s_0.

        Returns the prelude's output, the state, and the head's input, (n, T, C) each.
        """
        return self.step(Decoder.from_start, index)(self, idx, index, s, n_loop)

    def go_on(self, e, s, index, start):
        """Runs the loops from `start` on and the coda. Returns the head's input (n, T, C)."""
        return self.step(Decoder.from_loop, index)(self, e, s, index, start)[1]

    # what can be compiled

    def prelude(self, idx, index):
        """See run_prelude."""
        x = self.model.embed(idx, index.pos, self.cache.earlier_tokens(idx, index))
        caches = layer_caches(self.cache.prelude, index)
        e = self.model.apply_blocks(self.model.transformer.prelude, x, index.attn_inputs, caches=caches)
        return e, self.model.start(e, index.pos)

    def loop(self, e, s, index, layers, codas, i):
        """See run_loop. layers, codas: the caches of the loop and of the coda after it, None = no coda."""
        s = self.model.iterate(e, s, i, index.attn_inputs, layer_caches(layers, index))
        return s, None if codas is None else self.coda(s, index, codas)

    def coda(self, s, index, layers):
        """See run_coda. layers: the coda's caches."""
        return self.model.run_coda(s, index.attn_inputs, layer_caches(layers, index))

    def from_loop(self, e, s, index, start, stop=None):
        """Runs the loops from start to stop - 1, and the coda. Returns state and head's input, (n, T, C)."""
        cache = self.cache
        for i in range(start, self.n_loop if stop is None else stop):
            s, _ = self.loop(e, s, index, cache.recur[i % cache.kv_budget], None, i)
        return s, self.coda(s, index, cache.coda[0])

    def from_start(self, idx, index, s, n_loop):
        """See forward."""
        e, s_0 = self.prelude(idx, index)
        return e, *self.from_loop(e, s_0 if s is None else s, index, 0, n_loop)

    def step_with_exits(self, idx, rows, warm):
        """Runs one token of each row, which leave the loop one by one. Returns the head's input (n, 1, C).

        idx: (n, 1); rows: a list of n rows; warm: start from the last states.
        """
        batch = LoopBatch(self)
        batch.enter(rows, idx[:, 0], warm)
        while batch.rows:
            batch.run_one_loop()
        done, loops, x = batch.finish()
        self.stats.loops_taken.update(loops)
        order = torch.tensor([done.index(row) for row in rows], device=idx.device)  # (n,)
        self.loops = torch.tensor(loops, device=idx.device)[order, None]  # (n, 1)
        return x[order, None]
