"""Objectives against their formulas written out, the memory tricks against none, and the loops of a step."""

import math
import os
import signal
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import by_hand, load, randomize, read_log, same
from test_recipes import RECIPES, build

import model as model_file
import train
from model import GPT, INJECT, GPTConfig
from nanoloop.batches import Batch
from nanoloop.count import flops, parameters
from nanoloop.objective import (
    LOOP_GROWTH,
    LOOP_SAMPLING,
    OBJECTIVE,
    TrainingLoss,
    check_loops,
    exit_distribution,
    loops_at,
    set_trained_parts,
    training_flops,
)
from nanoloop.optimizer import (
    GROUPS,
    OPTIMIZER,
    Optimizer,
    decay_share_at,
    group_names,
    lr_at,
    make_optimizers,
    momentum_at,
    prepare_step,
)
from nanoloop.training_step import train_step
from train import TrainConfig, main

SIZES = dict(block_size=12, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=4)
M = types.SimpleNamespace(rank=0, world=1, kind='cpu', cpu_group=None, autocast=nullcontext)
M.to_device = lambda x: x


def make(objective, **keys):
    """(objective, its model) in double precision with random weights."""
    model = randomize(GPT(GPTConfig(**SIZES | dict(exit_gate=True)))).double()
    set_trained_parts(model, OBJECTIVE[objective])
    return TrainingLoss(model, TrainConfig(objective=objective, **keys)), model


