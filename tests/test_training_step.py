"""The host does not wait for the device in a training step, and learns of the step later.

On a GPU test_cuda.py asks CUDA itself. Here the operations of a step on a CPU are watched: those whose result
the host needs would make it wait for a GPU.
"""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from configurator import configure
from model import GPT, GPTConfig
from nanoloop import training_step
from nanoloop.batches import Batch
from nanoloop.ema import make_average
from nanoloop.machine import Machine
from nanoloop.objective import OBJECTIVE, TrainingLoss, set_trained_parts
from nanoloop.optimizer import make_optimizers, prepare_step, step_if_finite
from nanoloop.training_step import StepResult, train_step

RECIPES = ['gpt2', 'gpt2_looped', 'flt', 'looped_nanochat', 'huginn_style', 'ouro_1_4b']
# the shape of their results, or whether to go on, depends on values
WAITING = '_local_scalar_dense is_nonzero nonzero masked_select unique2 unique_consecutive equal'.split()


class Watch(TorchDispatchMode):
    """Notes the operations of the block for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ('index', 'index_put', 'index_put_') else ()
        if name in WAITING or any(x is not None and x.dtype == torch.bool for x in indices):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', RECIPES)
def test_the_host_waits_for_nothing_in_a_step_but_for_muon(name, monkeypatch):
    monkeypatch.setattr(training_step, 'sum_over_ranks', lambda m, value: value)  # of numbers of the CPU
    small = ['--size=1'] if name == 'looped_nanochat' else ['--n_embd=24', '--n_head=2']
    small += ['--vocab_size=70', '--block_size=32', '--gradient_accumulation_steps=2', '--n_block=2']
    c = configure((train.TrainConfig, GPTConfig), [f'config/train_{name}.py', *small, '--ema=0.9'], say=None)
    m, model = Machine(0, 1, torch.device('cpu'), 'cpu', torch.bfloat16), GPT(c.build(GPTConfig))
    set_trained_parts(model, OBJECTIVE[c.objective])
    (optimizers, _), average = make_optimizers(model, c), make_average(model, c)
    idx = torch.randint(70, (2, 33))
    batches = iter([Batch(idx[:, :-1], idx[:, 1:], seed).to_device(m) for seed in range(2)])
    with Watch() as watch:
        prepare_step(optimizers, 0, 1e-3)
        result = train_step(TrainingLoss(model, c), optimizers, m.scaler(), batches, c.n_loop, c, m)
        average.update(result.changed)
    assert watch.waits == ['_local_scalar_dense'] * (c.optimizer == 'muon')
    assert result.loss > 0 and result.grad_norm > 0


@pytest.mark.parametrize('make', [lambda p: torch.optim.AdamW(p, fused=True), torch.optim.Muon])
def test_a_step_is_the_optimizers_or_changes_nothing(make):
    """Bit for bit, and an optimizer's state with it, also where the device decides."""
    weights, grad = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (weights.clone().requires_grad_() for _ in range(2))
    ours, plain = make([p]), make([q])
    for factor in (1.0, math.nan, 0.5, math.inf):
        p.grad = factor * grad
        changed = step_if_finite([ours], p.grad.norm())
        assert changed.item() == math.isfinite(factor)
        if math.isfinite(factor):
            q.grad = factor * grad
            plain.step()
        assert torch.equal(p, q)
        for name, x in plain.state[q].items():
            assert torch.equal(ours.state[p][name], x), name


def test_numbers_of_a_step_are_read_where_it_is_logged(call, flags, monkeypatch):
    events, real_step, real_numbers = [], train.train_step, StepResult.numbers.func

    def step(*args):
        events.append('step')
        return real_step(*args)

    def numbers(result):
        events.append('read')
        return real_numbers(result)

    monkeypatch.setattr(train, 'train_step', step)
    monkeypatch.setattr(StepResult, 'numbers', functools.cached_property(numbers))
    StepResult.numbers.__set_name__(StepResult, 'numbers')
    assert call(train.main, *flags, '--log_interval=3', '--eval_interval=100', '--max_iters=8')[0] == 0
    by_three = ['step'] * 3 + ['read'] * 3
    assert events == ['step', 'read', *by_three, *by_three, 'step', 'read']


def test_bad_steps_between_two_lines_end_the_run_too(call, flags, tmp_path, monkeypatch):
    real, losses = train.TrainingLoss.forward, []

    def forward(self, *args):
        losses.append(1)
        loss, more = real(self, *args)
        return loss * (math.nan if len(losses) in (3, 4, 5) else 1), more

    monkeypatch.setattr(train.TrainingLoss, 'forward', forward)
    status, _, err = call(train.main, *flags, '--log_interval=10', '--eval_interval=8')
    assert status == 2 and 'at iter 4, 3 steps were skipped in a row' in err
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()
