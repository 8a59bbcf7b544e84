"""
A model that answers conversations: the model, its tokenizer and the form in which it reads them.
"""

import math

import torch

from nanoloop.chat.answer import Answer
from nanoloop.chat.conversation import choose_format
from nanoloop.lens import predictions_by_loop
from nanoloop.lens_page import token_text


class ChatModel:
    """Makes Answers for nanoloop/chat/engine.py.

    model: in eval mode. text: True = a base model, which continues the bare text. context: most tokens of a
    conversation with its answer; None = any number, of which the model sees the last block_size.
    """

    def __init__(self, model, tokenizer, text=False, context=None):
        self.model, self.tokenizer, self.config, self.context = model, tokenizer, model.config, context
        self.form = choose_format(tokenizer, text)
        self.view = min(context or math.inf, model.config.block_size)  # most tokens seen at once

    def prompt(self, conversation, settings):
        """Returns the ids of a prompt and the number of turns that it leaves out, see Conversation.prompt.

        A quarter of the view at most is kept free for the answer.
        """
        return conversation.prompt(self.form, self.view, min(settings.max_new_tokens, self.view // 4))

    def answer(self, conversation, settings, stops=(), **options):
        """Returns the Answer to a conversation, not generated yet, and the number of turns left out.

        settings: Settings. stops, options: see Answer. Raises UserError for settings that do not fit the
        model, and for a question that is too long.
        """
        policy, (ids, n_dropped) = settings.policy(self.model), self.prompt(conversation, settings)
        sampler, room = settings.sampler(self.model), (self.context or math.inf) - len(ids)
        most = min(settings.max_new_tokens, room)
        return Answer(ids, self.form, sampler, policy, most, stops, **options), n_dropped

    def lens(self, ids, n_prompt, policy, k):
        """Returns the Lens (nanoloop/lens.py) of the positions that predict an answer, ids[n_prompt:].

        k: number of predictions per position and loop.
        """
        idx = torch.tensor([ids[:-1]], device=self.model.lm_head.weight.device)  # (1, T)
        lens = predictions_by_loop(self.model, idx, policy.n_loop, k, policy.early_exit(self.model))
        first = n_prompt - 1
        return lens._replace(
            tokens=lens.tokens[:, :, first:], p=lens.p[:, :, first:], change=lens.change[:, :, first:],
            kept=lens.kept[:, first:], exits=None if lens.exits is None else lens.exits[:, first:],
        )  # fmt: skip

    def predictions(self, ids, n_prompt, policy, k=3):
        """Returns what every loop predicted for each token of an answer, as plain values.

        [{'text': the token, 'kept': the loop from which the last loop's prediction stays,
        'loops': [[[text, probability], ... k], ... a list per loop]}]
        """
        lens = self.lens(ids, n_prompt, policy, k)
        tokens, p = (x[:, 0].transpose(0, 1).tolist() for x in (lens.tokens, lens.p))  # [T][R][k] each
        return [
            dict(
                text=token_text(self.tokenizer, token),
                kept=kept,
                loops=[
                    [
                        [token_text(self.tokenizer, best), round(chance, 4)]
                        for best, chance in zip(*loop, strict=True)
                    ]
                    for loop in zip(of_token, p_of_token, strict=True)
                ],
            )
            for token, kept, of_token, p_of_token in zip(
                ids[n_prompt:], lens.kept[0].tolist(), tokens, p, strict=True
            )
        ]