def batch(seed=0, B=3, T=12):
    ids = torch.randint(23, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[0, 2:7] = targets[1, 11] = -1
    return ids[:, :-1].clone(), targets


def rows_by_hand(model, idx, targets, n_loop):
    """(weights, cross-entropies and gates of every loop): lists of (B, T), differentiable in the weights."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    w['lm_head.weight'] = w['transformer.wte.weight']
    ce, gates = [], []
    for n in range(1, n_loop + 1):
        p = by_hand(w, model.config, idx, n_loop=n).log_softmax(-1)
        ce.append(-p.gather(-1, targets.clamp(min=0)[..., None])[..., 0])
        s = by_hand(w, model.config, idx, n_loop=n, until='state')
        gates.append((s @ w['exit_gate.weight'][0] + w['exit_gate.bias']).sigmoid())
    return w, ce, gates


def exit_by_hand(ce, gates, beta):
    left, p = 1.0, []
    for g in gates[:-1]:
        p.append(left * g)
        left = left * (1 - g)
    p.append(left)
    return sum(a * b for a, b in zip(p, ce, strict=True)) + beta * sum(a * a.log() for a in p)


def gate_by_hand(ce, gates, ahead):
    loss = 0.0
    for r in range(1, len(ce)):
        improvement = (ce[r - 1] - ce[r]).detach().clamp(min=0)
        label = 1 / (1 + torch.exp(-50 * (improvement - 0.005)))
        go_on = 1 - gates[r - 1 if ahead else r]
        loss = loss - label * go_on.log() - (1 - label) * (1 - go_on).log()
    return loss / len(ce)


FORMULAS = {
    'end': lambda ce, gates: ce[-1],
    'step': lambda ce, gates: sum(ce) / len(ce),
    'few': lambda ce, gates: sum(ce[2 * len(ce) // 3 :]) / math.ceil(len(ce) / 3),
    'exit': lambda ce, gates: exit_by_hand(ce, gates, 0.07),
    'gate': lambda ce, gates: gate_by_hand(ce, gates, False),
    'gate_ahead': lambda ce, gates: gate_by_hand(ce, gates, True),
}


@pytest.mark.parametrize('n_loop', [2, 3, 4])
@pytest.mark.parametrize('name', FORMULAS)
def test_objectives_and_their_gradients_are_their_formulas(name, n_loop):
    ahead = name == 'gate_ahead'
    objective, model = make('gate' if ahead else name, beta=0.07, gate_ahead=ahead)
    idx, targets = batch()
    loss, more = objective(idx, targets, n_loop)
    w, ce, gates = rows_by_hand(model, idx, targets, n_loop)
    counted = targets != -1
    expected = (FORMULAS[name](ce, gates) * counted).sum() / targets.numel()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    loss.backward()
    expected.backward()
    frozen = not objective.rule.trains_model
    for key, p in model.named_parameters():
        gate = key.startswith('exit_gate')
        if (frozen and not gate) or (gate and not objective.rule.trains_gate):
            assert p.grad is None and not p.requires_grad, key
        else:
            assert p.grad.abs().sum() > 0 and torch.allclose(p.grad, w[key].grad, atol=1e-10), key
    for row in objective.rule.loops(n_loop) if len(objective.rule.loops(n_loop)) > 1 else ():
        expected = (ce[row] * counted).sum() / targets.numel()
        assert more[f'loss/loop_{row:02d}'].item() == pytest.approx(expected.item(), abs=1e-10)


def test_every_entry_has_its_formula_in_the_tests():
    missing = sorted((OBJECTIVE.keys() - FORMULAS.keys()) | (LOOP_GROWTH.keys() - GROWTH.keys()))
    assert not missing, f'write the formula of {missing} into FORMULAS or GROWTH of tests/test_objective.py'


def test_rows_of_the_objectives():
    rows = {name: [rule.loops(n) for n in (1, 2, 3, 4, 6, 9, 12)] for name, rule in OBJECTIVE.items()}
    assert rows['few'] == [(0,), (1,), (2,), (2, 3), (4, 5), (6, 7, 8), (8, 9, 10, 11)]  # FLT's
    assert rows['end'][3] == (3,) and rows['step'][3] == rows['exit'][3] == rows['gate'][3] == (0, 1, 2, 3)


def test_end_is_the_last_row_of_step():
    idx, targets = batch()
    end, (_, steps) = make('end')[0](idx, targets, 4)[0], make('step')[0](idx, targets, 4)
    assert end.item() == pytest.approx(steps['loss/loop_03'].item(), abs=1e-12)


def test_exits_of_a_constant_gate():
    p = exit_distribution(torch.full((4, 2, 3), 0.5))
    assert torch.equal(p, torch.tensor([0.5, 0.25, 0.125, 0.125])[:, None, None].expand(4, 2, 3))
    objective, model = make('exit')
    torch.nn.init.zeros_(model.exit_gate.weight), torch.nn.init.zeros_(model.exit_gate.bias)
    idx, targets = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    _, more = objective(idx, targets, 4)
    assert more['exit_loop'].item() == pytest.approx(0.5 + 2 * 0.25 + 3 * 0.125 + 4 * 0.125)
    assert more['entropy'].item() == pytest.approx(1.75 * math.log(2))


@pytest.mark.parametrize('name', OBJECTIVE)
def test_gates_that_are_certain_give_finite_gradients(name):
    objective, model = make(name)
    for value in (80.0, -80.0):
        torch.nn.init.constant_(model.exit_gate.bias, value)
        objective(*batch(), 4)[0].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', OBJECTIVE)
def test_masked_tokens_change_nothing_however_the_batch_is_cut(name):
    """The step of four uneven micro-batches is that of the mean over all targets that count."""
    idx, targets = batch(B=4)
    targets[3] = -1
    for micros in (1, 2, 4):
        objective, model = make(name)
        loss, _ = objective(idx, targets, 4)
        mean = loss * targets.numel() / (targets != -1).sum()
        learners = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(mean, learners)
        before = [p.detach().clone() for p in learners]
        batches = map(Batch, idx.chunk(micros), targets.chunk(micros), range(micros))
        c = types.SimpleNamespace(gradient_accumulation_steps=micros, grad_clip=0)
        scaler, sgd = torch.amp.GradScaler('cpu', enabled=False), torch.optim.SGD(learners, lr=1.0)
        told = train_step(objective, [sgd], scaler, batches, 4, c, M).loss
        assert told == pytest.approx(mean.item(), abs=1e-10)
        for old, p, g in zip(before, learners, expected, strict=True):
            assert torch.allclose(old - p, g, atol=1e-10)
    assert objective(idx, torch.full_like(targets, -1), 4)[0].item() == 0


@pytest.mark.parametrize('name', RECIPES)
def test_chunks_and_recomputation_change_no_gradient(name, monkeypatch):
    small = ['--size=1'] if name == 'looped_nanochat' else ['--n_embd=24', '--n_head=2', '--n_block=2']
    ids = torch.randint(23, (2, 17), generator=torch.Generator().manual_seed(0))
    results = {}
    for way in ('plain', 'held', 'recomputed'):
        model = build(name, *small, f'--recompute={way == "recomputed"}', '--bptt_k=None')[0].float().train()
        with torch.no_grad():
            for p in model.parameters():  # a gain of a half at any width: rounding must not be magnified
                p *= (6 / model.config.n_embd) ** 0.5 if p.dim() > 1 else 1
        with monkeypatch.context() as patch:
            if way == 'plain':
                patch.setattr(model_file, 'maybe_checkpoint', lambda again, f, *args: f(*args))
            else:
                patch.setattr(model, 'head_chunk', 5)
            torch.manual_seed(0)  # of the noise
            ce, gates = model.loss_table(ids[:, :-1], ids[:, 1:], 5, range(5))
            weigh = torch.linspace(0.5, 1.5, ce.numel()).view_as(ce) / ce.numel()
            ((ce * weigh).sum() + (0 if gates is None else (gates * weigh).sum())).backward()
        results[way] = [p.grad for p in model.parameters()]
    for way in ('held', 'recomputed'):
        for a, b in zip(results[way], results['plain'], strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm(), way


# -----------------------------------------------------------------------------
# loops


def draws(n, **keys):
    c = types.SimpleNamespace(objective='end', seed=1, loop_warmup=0, loop_max=None, **keys)
    c.loop_growth, c.max_iters = 'sqrt', 0
    return np.array([loops_at(step, c) for step in range(n)])


@pytest.mark.parametrize('mean, median, off', [(4, 4, 0.05), (32, 29, 0.3)])
def test_poisson_draws_huginns_numbers(mean, median, off):
    n = draws(50_000, n_loop=mean, loop_sampling='poisson')
    assert n.mean() == pytest.approx(mean + 1, abs=off) and np.median(n) == median and n.min() == 1
    if mean == 4:
        assert np.minimum(n, 16).mean() == pytest.approx(4.99, abs=off)
        assert (n <= 4).mean() == pytest.approx(0.51, abs=0.01)


def test_uniform_draws_every_number_around_n_loop():
    n = draws(5000, n_loop=3, loop_sampling='uniform')
    assert sorted(set(n)) == [1, 2, 3, 4, 5] and n.mean() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize('sampling', LOOP_SAMPLING)
def test_draws_are_functions_of_seed_and_step_within_their_limits(sampling):
    keys = dict(n_loop=5, loop_sampling=sampling, loop_max=7, loop_warmup=10)
    c = types.SimpleNamespace(objective='exit', seed=3, loop_growth='sqrt', **keys)
    n = [loops_at(step, c) for step in range(300)]
    assert n == [loops_at(step, c) for step in range(300)] and max(n) <= 7 and min(n) == 2
    if sampling != 'fixed':
        c.seed = 4
        assert n != [loops_at(step, c) for step in range(300)] and max(n) == 7


def test_loops_grow_as_published():
    c = types.SimpleNamespace(objective='end', seed=0, n_loop=6, loop_sampling='fixed', loop_max=None)
    c.loop_growth, c.max_iters = 'sqrt', 0
    c.loop_warmup = 100
    grown = [loops_at(step, c) for step in range(120)]
    assert grown == [
        max(1, math.ceil(6 * (1 - math.sqrt(1 - t / 100)))) if t < 100 else 6 for t in range(120)
    ]
    assert grown[0] == 1 and grown[99] == 6 and grown == sorted(grown)
    c.loop_sampling = 'poisson'
    sampled = [np.mean([loops_at(t, types.SimpleNamespace(**vars(c) | dict(seed=s))) for s in range(300)])
               for t in (10, 60, 110)]  # fmt: skip
    assert sampled == pytest.approx([2, 4, 7], abs=0.6)  # targets 1, 3, 6, and one more


GROWTH = {  # the share of n_loop by progress from 0 to 1, written out; a new entry needs its own
    'linear': lambda progress: progress,
    'sqrt': lambda progress: 1 - (1 - progress) ** 0.5,
    'late': lambda progress: 0,
}


@pytest.mark.parametrize('growth', LOOP_GROWTH)
def test_loops_grow_as_written_over_steps_or_over_a_share_of_the_run(growth):
    c = types.SimpleNamespace(objective='end', seed=0, n_loop=6, loop_sampling='fixed', loop_max=None)
    c.loop_growth, c.max_iters = growth, 80
    for c.loop_warmup, steps in ((40, 40), (0.5, 40), (0.25, 20), (0, 0), (1, 1)):
        expected = [max(1, math.ceil(6 * GROWTH[growth](step / steps))) for step in range(steps)]
        assert [loops_at(step, c) for step in range(80)] == expected + [6] * (80 - steps)
    c.loop_warmup, c.objective = 0.5, 'exit'
    assert min(loops_at(step, c) for step in range(80)) == 2  # an exit gate needs two loops


def test_late_loops_are_switched_on_in_a_run(call, flags, tmp_path):
    call(main, *flags, '--loop_growth=late', '--loop_warmup=0.5', '--n_loop=3')
    assert [line['train/loops'] for line in read_log(tmp_path / 'out') if 'lr' in line] == [1] * 6 + [3] * 6


def test_a_run_ends_when_its_flops_are_spent(call, flags, tmp_path):
    sampled = [*flags, '--loop_sampling=uniform', '--loop_warmup=5', '--lr_schedule=linear', '--min_lr=0']
    call(main, *sampled, '--max_iters=12')
    whole = [line for line in read_log(tmp_path / 'out') if 'lr' in line]
    limit = whole[7]['train/flops'] - 1  # reached by step 7, the eighth
    c = types.SimpleNamespace(**load(tmp_path / 'out' / 'ckpt.pt')['config'])
    model = GPT(GPTConfig(**load(tmp_path / 'out' / 'ckpt.pt')['model_args']))
    spent = np.cumsum([training_flops(model, c, loops_at(t, c)) * 4 * 8 for t in range(12)])
    assert [line['train/flops'] for line in whole] == pytest.approx(spent.tolist())
    assert len({line['train/loops'] for line in whole}) > 1
    status, out, _ = call(main, *sampled, f'--max_flops={limit:.0f}', f'--out_dir={tmp_path}/short')
    assert status == 0 and 'are spent after 8 steps' in out
    saved = load(tmp_path / 'short' / 'ckpt.pt')
    assert saved['iter_num'] == saved['evaluated'] == 8 and saved['flops'] == pytest.approx(spent[7])
    assert saved['loops_trained'] == sorted({loops_at(t, c) for t in range(8)})
    short = [line for line in read_log(tmp_path / 'short') if 'lr' in line]
    assert short[-1]['lr'] < 0.7 * max(line['lr'] for line in short)  # the schedule knows the end
    more = [f'--out_dir={tmp_path}/short', '--init_from=resume', '--batch_size=2']
    status, out, _ = call(main, *more, f'--max_flops={1.5 * limit:.0f}', '--max_iters=100')
    saved = load(tmp_path / 'short' / 'ckpt.pt')
    assert status == 0 and 1.5 * limit <= saved['flops'] < 1.7 * limit  # what was spent before counts
    assert 'a larger max_flops goes on' in call(main, *more)[1]


def test_flops_of_a_step_are_those_of_its_objective():
    model = GPT(GPTConfig(**SIZES, exit_gate=True))
    steps = {name: training_flops(model, TrainConfig(objective=name), 4) for name in OBJECTIVE}
    assert steps['end'] == sum(flops(model, 4)['training'].values())
    assert steps['step'] == steps['exit'] == sum(flops(model, 4, 4)['training'].values())
    assert steps['gate'] == sum(flops(model, 4, 4)['forward'].values())
    assert steps['few'] == sum(flops(model, 4, 2)['training'].values())


# -----------------------------------------------------------------------------
# optimizers


def test_muon_takes_the_matrices_of_blocks_and_injection():
    model = GPT(GPTConfig(**SIZES, tie_weights=False, bias=True))
    c = TrainConfig(optimizer='muon', matrix_lr=0.02, head_lr=0.004, embedding_lr=0.3, weight_decay=0.2,
                    learning_rate=0.01, lr_width=48)  # fmt: skip
    (muon, adamw), _ = make_optimizers(model, c)
    named = {id(p): name for name, p in model.named_parameters()}
    blocks, inject = ([named[id(p)] for p in group['params']] for group in muon.param_groups)
    assert inject == ['inject.weight'] and len(blocks) == 4 * 4 and all('.c_' in name for name in blocks)
    assert [group['weight_decay'] for group in muon.param_groups] == [0.2, 0.0]
    assert all(group['weight_decay'] == 0 for group in adamw.param_groups)
    prepare_step([muon, adamw], 150, lr_at(10**6, c))  # at the end: min_lr
    share = c.min_lr / c.learning_rate
    assert all(group['lr'] == pytest.approx(0.02 * share) for group in muon.param_groups)
    rates = {named[id(group['params'][0])].split('.')[-2]: group['lr'] for group in adamw.param_groups}
    assert rates == pytest.approx(
        {'wte': 0.6 * share, 'lm_head': 0.008 * share, rates_key(rates): 0.02 * share}
    )
    assert adamw.defaults['eps'] == 1e-8 and muon.defaults['nesterov'] and muon.defaults['ns_steps'] == 5
    assert all(group['momentum'] == momentum_at(150) == pytest.approx(0.9) for group in muon.param_groups)
    assert momentum_at(0) == 0.85 and momentum_at(300) == momentum_at(9999) == pytest.approx(0.95)


def rates_key(rates):
    """The name of the group that is neither embedding nor head."""
    return next(name for name in rates if name not in ('wte', 'lm_head'))


def test_what_decays():
    model = GPT(GPTConfig(**SIZES, tie_weights=False, bias=True, exit_gate=True))
    TrainingLoss(model, TrainConfig(objective='exit'))
    named = {id(p): name for name, p in model.named_parameters()}
    for optimizer, kinds in (('adamw', ('.c_', 'wte', 'wpe', 'lm_head', 'exit_gate')), ('muon', ('.c_',))):
        optimizers, _ = make_optimizers(model, TrainConfig(optimizer=optimizer, adam_eps=1e-5))
        groups = [group for o in optimizers for group in o.param_groups]
        decayed = {named[id(p)] for group in groups if group['weight_decay'] == 0.1 for p in group['params']}
        matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
        assert decayed == {name for name in matrices if any(kind in name for kind in kinds)}
        assert optimizers[-1].defaults['eps'] == 1e-5


def test_the_weight_decay_changes_linearly_to_its_end(call, flags, tmp_path, monkeypatch):
    c = TrainConfig(weight_decay=0.2, weight_decay_end=0.05)
    assert [0.2 * decay_share_at(step, c, 10) for step in (0, 5, 10, 99)] == pytest.approx(
        [0.2, 0.125, 0.05, 0.05]
    )
    assert decay_share_at(5, TrainConfig(), 10) == 1
    keys = [*flags, '--weight_decay=0.2', '--weight_decay_end=0.0', '--optimizer=muon']
    call(main, *keys)
    optimizers = load(tmp_path / 'out' / 'ckpt.pt')['optimizer']  # after the last step, number 11 of 12
    decays = [group['weight_decay'] for part in optimizers for group in part['param_groups']]
    assert max(decays) == pytest.approx(0.2 / 12) and min(decays) == 0
    whole = load(tmp_path / 'out' / 'ckpt.pt')['model']
    stopped, calls = [*keys, f'--out_dir={tmp_path}/stopped'], []

    def lr_at_and_signal(*args):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, 'lr_at', lr_at_and_signal)
        call(main, *stopped)
    call(main, *stopped, '--init_from=resume')
    assert same(whole, load(tmp_path / 'stopped' / 'ckpt.pt')['model'])


def test_the_momentum_rises_in_a_run(call, flags, tmp_path):
    call(main, *flags, '--optimizer=muon')
    groups = load(tmp_path / 'out' / 'ckpt.pt')['optimizer'][0]['param_groups']
    assert all(group['momentum'] == momentum_at(11) != 0.85 for group in groups)


def test_a_frozen_models_last_gate_is_the_best(call, flags, tmp_path):
    gate = ['--objective=gate', '--exit_gate=True', '--patience=1', '--dropout=0.2']
    assert call(main, *flags, *gate)[0] == 0
    best, last = (load(tmp_path / 'out' / name)['model']['exit_gate.bias'] for name in ('best.pt', 'ckpt.pt'))
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 12 and torch.equal(best, last)


def test_a_gate_learns_nothing_from_dropout():
    """Of loops that change nothing, no improvement is seen."""
    model = GPT(GPTConfig(**SIZES, exit_gate=True, dropout=0.5))
    model.train(OBJECTIVE['gate'].trains_model)
    objective = TrainingLoss(model, TrainConfig(objective='gate'))
    idx, targets = batch()
    loss, _ = objective(idx, targets, 4)
    go_on, label = 0.5, 1 / (1 + math.exp(50 * 0.005))  # a new gate is undecided
    model.exit_gate.weight.data.zero_()
    loss, _ = objective(idx, targets, 4)
    entropy = -label * math.log(go_on) - (1 - label) * math.log(1 - go_on)
    share = (targets != -1).sum().item() / targets.numel()
    assert loss.item() == pytest.approx(3 / 4 * entropy * share, rel=1e-5)
    model.exit_gate.bias.data.fill_(-math.log(label / (1 - label)))  # the gate that is right about it
    loss.backward()
    model.zero_grad()
    objective(idx, targets, 4)[0].backward()
    assert model.exit_gate.bias.grad.abs() < 1e-6


def test_a_gate_that_learns_alone_sees_no_dropout_in_a_run(call, flags, tmp_path):
    for dropout in (0.0, 0.5):
        keys = ['--objective=gate', '--exit_gate=True', f'--dropout={dropout}']
        assert call(main, *flags, *keys, f'--out_dir={tmp_path}/{dropout}')[0] == 0
    a, b = (load(tmp_path / str(dropout) / 'ckpt.pt')['model'] for dropout in (0.0, 0.5))
    assert same(a, b)


def test_mistakes_of_an_entrys_author_are_told(monkeypatch):
    model = GPT(GPTConfig(**SIZES))
    monkeypatch.setitem(OPTIMIZER, 'new', OPTIMIZER['muon']._replace(takes=('matrix',)))
    with pytest.raises(RuntimeError, match="optimizer new: there is no group 'matrix'"):
        make_optimizers(model, TrainConfig(optimizer='new'))
    monkeypatch.setitem(OBJECTIVE, 'new', OBJECTIVE['step']._replace(loss=lambda ce, *_: (ce, {})))
    for changes, told in (
        (dict(loss=lambda ce, *_: (ce, {})), r'its loss has shape \([14], 2, 3\)'),
        (dict(loss=lambda ce, *_: (ce[0], dict(w=ce.mean()))), r'its w has shape \(\), not shape \(B, T\)'),
        (dict(loss=lambda ce, *_: (ce[0], dict(w=0.5))), r'its w has 0.5, not shape \(B, T\)'),
        (dict(loss=lambda ce, *_: (ce[0], dict(loss=ce[0]))), "cannot be called 'loss'"),
        (dict(loss=lambda ce, *_: ce[0]), 'TypeError: cannot convert'),
        (dict(loss=lambda ce, gates, *_: ((ce * gates).mean(0), {})), 'TypeError.*None without trains_gate'),
        (
            dict(loops=lambda n: tuple(range(n))[::-1]),
            r'loops=\(3, 2, 1, 0\), expected rising indices of 4 loops',
        ),
        (dict(loops=lambda n: (-2, -1)), 'expected rising indices'),
        (dict(loops=lambda n: n - 1), 'loops=[03], expected rising'),
        (dict(loops=lambda n: (n,)), 'expected rising'),
        (dict(loops=lambda n: (1 // (n - 1),)), 'ZeroDivisionError'),  # at the least number of loops only
        (dict(loops=lambda n: (n.missing,)), 'AttributeError'),
    ):
        monkeypatch.setitem(OBJECTIVE, 'new', OBJECTIVE['step']._replace(**changes))
        with pytest.raises(RuntimeError, match=f'objective new: .*{told}'):
            check_loops(types.SimpleNamespace(**vars(TrainConfig(objective='new')), n_loop=4), model.config)
    monkeypatch.setitem(LOOP_GROWTH, 'new', lambda progress: 4 * progress)
    c = TrainConfig(loop_growth='new', loop_warmup=10)
    with pytest.raises(RuntimeError, match='loop_growth new: 2.0 is no share of n_loop'):
        loops_at(5, types.SimpleNamespace(**vars(c), n_loop=4))
    with pytest.raises(TypeError, match='c_projj'):
        model_file.init_rules(torch.nn.init.zeros_, c_projj=torch.nn.init.ones_)
    assert model_file.init_rules(1, bias=2)['bias'] == 2


def test_a_model_gets_a_gate_for_its_second_stage(call, flags, tmp_path):
    call(main, *flags)
    gated = [f'--init_from={tmp_path}/out', '--objective=gate', '--exit_gate=True', f'--out_dir={tmp_path}/b']
    status, out, _ = call(main, *flags[:1], *gated, '--max_iters=3', '--device=cpu', '--compile=False')
    assert status == 0 and 'step 12, with a new exit gate' in out
    a, b = (load(tmp_path / name / 'ckpt.pt')['model'] for name in ('out', 'b'))
    assert set(b) - set(a) == {'exit_gate.weight', 'exit_gate.bias'} and all(
        torch.equal(a[k], b[k]) for k in a
    )


def test_a_gate_learns_only_where_the_objective_teaches_it():
    for name, rule in OBJECTIVE.items():
        _, model = make(name)
        optimizers, _ = make_optimizers(model, TrainConfig(objective=name))
        held = {p for o in optimizers for group in o.param_groups for p in group['params']}
        gate = set(model.exit_gate.parameters())
        rest = set(model.parameters()) - gate
        assert held == (gate if rule.trains_gate else set()) | (set() if not rule.trains_model else rest), (
            name
        )


def test_an_untied_heads_rate_is_no_mistake_while_it_is_frozen(call, flags):
    keys = ['--objective=gate', '--exit_gate=True', '--tie_weights=False', '--head_lr=0.1', '--max_iters=1']
    status, out, err = call(main, *flags, *keys)
    assert status == 0 and 'leaves the model as it began, at random' in out, err


def test_resuming_with_other_learners_is_refused(call, flags, tmp_path, monkeypatch):
    call(main, *flags, '--max_iters=2')
    status, _, err = call(main, *flags, '--init_from=resume', '--optimizer=muon', '--max_iters=4')
    assert status == 2 and "optimizer='muon', expected 'adamw' as in the checkpoint, to go on" in err
    whole = OPTIMIZER['muon']._replace(
        build=Lion, takes=tuple(GROUPS)
    )  # as many parameters per group as AdamW
    monkeypatch.setitem(OPTIMIZER, 'lion', whole)
    status, _, err = call(main, *flags, '--init_from=resume', '--optimizer=lion', '--max_iters=4')
    assert status == 2 and "optimizer='lion', expected 'adamw' as in the checkpoint, to go on" in err
    call(main, *flags, '--objective=exit', '--exit_gate=True', '--max_iters=2', f'--out_dir={tmp_path}/b')
    status, _, err = call(
        main, f'--out_dir={tmp_path}/b', '--init_from=resume', '--objective=gate', '--max_iters=4'
    )
    assert status == 2 and "objective='gate', expected 'exit' as in the checkpoint, to go on" in err
    status, out, _ = call(main, *flags, '--init_from=resume', '--learning_rate=0.1', '--matrix_lr=0.05',
                          '--weight_decay=0.0', '--max_iters=4')  # fmt: skip
    assert status == 0 and 'changed: matrix_lr was None, is 0.05' in out


class Lion(torch.optim.Optimizer):
    """Moves by the sign of the momentum. Source: arXiv:2302.06675."""

    def __init__(self, params, betas):
        super().__init__(params, dict(betas=betas))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group['params'] if p.grad is not None):
                m = self.state[p].setdefault('m', torch.zeros_like(p))
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(group['lr'] * m.lerp(p.grad, 1 - group['betas'][0]).sign())
                m.lerp_(p.grad, 1 - group['betas'][1])


def test_an_optimizer_is_an_entry_of_a_table(call, flags, tmp_path, monkeypatch):
    """It takes its groups, decays what it says, is told every step, and resumes exactly."""
    steps = []
    lion = Optimizer(
        lambda groups, c: Lion(groups, (c.beta1, c.beta2)),
        takes=('matrices', 'head'),
        decays=('matrices',),
        moments=1,
        before_step=lambda optimizer, step: steps.append(step),
    )
    monkeypatch.setitem(OPTIMIZER, 'lion', lion)
    keys = [*flags, '--optimizer=lion', '--tie_weights=False', '--head_lr=0.05']
    status, out, err = call(main, *keys)
    assert status == 0 and steps == list(range(12)), err
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    taken, rest = whole['optimizer']
    assert [group['weight_decay'] for group in taken['param_groups']] == [0.1, 0.0]
    assert all(group['weight_decay'] == 0 for group in rest['param_groups'])
    assert taken['param_groups'][1]['lr_ratio'] == pytest.approx(0.05 / 1e-2)
    assert 'matrices, lion, learning rate 0.01' in out and 'embedding, adamw' in out
    parts = [*keys, f'--out_dir={tmp_path}/parts']
    call(main, *parts, '--max_iters=5', '--lr_decay_iters=12')
    call(main, *parts, '--init_from=resume', '--lr_decay_iters=12')
    assert same(whole['model'], load(tmp_path / 'parts' / 'ckpt.pt')['model'])


def test_a_parameter_in_no_group_or_no_section_ends_the_run_with_its_name(monkeypatch):
    model = GPT(GPTConfig(**SIZES))
    model.scale = torch.nn.Parameter(torch.ones(3))
    for work in (lambda: make_optimizers(model, TrainConfig()), lambda: parameters(model)):
        with pytest.raises(RuntimeError, match='scale'):
            work()
    part = INJECT['inject'](
        GPTConfig(**SIZES)
    )  # inside another part, which does not name its matrix, or does
    model = GPT(GPTConfig(**SIZES, input_injection='gated'))
    model.inject.inner = part
    assert group_names(model)['inject.inner.weight'] == 'injection'
    model.inject.groups = {'inner.weight': 'matrices'}
    assert group_names(model)['inject.inner.weight'] == 'matrices'
    for groups in ({'wieght': 'injection'}, {'weight': 'injections'}):
        monkeypatch.setattr(INJECT['inject'], 'groups', groups)
        with pytest.raises(
            RuntimeError, match='groups of Concat: there is no (parameter wieght|group injections)$'
        ):
            make_optimizers(GPT(GPTConfig(**SIZES)), TrainConfig())


# -----------------------------------------------------------------------------
# stages


def test_ouros_stages_follow_each_other(call, tiny_data, tmp_path):
    small = f'--dataset={tiny_data} --vocab_size=12 --n_embd=16 --n_head=2 --n_hidden=24 --n_block=2'.split()
    small += '--gradient_accumulation_steps=1 --max_iters=2 --eval_iters=2 --sample_tokens=0'.split()
    small += '--device=cpu --dtype=float32 --compile=False --batch_size=2 --warmup_iters=0'.split()
    before, loaded = 'scratch', {}
    for stage, T in (('stage1a', 8), ('stage1b', 8), ('stage2', 16), ('gate', 16)):
        out_dir = tmp_path / stage
        files = ['config/train_ouro_1_4b.py', f'config/ouro_{stage}.py']
        status, out, err = call(main, *files, *small, f'--block_size={T}', f'--init_from={before}',
                                f'--out_dir={out_dir}')  # fmt: skip
        assert status == 0, err
        before, saved = out_dir, load(out_dir / 'ckpt.pt')
        changed = {
            name for name, w in saved['model'].items() if name in loaded and not torch.equal(w, loaded[name])
        }
        loaded = saved['model']
        args = saved['model_args']
        records = [line for line in read_log(out_dir) if 'lr' in line]
        assert {'train/task_loss', 'train/exit_loop', 'train/loss/loop_03'} <= set(records[0])
    assert changed == {'exit_gate.weight', 'exit_gate.bias'}
    assert (args['rope_base'], args['block_size'], args['n_loop']) == (4e4, 16, 4)
