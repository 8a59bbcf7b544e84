"""What a model says after every loop."""

import torch
from helpers import randomize

from model import GPT, GPTConfig
from nanoloop.lens import loss_by_loop, top_predictions

SIZES = dict(block_size=16, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=3)


def test_each_loop_says_what_a_model_with_as_many_loops_says():
    model = randomize(GPT(GPTConfig(**SIZES))).double().eval()
    ids = torch.randint(23, (2, 13), generator=torch.Generator().manual_seed(0))
    idx, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -1
    for n_loop, loops in ((None, 3), (5, 5)):
        losses, (tokens, p) = (
            loss_by_loop(model, idx, targets, n_loop),
            top_predictions(model, idx, n_loop, k=4),
        )
        assert losses.shape == (loops,) and tokens.shape == p.shape == (loops, 2, 4)
        for i in range(loops):
            logits, loss = model(idx, targets, n_loop=i + 1)
            assert torch.allclose(losses[i], loss, atol=1e-12)
            expected = logits[:, -1].softmax(dim=-1).sort(dim=-1, descending=True)
            assert torch.equal(tokens[i], expected.indices[:, :4])
            assert torch.allclose(p[i], expected.values[:, :4], atol=1e-12)
