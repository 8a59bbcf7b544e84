"""
Samples from a trained model.

    python sample.py --out_dir=out-quickstart --start="def " --num_samples=3 --n_loop=8

The text and a line of dashes per sample go to stdout, everything else to stderr.
"""

import codecs
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import command, configure
from nanoloop.checkpoint import PLACES, find_paths, load_checkpoint, read_first
from nanoloop.checks import check, check_least
from nanoloop.datasets import find_data, read_meta
from nanoloop.decode import Stats, cast_linears_
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.generate import Generation
from nanoloop.machine import autocast, choose_compile, choose_device, choose_dtype
from nanoloop.pretrained import GPT2, find_pretrained
from nanoloop.tokenizer import make_tokenizer, read_text


@dataclass
class SampleConfig:
    out_dir: str = 'out'  # the run to sample from: its best.pt, else its ckpt.pt; or the path of a checkpoint
    init_from: str = 'resume'  # resume: from out_dir; or a path as there, an exported folder, gpt2, gpt2-xl
    start: str = ''  # the text to go on with; FILE:path reads a file; nothing = a new line or document
    num_samples: int = 1  # drawn together in one batch
    max_new_tokens: int = 500  # per sample
    temperature: float = 0.8  # 1 = as the model says, lower = safer, 0 = always the most likely token
    top_k: int | None = 200  # only the k most likely tokens; None = all
    top_p: float | None = None  # only the most likely that make up this share of the probability; None = all
    stop: str = ''  # end a sample before this text; nothing = none
    stream: bool = False  # print tokens as they come, one sample after the other
    n_loop: int | None = None  # iterations of the loop; None = as trained
    kv_budget: int | None = None  # iterations with keys and values of their own; None = all, which is exact
    exit: str = ''  # let every token leave the loop by itself: kl, diff (below exit_threshold), gate (above)
    exit_threshold: float | None = None  # of exit: nats, relative change, probability to have left
    min_loops: int = 1  # of exit: at least so many
    warm_start: bool = False  # start a token's loop from its predecessor's last state, an approximation
    speculate: int = 0  # draft so many tokens with few loops, verify them by all: as likely a text, sooner
    draft_loops: int = 1  # of speculate
    seed: int = 1337  # of what is drawn
    device: str = 'auto'  # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto'  # of matrix products: auto, float32, bfloat16, float16
    compile: bool = False  # compile the step of a token: 10 to 30 s in every run, then 1.5 times the speed

    def __post_init__(self):
        """Raises ValueError for a value outside its range."""
        check_least(self, 1, 'num_samples', 'max_new_tokens', 'n_loop', 'kv_budget', 'min_loops')
        check_least(self, 0, 'temperature', 'seed', 'speculate')
        p, threshold = self.top_p, self.exit_threshold
        check(self.top_k is None or self.top_k >= 1, 'top_k', self.top_k, 'at least 1, or None')
        check(p is None or 0 < p <= 1, 'top_p', p, 'above 0 and at most 1, or None')
        check(self.exit in ('', *EXIT), 'exit', self.exit, f'nothing, {", ".join(EXIT)}')
        if self.exit:
            wanted = f'at least 0: {EXIT[self.exit].advice}'
            check(threshold is not None and threshold >= 0, 'exit_threshold', threshold, wanted)
        check(self.exit or threshold is None, 'exit_threshold', threshold, 'None without an exit')
        check(self.exit or self.min_loops == 1, 'min_loops', self.min_loops, '1 without an exit')
        check(self.speculate or self.draft_loops == 1, 'draft_loops', self.draft_loops, '1 without speculate')
        alone = not (self.compile and (self.exit or self.speculate))
        check(alone, 'compile', True, 'False with an exit or speculate')


def find_model(c, device):
    """(model, checkpoint) of out_dir, of which the best one that loads is taken, or of init_from."""
    key, wanted = ('out_dir', PLACES) if c.init_from == 'resume' else ('init_from', f'resume, {PLACES}')
    paths = find_paths(c[key], ('best.pt', 'ckpt.pt', 'prev.pt'))
    if paths:
        return load_checkpoint(read_first(paths), device)
    by_name = key == 'init_from' and c[key] in GPT2
    found = find_pretrained(c[key], {}) if by_name or Path(c[key]).is_dir() else None
    check(found, key, c[key], wanted + f', {", ".join(GPT2)}' * (key == 'init_from'))
    return load_checkpoint(found, device)


def find_tokenizer(checkpoint):
    """The checkpoint's tokenizer. nanoGPT's files have none: then that of the data set of their training."""
    plain = checkpoint.get('tokenizer')
    if plain is None:
        dataset = checkpoint.get('config', {}).get('dataset', '')
        vocab = checkpoint['model_args']['vocab_size']
        folder = find_data(dataset)
        prepared = dataset and any((folder / name).exists() for name in ('meta.json', 'meta.pkl'))
        wanted = f'one with a tokenizer, or with its data set in data/, which is {dataset!r}'
        check(prepared or vocab in (50257, 50304), 'checkpoint', checkpoint['path'], wanted)
        plain = read_meta(folder)['tokenizer'] if prepared else dict(kind='tiktoken', name='gpt2')
    return make_tokenizer(plain)


