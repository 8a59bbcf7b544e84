"""The head where weights are known beforehand: plain gradients, one product fewer, no more memory."""

import types

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from model import GPT, GPTConfig
from nanoloop import objective as objective_file
from nanoloop.known_weights import WeightedNll
from nanoloop.machine import Machine, prepare_training
from nanoloop.objective import OBJECTIVE, LossRule, TrainingLoss, try_rule

V, LINEAR = 23, [name for name, rule in OBJECTIVE.items() if rule.linear]
generator = torch.Generator().manual_seed(3)
IDX = torch.randint(V, (2, 16), generator=generator)
TARGETS = torch.randint(V, (2, 16), generator=generator)
TARGETS[0, :5] = -1
WEIGHTS = torch.randn(2, 16, generator=generator, dtype=torch.float64)  # also negative, as advantages


def make(objective, linear=True, **changes):
    """Returns a TrainingLoss in float64; with linear=False its gradients are made in the backward pass."""
    torch.manual_seed(1)
    keys = dict(block_size=16, vocab_size=V, n_head=2, n_embd=16, n_prelude=1, n_block=1, n_coda=1, n_loop=4)
    loss = TrainingLoss(
        GPT(GPTConfig(**keys | changes)).double().train(), types.SimpleNamespace(objective=objective)
    )
    loss.rule = loss.rule._replace(linear=linear)
    return loss


def test_the_linear_rules_are_known():
    assert LINEAR == ['end', 'step', 'few']


@pytest.mark.parametrize('chunk', [2**25, 7 * V, 1])
@pytest.mark.parametrize('changes', [{}, dict(softcap=2.0, tie_weights=False), dict(recompute=True)])
@pytest.mark.parametrize('objective', LINEAR)
def test_gradients_are_the_plain_ones(monkeypatch, objective, changes, chunk):
    results = []
    for linear in (True, False):
        monkeypatch.setattr(model_file, 'HEAD_CHUNK', chunk if linear else 2**25)
        loss = make(objective, linear, **changes)
        value, extra = loss(IDX, TARGETS, 4, WEIGHTS)
        (3 * value).backward()
        results.append([value, *extra.values(), *(p.grad for p in loss.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_frozen_head_gets_no_gradient_and_passes_it_on():
    loss, plain = (make('end', linear, tie_weights=False) for linear in (True, False))
    for each in (loss, plain):
        each.model.lm_head.weight.requires_grad_(False)
        each(IDX, TARGETS, 4)[0].backward()
    assert loss.model.lm_head.weight.grad is None
    ours, theirs = (each.model.transformer.wte.weight.grad for each in (loss, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('objective, loops', [('end', 1), ('step', 4), ('few', 2)])
def test_the_head_computes_every_token_once(monkeypatch, objective, loops):
    """Three products of 2 N C V FLOPs: forward, gradients of input and weight. Recomputing is a fourth."""
    monkeypatch.setattr(model_file, 'HEAD_CHUNK', 7 * V)
    flops = {}
    for linear in (True, False):
        loss = make(objective, linear, tie_weights=False)
        with FlopCounterMode(display=False) as counter:
            loss(IDX, TARGETS, 4)[0].backward()
        flops[linear] = counter.get_total_flops()
    assert flops[False] - flops[True] == 2 * loops * IDX.numel() * 16 * V


@pytest.mark.parametrize('linear', [True, False])
def test_a_gpus_compiled_loss_and_larger_chunks_change_nothing(monkeypatch, linear):
    monkeypatch.setattr(model_file, 'HEAD_CHUNK', 7 * V)
    plain, prepared = (make('step', linear) for _ in range(2))
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f: real(f, backend='aot_eager'))
    prepare_training(prepared.model, Machine(0, 1, torch.device('cpu'), 'cuda', torch.float32, compile=True))
    assert prepared.model.head_chunk == 4 * 7 and plain.model.head_chunk == 7
    torch.compiler.reset()
    results = []
    for loss in (plain, prepared):
        value, extra = loss(IDX, TARGETS, 4)
        value.backward()
        results.append([value, *extra.values(), *(p.grad for p in loss.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.compiler.reset()


def test_one_chunk_of_logits_exists(monkeypatch):
    monkeypatch.setattr(model_file, 'HEAD_CHUNK', 7 * V)
    loss, sizes = make('step'), []
    loss.model.lm_head.register_forward_hook(lambda module, args, logits: sizes.append(len(logits)))
    loss(IDX, TARGETS, 4)[0].backward()
    assert max(sizes) == 7 and sum(sizes) == 4 * IDX.numel()


def test_small_weights_do_not_vanish_in_float16():
    """float16 ends at 6e-8; a scaler's factor comes after the gradient is made."""
    x, weight = torch.randn(2, 6, 8, generator=generator).unbind()  # (N, C), (V, C)
    weight = weight.requires_grad_()
    y, factors = torch.arange(6), torch.full((1, 6), 1e-9)

    def nll(x, targets):
        return F.cross_entropy((x.half() @ weight.half().T).float(), targets, reduction='none')

    inputs = x.clone().requires_grad_()
    loss, _ = WeightedNll.apply(nll, 4, y, factors, weight, inputs)
    (2.0**16 * loss).backward()
    found = inputs.grad, weight.grad
    inputs, weight = (each.detach().requires_grad_() for each in (x, weight))
    expected = torch.autograd.grad(
        (F.cross_entropy(inputs @ weight.T, y, reduction='none') * factors * 2.0**16).sum(), (inputs, weight)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_weights_of_zero_give_no_gradient():
    loss = make('end')
    loss(IDX, TARGETS, 4, torch.zeros(2, 16))[0].backward()
    assert all(not p.grad.any() for p in loss.parameters())


def test_a_rule_that_is_not_linear_is_told(monkeypatch):
    def squared(ce, gates, loops, c):
        return ce.square().mean(dim=0), {}

    rule = LossRule(OBJECTIVE['end'].loops, squared, linear=True)
    with pytest.raises(RuntimeError, match='objective mine: .*not linear'):
        try_rule('mine', rule, 3, None)
    monkeypatch.setitem(objective_file.OBJECTIVE, 'mine', rule._replace(linear=False))
    try_rule('mine', objective_file.OBJECTIVE['mine'], 3, None)
