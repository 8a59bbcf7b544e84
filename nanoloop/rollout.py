"""
Rollouts: answers that a model samples to prompts, in one batch, and what training on them needs.

The predictions are those of a training forward pass in eval mode: every token takes n_loop loops with a KV
cache of its own, and is drawn at temperature 1 from all tokens unless the options say otherwise.

Shapes: B rows, N tokens of the longest row, prompt and answer.
"""

import collections
import functools
from typing import NamedTuple

import torch

from nanoloop.checks import check
from nanoloop.decode import Stats
from nanoloop.generate import Generation, Sampler


class Rollouts(NamedTuple):
    """Prompts with sampled answers, on the CPU."""

    ids: torch.Tensor  # (B, N), rows padded with 0 at their ends
    sampled: torch.Tensor  # (B, N) bool, True: the model has drawn this token; False: prompt, forced, padding
    log_p: torch.Tensor  # (B, N) float32, log-probability with which a sampled token was drawn; 0 elsewhere
    entropy: torch.Tensor  # (B, N) float32, of the distribution it was drawn from, nats; 0 elsewhere
    answers: list  # of B lists: the ids behind each prompt, without the token that ended it
    finished: list  # of B bools: the answer has ended by itself
    stats: Stats  # of the decoder


class RecordingSampler(Sampler):
    """A Sampler that keeps log-probability and entropy of what it has drawn last, (B,) each."""

    def draw(self, p):
        """Returns a token for each row of the probabilities p (n, V), (n,)."""
        token = super().draw(p)
        self.log_p = p.gather(1, token[:, None])[:, 0].log()
        self.entropy = torch.special.entr(p).sum(dim=-1)
        return token

    def sample(self, x):
        """Returns a token for each row, (n,). x: (n, C), the head's input."""
        return self.draw(self.probabilities(x))


class Answer:
    """The answer of one row while it is sampled.

    stop: ids that end it. tool: see roll_out.
    """

    def __init__(self, stop, tool):
        self.stop, self.tool = stop, tool
        self.ids, self.sampled, self.log_p, self.entropy = [], [], [], []
        self.forced, self.finished = collections.deque(), False

    def add(self, token, log_p, entropy):
        """Appends the token that was drawn, or the next forced one. Returns the id that was appended."""
        if drawn := not self.forced:
            values = token, log_p, entropy
        else:
            values = self.forced.popleft(), 0.0, 0.0
        for column, value in zip((self.ids, self.log_p, self.entropy), values, strict=True):
            column.append(value)
        self.sampled.append(drawn)
        self.finished = drawn and token in self.stop
        if drawn and self.tool and not self.finished:
            self.forced.extend(self.tool(self.ids))
        return self.ids[-1]


def roll_out(model, prompts, max_new_tokens, stop=(), tool=None, temperature=1.0, top_k=None, generator=None,
             **options):  # fmt: skip
    """Samples an answer to each prompt. Returns Rollouts.

    model: in eval mode. prompts: lists of ids. max_new_tokens: most tokens of an answer, forced ones too.
    stop: ids that end an answer, () = it has max_new_tokens tokens. tool: called with the ids of an answer
    after each drawn token, it returns the ids that are forced to follow, mostly none. options: see Decoder.
    """
    check(not model.training, 'model', 'in training mode', 'one in eval mode')
    lengths, stop, device = [len(ids) for ids in prompts], frozenset(stop), model.lm_head.weight.device
    rows = [torch.tensor(ids) for ids in prompts]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, longest prompt)
    options |= dict(max_tokens=max(lengths) + max_new_tokens, lockstep=True)  # tokens may be replaced
    generation = Generation(model, idx, lengths, **options)
    generation.sampler = RecordingSampler(model, temperature, top_k, generator=generator)
    answers = [Answer(stop, tool) for _ in prompts]
    for drawn in generation.stream(max_new_tokens):
        sampler = generation.sampler
        # float32 is exact for token ids, and MPS has no float64
        columns = torch.stack([drawn.to(sampler.log_p.dtype), sampler.log_p, sampler.entropy])  # (3, B)
        token, *values = columns.tolist()  # here the host waits for the device, once per token
        token = [int(value) for value in token]
        following = [
            value[0] if answer.finished else answer.add(*value)
            for answer, value in zip(answers, zip(token, *values, strict=True), strict=True)
        ]
        if all(answer.finished for answer in answers):
            break
        if following != token:
            generation.replace(torch.tensor(following, device=device))
    return collect(prompts, answers, generation.stats)


def collect(prompts, answers, stats):
    """Returns the Rollouts of prompts (lists of ids) and their Answers. stats: of the decoder."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)

    def table(name, dtype, before):
        """Returns a list of every Answer as (B, N), with zeros or the prompts in front."""
        rows = [[*start, *getattr(answer, name)] for start, answer in zip(before, answers, strict=True)]
        return pad([torch.tensor(row, dtype=dtype) for row in rows])

    blank = [[0] * len(ids) for ids in prompts]
    return Rollouts(
        ids=table('ids', torch.int64, prompts),
        sampled=table('sampled', torch.bool, blank),
        log_p=table('log_p', torch.float32, blank),
        entropy=table('entropy', torch.float32, blank),
        answers=[answer.ids[:-1] if answer.finished else answer.ids for answer in answers],
        finished=[answer.finished or not answer.stop for answer in answers],
        stats=stats,
    )
