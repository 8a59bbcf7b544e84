"""The average of the weights: its formula, what it leaves alone, how it is saved, resumed and used."""

import math
import os
import signal

import pytest
import torch
from helpers import TINY, load, randomize, read_log, same

import bench
import chat
import eval as eval_script
import export
import sample
import train
from model import GPT, GPTConfig
from nanoloop import pretraining
from nanoloop.checkpoint import load_checkpoint
from nanoloop.ema import Average
from nanoloop.results import csv_beside, read_csv

SIZES = dict(block_size=8, vocab_size=13, n_embd=12, n_head=2, n_prelude=1, n_block=1, n_coda=0)


def average_by_hand(values, decay):
    """The average of tensors [w_0, w_1, ...] in float64, as one sum: w_0 is the weight before any step."""
    factors = [min(decay, (1 + t) / (10 + t)) for t in range(len(values) - 1)]
    shares = [1.0, *(1 - d for d in factors)]
    return sum(
        share * math.prod(factors[i:]) * w.double()
        for i, (share, w) in enumerate(zip(shares, values, strict=True))
    )


@pytest.mark.parametrize('decay', [0.5, 0.999])  # 0.5 is reached by the ninth update
def test_the_average_is_its_formula(decay):
    model = GPT(GPTConfig(**SIZES))
    frozen = model.transformer.ln_f.weight.requires_grad_(False)
    average, values = Average(model, decay), {name: [p.clone()] for name, p in model.named_parameters()}
    for seed in range(20):
        randomize(model, seed)
        average.update(torch.tensor(True))
        for name, p in model.named_parameters():
            values[name].append(p.clone())
    state = average.state_dict()
    assert state['updates'] == 20 and state['weights'].keys() == model.state_dict().keys() - {
        'transformer.ln_f.weight'
    }
    for name, p in model.named_parameters():
        if p is not frozen:
            got = state['weights'][name]
            assert got.dtype == torch.float32
            assert torch.allclose(got.double(), average_by_hand(values[name], decay), rtol=0, atol=1e-6), name
    assert state['weights']['lm_head.weight'] is state['weights']['transformer.wte.weight']


