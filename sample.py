"""
Samples from a trained model.

    python sample.py --out_dir=out-quickstart --start="def " --num_samples=3 --n_loop=8
    python sample.py --out_dir=out-quickstart --start="def main(" --lens=5 --lens_html=lens.html

The text and a line of dashes per sample go to stdout, everything else to stderr. With lens it is a table: the
most likely next tokens after every loop, at each position of the prompt. A model's name is the folder
of a run, the path of a checkpoint, a folder written by export.py, gpt2 to gpt2-xl, a folder with the GPT-2 of
transformers, or ouro:FOLDER with Ouro's safetensors.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure, print_error, printable

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

from nanoloop.checkpoint import (
    WEIGHTS,
    check_tokenizer,
    describe_checkpoint,
    find_model,
    find_tokenizer,
    load_checkpoint,
)
from nanoloop.checks import Above, AtMost, Choice, Count, Name, NotNegative, Size, check, settle_fields
from nanoloop.decode import Stats, prepare_linears_
from nanoloop.early_exit import EXIT, make_early_exit
from nanoloop.generate import Generation
from nanoloop.lens import predictions_by_loop
from nanoloop.lens_page import LensView, check_lens
from nanoloop.machine import autocast, choose_compile, choose_device, choose_dtype
from nanoloop.plain_tokenizers import SPECIAL_TEXT
from nanoloop.shared_cpu import share_cpu
from nanoloop.signals import exit_on_sigterm
from nanoloop.text_stream import TextStream
from nanoloop.tokenizer import read_text


@dataclass
class SampleConfig:
    # model
    out_dir: Name = 'out'  # folder of a run (its best.pt, else its ckpt.pt), or another name as in init_from
    init_from: Name = 'resume'  # resume (the model in out_dir), a folder, a file, gpt2..gpt2-xl, ouro:FOLDER
    weights: Choice(WEIGHTS) = 'raw'  # ema: load the average of the weights, which train.py saves with --ema
    # text
    start: str = (
        ''  # prompt, also with special tokens; FILE:PATH = a file; '' = the end-of-text token, or newline
    )
    num_samples: Count = 1  # number of samples: one batch, or one by one with stream or speculate
    max_new_tokens: Count = 500  # number of tokens per sample
    stop: str = ''  # text that ends a sample and is not printed; '' = none
    stream: bool = False  # print each token when it is drawn, one sample after the other
    # sampling
    temperature: NotNegative = 0.8  # divides the logits: below 1 = sharper; 0 = always the most likely token
    top_k: Count | None = 200  # draw from the k most likely tokens; None = from all
    top_p: Annotated[float, Above(0), AtMost(1)] | None = None  # nucleus sampling: its probability; None = 1
    seed: Size = 1337  # seed of the random numbers
    # loops
    n_loop: Count | None = None  # number of loops; None = that of the checkpoint
    kv_budget: Count | None = None  # number of loops with a KV cache of their own; None = all, which is exact
    exit: Choice(('', *EXIT)) = ''  # early exit: what decides that a token leaves; '' = never
    exit_threshold: NotNegative | None = None  # exit below it (kl in nats, diff), or at and above it (gate)
    min_loops: Count = 1  # smallest number of loops of a token; needs exit
    warm_start: bool = False  # start a token's loop from the state of the token before it, an approximation
    speculate: Size = 0  # tokens that are drafted, then verified together; 0 = off
    draft_loops: Count = 1  # number of loops for a drafted token; needs speculate
    # lens: shows predictions instead of samples
    lens: Annotated[Size, AtMost(100)] = 0  # number of predictions per position of start and loop; 0 = off
    lens_html: str = ''  # file .html for the lens as a page with all positions; needs lens
    # machine
    device: str = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # type of matrix products: auto, float32, bfloat16 or float16
    compile: bool = False  # compile the step of one token: costs 10 to 30 s, then 1.5 times the speed

    def __post_init__(self):
        """Raises UserError for a value out of its bounds, and for values that do not go together."""
        settle_fields(self)
        make_early_exit(self)
        check(self.speculate or self.draft_loops == 1, 'draft_loops', self.draft_loops, '1 without speculate')
        check_lens(self)


def print_samples(tokens, texts, start, live):
    """Prints a batch of samples: start, the text and a line of dashes each. Returns the number of tokens.

    tokens: yields the next token of every sample, (B,). texts: a TextStream per sample. live: print the first
    sample as it grows. After Ctrl-C or SIGTERM the text so far is printed before the exception goes on.
    """
    parts, interruption, count, shown = [[start] for _ in texts], None, 0, 0
    try:
        with exit_on_sigterm():
            for new in tokens:
                count += len(new)
                for text, part, token in zip(texts, parts, new.tolist(), strict=True):
                    part.append(text.add(token))
                if live:
                    print(printable(''.join(parts[0][shown:])), end='', flush=True)
                    shown = len(parts[0])
                if all(text.done for text in texts):
                    break
    except (KeyboardInterrupt, SystemExit) as error:
        interruption = error
    for text, part in zip(texts, parts, strict=True):
        print(printable(''.join(part[shown:]) + text.rest()))
        print('---------------', flush=True)
    if interruption:
        raise interruption
    return count


def read_prompt(start, tokenizer, vocab_size):
    """Returns the text of the key start and its token ids; an empty text becomes the end-of-text token."""
    if start.startswith('FILE:'):
        check(start != 'FILE:', 'start', start, 'FILE:PATH')
        start = read_text(start.removeprefix('FILE:'))
    ids = tokenizer.encode(start, special=True) or [tokenizer.eot_token]
    if others := [text for text in re.findall(SPECIAL_TEXT, start) if text not in tokenizer.special_ids]:
        known = ', '.join(tokenizer.special_ids)
        reason = f'the special tokens are {known}' if known else tokenizer.no_special
        print_error(f'{others[0]} is ordinary text here: {reason}')
    check(max(ids) < vocab_size, 'start', start[:40], 'text in the tokens of the checkpoint')
    return start, ids


def report(c, n_tokens, seconds, stats):
    """Tells the speed, the memory of the KV cache, and what speculation and early exits have saved."""
    rate = f'{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.1f} tokens/s'
    print_error(f'{rate}, keys and values: {stats.cache_bytes / 2**20:.1f} MiB')
    if c.speculate:
        print_error(f'drafts: {stats.accepted:,} of {stats.drafted:,} kept')
    if c.exit:
        shares = ', '.join(f'{n}: {k / stats.tokens:.1%}' for n, k in sorted(stats.loops_taken.items()))
        mean = f'{stats.mean_loops:.2f} on average, of {stats.tokens:,} processed'
        print_error(f'loops per token: {mean} ({shares})')


def print_lens(c, model, tokenizer, prompt, early_exit, about):
    """Prints what every loop predicts at each position of the prompt (T ids), and writes it as a page."""
    idx = torch.tensor([prompt], device=model.lm_head.weight.device)  # (1, T)
    lens = predictions_by_loop(model, idx, c.n_loop, c.lens, early_exit, say=print_error)
    view = LensView(lens, prompt, tokenizer, early_exit)
    if c.lens_html:  # before the lines, of which head may read the first only
        view.write(c.lens_html, about)
        print_error(f'written: {c.lens_html}, {len(prompt):,} positions')
    for line in view.lines():
        print(line)


@command
def main(argv):
    c = configure((SampleConfig,), argv, say=print_error)
    early_exit = make_early_exit(c.build(SampleConfig))
    device, _ = choose_device(c.device)
    share_cpu()
    dtype, _ = choose_dtype(c.dtype, device.type)
    compile, _ = choose_compile(c.compile, device.type, 0)
    check_tokenizer(c.out_dir if c.init_from == 'resume' else c.init_from)
    checkpoint = find_model(c, print_error)
    tokenizer = find_tokenizer(checkpoint)
    model, _ = load_checkpoint(checkpoint, device)
    if early_exit:
        early_exit.check_model(model, c.n_loop or model.config.n_loop)
    about = describe_checkpoint(checkpoint, model.config, c.n_loop or model.config.n_loop)
    print_error(about)
    if tokenizer.note:
        print_error(tokenizer.note)
    start, prompt = read_prompt(c.start, tokenizer, model.config.vocab_size)

    prepare_linears_(model, dtype)
    if c.lens:
        with autocast(device.type, dtype):
            print_lens(c, model, tokenizer, prompt, early_exit, about)
        return

    keys = ('temperature', 'top_k', 'top_p', 'n_loop', 'kv_budget', 'warm_start', 'speculate', 'draft_loops')
    options = {key: c[key] for key in keys} | dict(compile=compile)
    options['early_exit'] = early_exit
    options['generator'] = torch.Generator(device).manual_seed(c.seed)
    options['max_tokens'] = len(prompt) + c.max_new_tokens
    if compile:
        print_error('compiling the steps of a token, which pays from about 10,000 tokens on')
    one_by_one = c.stream or c.speculate
    batches = [1] * c.num_samples if one_by_one else [c.num_samples]
    began, n_tokens, stats = time.perf_counter(), 0, Stats()
    with autocast(device.type, dtype):
        for size in batches:
            idx = torch.tensor([prompt] * size, device=device)  # (B, T)
            generation = Generation(model, idx, **options)
            texts = [TextStream(tokenizer, c.stop) for _ in range(size)]
            n_tokens += print_samples(generation.stream(c.max_new_tokens), texts, start, c.stream)
            stats += generation.stats
    report(c, n_tokens, time.perf_counter() - began, stats)


if __name__ == '__main__':
    main()
