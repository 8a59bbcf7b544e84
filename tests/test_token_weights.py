"""Token weights and sources of batches: what fine-tuning and reinforcement learning will use."""

import types
from contextlib import nullcontext

import pytest
import torch
from helpers import load, randomize, same

import train
from model import GPT, GPTConfig
from nanoloop import pretraining
from nanoloop.batches import Batch, batch_seed, micro_batch_number, read_ahead
from nanoloop.objective import OBJECTIVE, TrainingLoss, set_trained_parts
from nanoloop.training_step import train_step
from train import TrainConfig

SIZES = dict(block_size=12, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=3)
M = types.SimpleNamespace(rank=0, world=1, cpu_group=None, autocast=nullcontext, to_device=lambda x: x)


def weighted_batch(seed=0, B=4, T=12):
    """Token ids, targets of which some are ignored, and weights of either sign."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (B, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, 2:7] = targets[3] = -1
    return ids[:, :-1].clone(), targets, torch.randn(B, T, generator=generator, dtype=torch.double)


@pytest.mark.parametrize('micros', [1, 2])
@pytest.mark.parametrize('objective', ['end', 'few', 'exit'])
def test_a_step_weighs_every_token_by_its_weight(objective, micros):
    """loss = sum of weight x loss of the token / number of targets that count, over all micro-batches."""
    model = randomize(GPT(GPTConfig(**SIZES, exit_gate=True))).double()
    idx, targets, weights = weighted_batch()
    rule, c = OBJECTIVE[objective], TrainConfig(objective=objective)
    set_trained_parts(model, rule)
    params = [p for p in model.parameters() if p.requires_grad]
    loops = rule.loops(3)
    token_losses, _ = rule.loss(*model.loss_table(idx, targets, 3, loops), loops, c)
    counts = targets != -1
    expected = (token_losses * weights * counts).sum() / counts.sum()
    grads = torch.autograd.grad(expected, params)
    before = [p.detach().clone() for p in params]
    parts = zip(*(x.chunk(micros) for x in (idx, targets, weights)), strict=True)
    source = iter([Batch(a, b, 0, w) for a, b, w in parts])
    sgd, scaler = torch.optim.SGD(params, lr=1.0), torch.amp.GradScaler('cpu', enabled=False)
    keys = types.SimpleNamespace(gradient_accumulation_steps=micros, grad_clip=0)
    result = train_step(TrainingLoss(model, c), [sgd], scaler, source, 3, keys, M)
    assert result.loss == pytest.approx(expected.item(), abs=1e-10)
    for old, p, grad in zip(before, params, grads, strict=True):
        assert torch.allclose(old - p, grad, atol=1e-10)


def test_what_is_logged_beside_the_loss_is_not_weighted():
    model = randomize(GPT(GPTConfig(**SIZES, exit_gate=True))).double()
    idx, targets, weights = weighted_batch()
    training_loss = TrainingLoss(model, TrainConfig(objective='exit'))
    (loss, extra), (weighted, other) = training_loss(idx, targets, 3), training_loss(idx, targets, 3, weights)
    assert loss != weighted and extra == other and len(extra) == 6


def test_weights_of_zero_and_one_are_targets_that_do_not_count_but_for_the_divisor():
    model, c = randomize(GPT(GPTConfig(**SIZES))).double(), TrainConfig()
    idx, targets, _ = weighted_batch()
    weights = (torch.arange(12) % 3 > 0).double().expand(4, 12)
    weighted, _ = TrainingLoss(model, c)(idx, targets, 3, weights)
    masked, _ = TrainingLoss(model, c)(idx, torch.where(weights > 0, targets, -1), 3)
    assert weighted.item() == pytest.approx(masked.item(), abs=1e-12)
    plain, _ = TrainingLoss(model, c)(idx, targets, 3, torch.ones(4, 12, dtype=torch.double))
    assert plain.item() == TrainingLoss(model, c)(idx, targets, 3)[0].item()


def arithmetic(split, c, m):
    """A source that reads no file: it counts modulo the vocabulary; half of every row weighs -0.5."""

    def make(step, micro):
        number = micro_batch_number(m, micro)
        first = torch.arange(c.batch_size)[:, None] + step + number
        ids = (first + torch.arange(c.block_size + 1)) % c.vocab_size  # (B, T + 1)
        weights = torch.where(torch.arange(c.block_size) < c.block_size // 2, 1.0, -0.5)
        seed = batch_seed(c, step, number)
        return Batch(ids[:, :-1], ids[:, 1:], seed, weights.expand(c.batch_size, -1))

    return lambda step: read_ahead(make, c, m, step)


def test_another_source_of_batches_trains_and_resumes_exactly(call, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, 'window_batches', arithmetic)
    keys = [*flags, '--dropout=0.1', '--gradient_accumulation_steps=2']
    assert call(train.main, *keys)[0] == 0
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    parts = [*keys, f'--out_dir={tmp_path}/parts']
    assert call(train.main, *parts, '--max_iters=7', '--lr_decay_iters=12')[0] == 0
    assert call(train.main, *parts, '--init_from=resume', '--lr_decay_iters=12')[0] == 0
    assert same(whole['model'], load(tmp_path / 'parts' / 'ckpt.pt')['model'])
    monkeypatch.undo()
    assert call(train.main, *keys, f'--out_dir={tmp_path}/windows')[0] == 0
    assert not same(whole['model'], load(tmp_path / 'windows' / 'ckpt.pt')['model'])


def test_a_source_reads_one_batch_ahead_onto_the_device():
    made, copied = [], []
    m = types.SimpleNamespace(world=1, rank=0, copies_in_threads=True)
    m.to_device = lambda x: copied.append(x.tolist()) or x

    def make(step, micro):
        made.append((step, micro))
        targets = torch.tensor([[step, micro, -1]])
        return Batch(torch.zeros_like(targets), targets, seed=10 * step + micro)

    source = read_ahead(make, types.SimpleNamespace(gradient_accumulation_steps=2), m, 3)
    got = [next(source) for _ in range(3)]
    assert [(batch.seed, batch.n_targets) for batch in got] == [(30, 2), (31, 2), (40, 2)]
    source.close()
    assert made == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert copied[1::2] == [[[step, micro, -1]] for step, micro in made]
    assert got[0].to_device(None) is got[0]