def test_a_short_run_has_forgotten_its_initial_weights():
    """All weights are 1 from the first step on: what is missing to 1 is the share of the initial weights."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = Average(model, 0.999)
    torch.nn.init.ones_(model.weight)
    for _ in range(12):
        average.update(torch.tensor(True))
    assert 1 - average.averages[0].item() == pytest.approx(1 / math.comb(21, 9), abs=1e-6)


@pytest.mark.parametrize('failure', [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_to_the_bit(failure):
    model = randomize(GPT(GPTConfig(**SIZES)))
    average = Average(model, 0.9)
    before, averages = randomize(model, 1).state_dict(), [a.clone() for a in average.averages]
    before = {name: value.clone() for name, value in before.items()}
    places = [p.data_ptr() for p in model.parameters()]
    try:
        with average.in_place_of_weights():
            assert same(list(model.parameters()), averages)
            if failure:
                raise failure
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert same(model.state_dict(), before) and same(average.averages, averages)
    assert [p.data_ptr() for p in model.parameters()] == places  # optimizers and compiled blocks know them


# -----------------------------------------------------------------------------
# runs


def without_average(record):
    return {
        k: v
        for k, v in record.items()
        if not k.endswith('_ema') and k not in ('train/ms', 'train/tok_per_sec')
    }


@pytest.fixture
def weights_of_steps(monkeypatch):
    """[weights before the first step, after it, ...], filled by a run; the 3rd and 4th step are skipped."""
    steps, real_step, real_loss = [], train.train_step, train.TrainingLoss.forward

    def copies(training_loss):
        return {name: w.clone() for name, w in training_loss.model.state_dict().items()}

    def train_step(training_loss, *rest):
        steps.extend([] if steps else [copies(training_loss)])
        result = real_step(training_loss, *rest)
        steps.append(copies(training_loss))
        return result

    def forward(self, *args):
        loss, extra = real_loss(self, *args)
        return loss * (math.nan if len(steps) in (3, 4) else 1), extra

    monkeypatch.setattr(train, 'train_step', train_step)
    monkeypatch.setattr(train.TrainingLoss, 'forward', forward)
    return steps


def test_a_run_averages_the_steps_that_change_weights_and_trains_as_without(
    call, flags, tmp_path, weights_of_steps
):
    flags = [*flags, '--dropout=0.1', '--optimizer=muon', '--eval_loops=1,3']
    assert call(train.main, *flags, '--ema=0.8', f'--out_dir={tmp_path}/ema')[0] == 0
    steps = weights_of_steps[:]
    assert same(steps[2], steps[3]) and same(steps[2], steps[4]) and not same(steps[4], steps[5])
    checkpoint = load(tmp_path / 'ema' / 'ckpt.pt')
    ema, changed = checkpoint['ema'], [w for step, w in enumerate(steps) if step not in (3, 4)]
    assert ema['updates'] == len(changed) - 1 == 10 and ema['weights'].keys() == checkpoint['model'].keys()
    for name, got in ema['weights'].items():
        expected = average_by_hand([w[name] for w in changed], 0.8)
        assert torch.allclose(got.double(), expected, rtol=0, atol=1e-6), name
    tied = [ema['weights'][name].data_ptr() for name in ('lm_head.weight', 'transformer.wte.weight')]
    assert tied[0] == tied[1]  # saved once

    weights_of_steps.clear()
    assert call(train.main, *flags)[0] == 0
    plain = load(tmp_path / 'out' / 'ckpt.pt')
    assert 'ema' not in plain and plain['best_val_loss'] == checkpoint['best_val_loss']
    for key in ('model', 'optimizer', 'stale', 'flops'):
        assert same(plain[key], checkpoint[key]), key
    logs = [read_log(tmp_path / name) for name in ('out', 'ema')]
    assert [without_average(record) for record in logs[1]] == [without_average(record) for record in logs[0]]
    last = logs[1][-1]
    assert {'val/loss_ema', 'val/bpb_ema', 'val/loss@3_ema', 'train/eval_loss_ema'} <= last.keys()
    assert logs[1][0]['val/loss_ema'] == logs[1][0]['val/loss'] and last['val/loss_ema'] != last['val/loss']


def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(call, flags, tmp_path, monkeypatch):
    """A signal comes while the average is evaluated in place of the weights."""
    flags = [*flags, '--ema=0.8', '--dropout=0.1']
    assert call(train.main, *flags)[0] == 0
    calls, real = [], pretraining.evaluate

    def evaluate(*args):
        calls.append(1)
        if len(calls) == 4:  # of the average, after 4 steps
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(pretraining, 'evaluate', evaluate)
    status, out, _ = call(train.main, *flags, f'--out_dir={tmp_path}/stopped')
    assert status == 128 + signal.SIGTERM and 'at step 4, saved' in out
    assert (
        call(train.main, '--init_from=resume', f'--out_dir={tmp_path}/stopped')[0] == 0
    )  # ema is a key of it
    whole, resumed = (load(tmp_path / name / 'ckpt.pt') for name in ('out', 'stopped'))
    for key in ('model', 'optimizer', 'ema'):
        assert same(whole[key], resumed[key]), key
    lines = [
        [r['val/loss_ema'] for r in read_log(tmp_path / name) if 'val/loss' in r]
        for name in ('out', 'stopped')
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_with_a_smaller_block_size_the_positions_that_are_left_go_on(call, flags, tmp_path):
    argv = [*flags, '--pos=learned', '--ema=0.5', '--learning_rate=1e-9', '--min_lr=0']
    assert call(train.main, *argv, '--max_iters=2')[0] == 0
    before = load(tmp_path / 'out/ckpt.pt')
    status, _, err = call(train.main, *argv, '--block_size=4', '--max_iters=3', '--init_from=resume')
    assert status == 0, err
    after, name = load(tmp_path / 'out/ckpt.pt'), 'transformer.wpe.weight'
    assert after['ema']['updates'] == 3
    assert torch.allclose(after['ema']['weights'][name], before['ema']['weights'][name][:4])
    shapes = [
        {values['exp_avg'].shape for values in state['optimizer']['state'].values()}
        for state in (before, after)
    ]
    assert shapes[0] - shapes[1] == {(8, 16)} and shapes[1] - shapes[0] == {(4, 16)}
    for values in after['optimizer']['state'].values():  # nothing is saved of the other positions
        assert values['exp_avg'].untyped_storage().nbytes() == values['exp_avg'].nbytes


def test_an_average_begins_and_ends_when_a_run_is_resumed(call, flags, tmp_path):
    resume = [*flags, '--init_from=resume', '--lr_decay_iters=12']
    assert call(train.main, *flags, '--max_iters=3')[0] == 0
    before = load(tmp_path / 'out' / 'ckpt.pt')['model']
    status, out, _ = call(train.main, *resume, '--max_iters=4', '--ema=0.5')
    assert (
        status == 0
        and 'ema=0.5: the checkpoint has no average, it begins with the weights of this step' in out
    )
    checkpoint = load(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['ema']['updates'] == 1
    for name, w in before.items():
        expected = 0.1 * w.double() + 0.9 * checkpoint['model'][name].double()
        assert torch.allclose(checkpoint['ema']['weights'][name].double(), expected, rtol=0, atol=1e-7)
    status, out, _ = call(train.main, *resume, '--max_iters=5')
    assert (
        status == 0 and ' average ' not in out and load(tmp_path / 'out' / 'ckpt.pt')['ema']['updates'] == 2
    )
    status, out, _ = call(train.main, *resume, '--max_iters=6', '--ema=None')
    assert status == 0 and 'ema=None: the average of the weights ends here' in out
    assert 'ema' not in load(tmp_path / 'out' / 'ckpt.pt')


# -----------------------------------------------------------------------------
# the average in place of the weights


@pytest.fixture(scope='module')
def folder(tiny_data, tmp_path_factory):
    """A folder with the run `ema`, whose best checkpoint is its last, and `plain`, without an average."""
    tmp = tmp_path_factory.mktemp('ema')
    keys = [f'--dataset={tiny_data}', *TINY, '--max_iters=4', '--eval_iters=0']
    train.main([*keys, f'--out_dir={tmp}/ema', '--ema=0.9'])
    train.main([*keys, f'--out_dir={tmp}/plain', '--max_iters=1'])
    return tmp


def average_of(folder):
    checkpoint = load(folder / 'ema' / 'ckpt.pt')
    assert not same(checkpoint['ema']['weights'], checkpoint['model'])
    return checkpoint['ema']['weights']


def test_eval_measures_what_training_has_logged(call, folder):
    last, flags = read_log(folder / 'ema')[-1], [f'--out_dir={folder}/ema', '--device=cpu', '--dtype=float32']
    losses = []
    for weights, key in (('ema', 'val/loss_ema'), ('raw', 'val/loss')):
        status, _, err = call(eval_script.main, *flags, f'--weights={weights}')
        assert status == 0 and ('the average of the weights' in err) == (weights == 'ema')
        (row,) = read_csv(csv_beside(dict(path=f'{folder}/ema/best.pt', weights=weights)))
        assert float(row['loss']) == pytest.approx(last[key], abs=1e-6)
        losses.append(row['loss'])
    assert losses[0] != losses[1] and {path.name for path in folder.glob('ema/*.csv')} == {
        'eval.csv',
        'eval-ema.csv',
    }
    status, _, err = call(eval_script.main, *flags, '--weights=ema', f'--csv={folder}/ema/eval.csv')
    assert status == 2 and 'has results of another run' in err


def test_scripts_load_the_average(call, folder, tmp_path):
    average, argv = average_of(folder), [f'--out_dir={folder}/ema', '--weights=ema']
    model, _ = load_checkpoint(folder / 'ema', weights='ema')
    assert same(dict(model.state_dict()), average) and not same(
        load_checkpoint(folder / 'ema')[0].state_dict(), average
    )
    status, out, _ = call(export.main, *argv, f'--to={tmp_path}/exported')
    assert status == 0 and 'the average of the weights' in out
    assert same(dict(load_checkpoint(tmp_path / 'exported')[0].state_dict()), average)
    texts, keys = [], ['--device=cpu', '--dtype=float32', '--max_new_tokens=60', '--start=abc']
    for name in (argv, [f'--out_dir={tmp_path}/exported'], argv[:1]):
        status, text, err = call(sample.main, *name, *keys)
        assert status == 0 and ('the average of the weights' in err) == (name == argv)
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]
    status, _, err = call(chat.main, *argv, '--device=cpu', '--prompt=abc', '--max_new_tokens=2')
    assert status == 0 and 'step 4, the average of the weights, n_loop 2' in err
    decode = ['--mode=decode', '--device=cpu', '--rounds=1', '--tokens=2']
    status, out, _ = call(bench.main, *decode, f'--init_from={folder}/ema', '--weights=ema')
    assert status == 0 and 'step 4, the average of the weights: ' in out


def test_training_begins_with_the_average_or_evaluates_it(call, folder, flags, tmp_path):
    begin = [
        flags[0],
        f'--out_dir={tmp_path}/b',
        f'--init_from={folder}/ema',
        '--device=cpu',
        '--eval_iters=0',
    ]
    status, out, _ = call(train.main, *begin, '--weights=ema', '--max_iters=0')
    assert status == 0 and 'average of the weights of' in out
    assert same(load(tmp_path / 'b' / 'ckpt.pt')['model'], average_of(folder))
    # the key is not inherited: going on takes the weights of the checkpoint, and so does evaluating them
    resume = [f'--out_dir={tmp_path}/b', '--init_from=resume']
    status, out, _ = call(train.main, *resume, '--eval_only=True')
    assert status == 0 and 'val loss ' in out and 'loss_ema' not in out
    status, out, _ = call(train.main, *resume, '--max_iters=1', '--sample_tokens=0')
    assert status == 0 and 'weights was' not in out
    status, out, _ = call(
        train.main, f'--out_dir={folder}/ema', '--init_from=resume', '--eval_only=True', '--weights=ema'
    )
    logged = f'val loss_ema {read_log(folder / "ema")[-1]["val/loss_ema"]:.4f}'
    assert status == 0 and logged in out and 'val loss ' not in out and 'average of the weights of' in out


WRONG = [
    (train, ['--ema=1'], 'ema=1.0, expected at least 0 and below 1, or None'),
    (train, ['--ema=-0.1'], 'ema=-0.1, expected at least 0 and below 1, or None'),
    (train, ['--weights=best'], "weights='best', expected one of raw, ema"),
    (train, ['--weights=ema'], "weights='ema', expected raw with init_from=scratch: there is no checkpoint"),
    (
        train,
        ['--weights=ema', '--init_from=resume', '--out_dir={}/ema'],
        'expected raw with init_from=resume, which',
    ),
    (bench, ['--weights=ema'], "weights='ema', expected raw, or --mode=decode"),
    (export, ['--weights=ema', '--init_from={}/ema/nothing', '--to=x'], 'there is no folder'),
]
HAS_NONE = (
    "weights='ema', expected raw: {}/plain/{} has no average of the weights, which train.py saves with --ema"
)
for module, file, argv in (
    (train, 'ckpt.pt', ['--init_from={}/plain']),
    (train, 'ckpt.pt', ['--init_from=resume', '--out_dir={}/plain', '--eval_only=True']),
    (bench, 'ckpt.pt', ['--init_from={}/plain', '--mode=decode']),
    *((module, 'best.pt', ['--out_dir={}/plain']) for module in (sample, chat, eval_script)),
    (export, 'best.pt', ['--out_dir={}/plain', '--to={}/exported']),
):
    WRONG.append((module, ['--weights=ema', *argv], HAS_NONE.format('{}', file)))


@pytest.mark.parametrize('module, argv, told', WRONG)
def test_mistakes_are_told_in_a_line(call, folder, tmp_path, tiny_data, module, argv, told):
    argv = [arg.format(folder) for arg in argv]
    if module is train:
        argv = [f'--dataset={tiny_data}', f'--out_dir={tmp_path}/out', '--device=cpu', *argv]
    status, _, err = call(module.main, *argv)
    line = err.splitlines()[-1]  # those before it are the flags
    assert status == 2 and told.format(folder) in line and line.startswith(f'{module.__name__}.py: '), err
    assert 'Traceback' not in err
    assert not (tmp_path / 'out').exists()
