"""
Measures ways of decoding, which take turns: tokens per second, time to the first token, the share of the
memory bandwidth, KV cache and loops.
"""

import statistics
import time
from dataclasses import dataclass, field

from model import POS
from nanoloop.decode import Stats
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.generate import Generation, tokens_in_view

RECOMPUTING = 'recomputing all'


@dataclass
class Timing:
    """The rounds of one way of decoding."""

    seconds: list = field(default_factory=list)  # per round
    first_seconds: list = field(default_factory=list)  # until the first token, per round
    stats: Stats | None = None  # of the last round; None without a cache


def decoding_ways(model, n_rows, draft_tokens=4, exit_threshold=None, compile=False, combined=False):
    """Returns {name: options of Generation} of all ways the model supports. None = without a cache.

    draft_tokens: tokens per draft of speculation. exit_threshold: threshold of every early exit rule; None =
    the rule's advised one. combined: exits with speculation, and, with compile, every way compiled.
    """
    ways, looped = {'cached': {}}, model.config.n_loop > 1
    drafts = {f'speculate={draft_tokens}': dict(speculate=draft_tokens)} if looped and n_rows == 1 else {}
    if looped:
        ways |= {'kv_budget=1': dict(kv_budget=1)} | drafts
    for name, rule in EXIT.items() if looped else ():
        threshold = rule.advised if exit_threshold is None else exit_threshold
        if model.exit_gate is not None or not rule.needs_gate:
            way, options = f'exit={name} at {threshold:g}', dict(early_exit=EarlyExit(name, threshold))
            ways[way] = options
            if combined:
                ways |= {f'{way}, {draft}': options | drafts[draft] for draft in drafts}
    if compile:
        others = {name: options for name, options in ways.items() if combined and options}
        ways['compiled'] = dict(compile=True)
        ways |= {f'{name}, compiled': options | dict(compile=True) for name, options in others.items()}
    return {RECOMPUTING: None} | ways


def recompute(model, idx, max_new_tokens):
    """Yields the most likely next token of every row, (B,), each by a whole forward pass, as nanoGPT does."""
    for _ in range(max_new_tokens):
        idx = model.generate(idx, 1, temperature=0)
        yield idx[:, -1]


def time_decoding(model, prompts, n_tokens, ways, rounds):
    """Returns {name: Timing} of greedy decoding after prompts (B, T). A first round is not counted."""
    timings = {name: Timing() for name in ways}
    for counted in [False] + [True] * rounds:
        for name, options in ways.items():
            timing = timings[name]
            seconds, first, timing.stats = time_once(model, prompts, n_tokens, options)
            if counted:
                timing.seconds.append(seconds)
                timing.first_seconds.append(first)
    return timings


def time_once(model, prompts, n_tokens, options):
    """Returns the seconds of all tokens, those until the first one, and Stats, None without a cache.

    The cache is freed before the next way has its own. options: see decoding_ways.
    """
    start, stats = time.perf_counter(), None
    if options is None:
        tokens = recompute(model, prompts, n_tokens)
    else:
        max_tokens = prompts.size(1) + n_tokens
        generation = Generation(model, prompts, temperature=0, max_tokens=max_tokens, **options)
        tokens, stats = generation.stream(n_tokens), generation.stats
    token = next(tokens)
    token.tolist()  # the host waits for the device
    first = time.perf_counter() - start
    for token in tokens:  # noqa: B007, the last one is waited for
        pass
    token.tolist()
    return time.perf_counter() - start, first, stats


def bytes_per_step(model, n_rows, lengths):
    """Returns the bytes that a step of one token per row must read, all loops, the mean over row lengths.

    Weights of every executed layer, so those of the loop n_loop times, and of the head, once for all rows.
    Keys and values in view, in every executed layer, for each row. lengths: the tokens of a row, one number
    per step, with the new one.
    """
    c, parts = model.config, model.transformer

    def size(*modules):
        return sum(p.nbytes for module in modules for p in module.parameters())

    weights = size(parts.prelude, parts.coda, parts.ln_f, model.lm_head)
    weights += c.n_loop * size(parts.recur, model.inject, model.norm_recur, model.update)
    learned = POS[c.pos].learned
    views = [tokens_in_view(n, c.block_size) if learned else min(n, c.block_size) for n in lengths]
    columns = 0
    for block in (*parts.prelude, *c.n_loop * [*parts.recur], *parts.coda):
        columns += sum(min(n, model.window + 1) if block.windowed else n for n in views) / len(views)
    column = 2 * (c.n_kv_head or c.n_head) * (c.n_embd // c.n_head) * model.lm_head.weight.itemsize
    return weights + n_rows * columns * column


def summarize_timings(timings, n_tokens, n_rows, n_loop, step_bytes, bandwidth):
    """Returns the medians of {name: Timing}, a dict per way; None for what a way does not have.

    ratio: speed / that of `cached`. step_bytes: see bytes_per_step; bandwidth: bytes per second of the
    device. mbu, memory bandwidth utilisation: of ways that make a token of every row per step, in all loops.
    """
    rows = []
    for name, timing in timings.items():
        seconds, first = statistics.median(timing.seconds), statistics.median(timing.first_seconds)
        pairs = zip(timings['cached'].seconds, timing.seconds, strict=True)
        stats, mbu = timing.stats, None
        loops = stats.mean_loops if stats else n_loop
        if stats and loops == n_loop and not stats.drafted and n_tokens > 1:
            mbu = step_bytes / ((seconds - first) / (n_tokens - 1)) / bandwidth
        rows.append(
            dict(
                name=name,
                rows=n_rows,
                tokens_per_s=n_tokens * n_rows / seconds,
                ratio=statistics.median(cached / own for cached, own in pairs),
                first_ms=1000 * first,
                mbu=mbu,
                cache_mib=stats.cache_bytes / 2**20 if stats else None,
                loops=loops,
            )
        )
    return rows


def print_timings(rows, say):
    """Prints the table of summarize_timings."""
    columns = f'{"tokens/s":>9} {"ratio":>6} {"first, ms":>9} {"mbu":>6} {"cache, MiB":>10} {"loops":>6}'
    width = max(len(row['name']) for row in rows)
    say(f'{"decoding":{width}} {columns}')
    for row in rows:
        mbu = '-' if row['mbu'] is None else f'{row["mbu"]:.1%}'
        size = '-' if row['cache_mib'] is None else f'{row["cache_mib"]:.2f}'
        speed = f'{row["tokens_per_s"]:9.1f} {row["ratio"]:6.2f} {row["first_ms"]:9.1f}'
        say(f'{row["name"]:{width}} {speed} {mbu:>6} {size:>10} {row["loops"]:6.2f}')
