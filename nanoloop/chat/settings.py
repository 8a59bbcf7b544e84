"""
How an answer is generated: keys of chat.py, of its commands and of the server's requests.
"""

import secrets
from dataclasses import dataclass
from typing import Annotated

import torch

from nanoloop.chat.answer import Policy
from nanoloop.checks import Above, AtMost, Choice, Count, NotNegative, Size, UserError, settle_fields
from nanoloop.early_exit import EXIT, make_early_exit
from nanoloop.generate import Sampler


@dataclass
class Settings:
    # answers
    max_new_tokens: Count = 256  # most tokens of an answer
    temperature: NotNegative = 0.6  # divides the logits: below 1 = sharper; 0 = always the most likely token
    top_k: Count | None = 50  # draw from the k most likely tokens; None = from all
    top_p: Annotated[float, Above(0), AtMost(1)] | None = None  # nucleus sampling: its probability; None = 1
    seed: Size | None = None  # of the random numbers; None = another each time
    # loops
    n_loop: Count | None = None  # number of loops; None = that of the checkpoint
    exit: Choice(('', *EXIT)) = ''  # early exit: what decides that a token leaves; '' = never
    exit_threshold: NotNegative | None = None  # exit below it (kl in nats, diff), or at and above it (gate)
    min_loops: Count = 1  # smallest number of loops of a token; needs exit

    def __post_init__(self):
        """Raises UserError for a value out of its bounds, and for values that do not go together."""
        try:
            settle_fields(self)
        except OverflowError:
            raise UserError('a number is too large') from None
        make_early_exit(self)

    def policy(self, model):
        """Returns the Policy for a model. Raises UserError for an early exit that does not fit it."""
        n_loop = self.n_loop or model.config.n_loop
        policy = Policy(n_loop, self.exit, self.exit_threshold, self.min_loops)
        policy.early_exit(model)
        return policy

    def sampler(self, model):
        """Returns a Sampler with random numbers of its own, so that no other answer changes this one's."""
        generator = torch.Generator(model.lm_head.weight.device)
        generator.manual_seed(secrets.randbits(63) if self.seed is None else self.seed)
        return Sampler(model, self.temperature, self.top_k, self.top_p, generator)
