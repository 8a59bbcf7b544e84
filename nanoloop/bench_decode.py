"""
Measures ways of decoding, which take turns: tokens per second, time to the first token, KV cache and loops.
"""

import statistics
import time
from dataclasses import dataclass, field

from nanoloop.decode import Stats
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.generate import Generation

RECOMPUTING = 'recomputing all'


@dataclass
class Timing:
    """The rounds of one way of decoding."""

    seconds: list = field(default_factory=list)  # per round
    first_seconds: list = field(default_factory=list)  # until the first token, per round
    stats: Stats | None = None  # of the last round; None without a cache


def decoding_ways(model, n_rows, draft_tokens=4, exit_threshold=None, compile=False):
    """Returns {name: options of Generation} of all ways the model supports. None = without a cache.

    draft_tokens: tokens per draft of speculation. exit_threshold: threshold of every early exit rule; None =
    the rule's advised one.
    """
    ways = {RECOMPUTING: None, 'cached': {}}
    if compile:
        ways['compiled'] = dict(compile=True)
    if model.config.n_loop > 1:
        ways['kv_budget=1'] = dict(kv_budget=1)
        for name, rule in EXIT.items():
            threshold = rule.advised if exit_threshold is None else exit_threshold
            if model.exit_gate is not None or not rule.needs_gate:
                ways[f'exit={name} at {threshold:g}'] = dict(early_exit=EarlyExit(name, threshold))
        if n_rows == 1:
            ways[f'speculate={draft_tokens}'] = dict(speculate=draft_tokens)
    return ways


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
            timing, start = timings[name], time.perf_counter()
            if options is None:
                tokens = recompute(model, prompts, n_tokens)
            else:
                max_tokens = prompts.size(1) + n_tokens
                generation = Generation(model, prompts, temperature=0, max_tokens=max_tokens, **options)
                tokens, timing.stats = generation.stream(n_tokens), generation.stats
            token = next(tokens)
            token.tolist()  # the host waits for the device
            first = time.perf_counter() - start
            for token in tokens:  # noqa: B007, the last one is waited for
                pass
            token.tolist()
            if counted:
                timing.seconds.append(time.perf_counter() - start)
                timing.first_seconds.append(first)
    return timings


def print_timings(timings, n_tokens, n_rows, n_loop, say):
    """Prints the medians of a table {name: Timing}. ratio: speed / that of `cached`."""
    say(f'{"decoding":22} {"tokens/s":>9} {"ratio":>6} {"first, ms":>9} {"cache, MiB":>10} {"loops":>6}')
    for name, timing in timings.items():
        rate = n_tokens * n_rows / statistics.median(timing.seconds)
        pairs = zip(timings['cached'].seconds, timing.seconds, strict=True)
        ratio = statistics.median(cached / seconds for cached, seconds in pairs)
        first = 1000 * statistics.median(timing.first_seconds)
        size = f'{timing.stats.cache_bytes / 2**20:.2f}' if timing.stats else '-'
        loops = timing.stats.mean_loops if timing.stats else n_loop
        say(f'{name:22} {rate:9.1f} {ratio:6.2f} {first:9.1f} {size:>10} {loops:6.2f}')