class Text:
    """The text of one sample, grown token by token: what can be printed of it, and whether it is complete."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character can be several tokens
        self.text, self.printed, self.done = '', 0, False

    def add(self, token):
        """Takes a token, returns the new text that is certain: what cannot be the beginning of stop."""
        return '' if self.done else self.grow(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def rest(self):
        """What was kept back, when nothing more comes."""
        return '' if self.done else self.grow(self.decoder.decode(b'', final=True), last=True)

    def grow(self, text, last=False):
        self.text += text
        end = self.text.find(self.stop) if self.stop else -1
        self.done = end >= 0 or last
        safe = len(self.text) if end < 0 else end
        if not self.done:
            begun = (n for n in range(len(self.stop) - 1, 0, -1) if self.text.endswith(self.stop[:n]))
            safe -= next(begun, 0)
        new, self.printed = self.text[self.printed : safe], safe
        return new


def write(tokens, texts, start, live):
    """Prints start and the texts that grow by tokens, (B,) each; live: as they come. A Ctrl-C ends them.
    Returns how many tokens came."""
    parts, interrupted, count, shown = [[start] for _ in texts], None, 0, 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for new in tokens:
            count += len(new)
            for text, part, token in zip(texts, parts, new.tolist(), strict=True):
                part.append(text.add(token))
            if live:
                print(''.join(parts[0][shown:]), end='', flush=True)
                shown = len(parts[0])
            if all(text.done for text in texts):
                break
    except (KeyboardInterrupt, SystemExit) as error:
        interrupted = error
    finally:
        signal.signal(signal.SIGTERM, before)
    for text, part in zip(texts, parts, strict=True):
        print(''.join(part[shown:]) + text.rest())
        print('---------------', flush=True)
    if interrupted:
        raise interrupted
    return count


@command
def main(argv):
    c = configure((SampleConfig,), argv, out=sys.stderr)
    c.build(SampleConfig)
    device, _ = choose_device(c.device)
    dtype, _ = choose_dtype(c.dtype, device.type)
    compile, _ = choose_compile(c.compile, device.type, 0)
    model, checkpoint = find_model(c, device)
    model.eval()
    n_loop = c.n_loop or model.config.n_loop
    trained = checkpoint.get('loops_trained', [model.config.n_loop])
    note = '' if n_loop in trained else f', trained with {", ".join(map(str, trained))}'
    path, step = checkpoint['path'], int(checkpoint['iter_num'])
    print(f'{path}: {f"step {step}, " * (step > 0)}n_loop {n_loop}{note}', file=sys.stderr)
    tokenizer = find_tokenizer(checkpoint)
    start = c.start
    if start.startswith('FILE:'):
        start = read_text(start[5:])
    prompt = tokenizer.encode(start) or [tokenizer.start]
    check(max(prompt) < model.config.vocab_size, 'start', start[:40], 'text in the tokens of the checkpoint')

    keys = ('temperature', 'top_k', 'top_p', 'n_loop', 'kv_budget', 'warm_start', 'speculate', 'draft_loops')
    early_exit = EarlyExit(c.exit, c.exit_threshold, c.min_loops) if c.exit else None
    options = {key: c[key] for key in keys} | dict(early_exit=early_exit, compile=compile)
    options['max_tokens'], stats, n_tokens = len(prompt) + c.max_new_tokens, Stats(), 0
    options['generator'] = torch.Generator(device).manual_seed(c.seed)
    cast_linears_(model, dtype)
    if compile:
        print('compiling the step of a token, which pays from about 10,000 tokens on', file=sys.stderr)
    began = time.perf_counter()
    with autocast(device.type, dtype):
        for size in [1] * c.num_samples if c.stream or c.speculate else [c.num_samples]:
            idx = torch.tensor([prompt] * size, device=device)
            generation = Generation(model, idx, **options)
            texts = [Text(tokenizer, c.stop) for _ in range(size)]
            n_tokens += write(generation.stream(c.max_new_tokens), texts, start, c.stream)
            stats += generation.stats
    seconds = time.perf_counter() - began
    rate = f'{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.1f} tokens/s'
    print(f'{rate}, keys and values: {stats.cache_bytes / 2**20:.1f} MiB', file=sys.stderr)
    if c.speculate:
        print(f'drafts: {stats.accepted:,} of {stats.drafted:,} kept', file=sys.stderr)
    if early_exit:
        shares = ', '.join(f'{n}: {k / stats.tokens:.1%}' for n, k in sorted(stats.loops_taken.items()))
        told = f'loops per token: {stats.mean_loops:.2f} on average, of {stats.tokens:,} processed ({shares})'
        print(told, file=sys.stderr)


if __name__ == '__main__':
    main()
