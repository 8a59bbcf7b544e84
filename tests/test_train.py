import contextlib
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, load, read_log, same, script
from resume_under_fire import survive

import train
from model import GPT, GPTConfig
from nanoloop import batches, pretraining, report, run_folder, saving
from nanoloop.datasets import Split, read_meta
from nanoloop.evaluate import evaluate
from nanoloop.optimizer import SCHEDULE, lr_at, make_optimizers
from nanoloop.prepare import write_text
from nanoloop.tokenizer import Characters
from train import TrainConfig, main

VARIANTS = {
    'plain': [],
    'noise': ['--input_injection=inject_random', '--dropout=0.1'],
    'accumulation': ['--gradient_accumulation_steps=3', '--dropout=0.2'],
    'passthrough': ['--input_injection=passthrough', '--batch_size=2'],
    'truncated': ['--bptt_k=1', '--weight_decay=0.0', '--lr_schedule=linear'],
    'bfloat16': ['--dtype=bfloat16', '--dropout=0.1'],
    'float16': ['--dtype=float16'],
    'sampled': '--loop_sampling=poisson --loop_max=6 --loop_warmup=8 --optimizer=muon --dropout=0.1'.split(),
    'exits': '--objective=exit --exit_gate=True --loop_sampling=uniform --n_loop=3 --recompute=True'.split(),
}


def losses(out_dir):
    return [line['train/loss'] for line in read_log(out_dir) if 'lr' in line]


# -----------------------------------------------------------------------------
# schedule


@pytest.mark.parametrize('schedule', SCHEDULE)
def test_the_learning_rate_rises_stays_and_falls(schedule):
    keys = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110, warmdown_frac=0.5)
    c = TrainConfig(lr_schedule=schedule, **keys)
    assert lr_at(0, c) == pytest.approx(1 / 11) and lr_at(9, c) == pytest.approx(10 / 11)
    assert lr_at(10, c) == 1.0 and lr_at(110, c) == lr_at(500, c) == pytest.approx(0.1)
    middle = dict(cosine=0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)), linear=1.0)[schedule]
    assert lr_at(
        60, c if schedule == 'cosine' else TrainConfig(lr_schedule='linear', **keys | dict(warmdown_frac=0.4))
    ) == (pytest.approx(middle))
    assert lr_at(200, TrainConfig(lr_schedule=schedule, decay_lr=False, **keys)) == 1.0


def test_linear_falls_over_the_last_share_of_the_run():
    keys = dict(learning_rate=1.0, min_lr=0.0, warmup_iters=0, max_iters=100, warmdown_frac=0.2)
    c = TrainConfig(lr_schedule='linear', **keys)
    assert [lr_at(step, c) for step in (0, 80, 90, 95, 100)] == pytest.approx([1, 1, 0.5, 0.25, 0])


@pytest.mark.parametrize('warmup, end', [(0, 0), (10, 10), (10, 5), (0, 1)])
def test_odd_schedules_do_not_divide_by_zero(warmup, end):
    for schedule in SCHEDULE:
        c = TrainConfig(lr_schedule=schedule, warmup_iters=warmup, lr_decay_iters=end, warmdown_frac=0.0)
        assert all(c.min_lr <= lr_at(step, c) <= c.learning_rate for step in range(30) if step >= warmup)


# -----------------------------------------------------------------------------
# what a run is a function of


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one(call, flags, tmp_path, variant):
    options = [*flags, *VARIANTS[variant]]
    assert call(main, *options)[0] == 0
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    parts = [*options, f'--out_dir={tmp_path}/parts']
    assert call(main, *parts, '--max_iters=7', '--lr_decay_iters=12', '--eval_interval=4')[0] == 0
    status, out, _ = call(main, *parts, '--init_from=resume', '--lr_decay_iters=12')
    assert status == 0 and 'resuming at step 7' in out and 'changed: max_iters was 7, is 12' in out
    resumed = load(tmp_path / 'parts' / 'ckpt.pt')
    for key in ('model', 'optimizer', 'iter_num', 'flops', 'loops_trained'):
        assert same(whole[key], resumed[key]), key
    assert losses(tmp_path / 'out') == losses(tmp_path / 'parts')


def test_a_run_is_the_loop_that_one_would_write(call, flags, tmp_path):
    keys = [
        '--gradient_accumulation_steps=3',
        '--dropout=0.1',
        '--weight_decay=0.3',
        '--beta1=0.7',
        '--beta2=0.8',
    ]
    call(main, *flags, *keys, '--grad_clip=0.5', '--input_injection=inject_random')
    saved = load(tmp_path / 'out' / 'ckpt.pt')
    c = types.SimpleNamespace(**saved['config'])
    split = Split(c.dataset, read_meta(c.dataset), 'train', c.block_size, c.vocab_size)
    torch.manual_seed(c.seed)
    model = GPT(GPTConfig(**saved['model_args']))
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and name != 'inject.weight']
    rest = [p for p in model.parameters() if not any(p is q for q in decayed)]
    groups = [dict(params=decayed, weight_decay=0.3), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.7, 0.8), foreach=False)
    for step in range(c.max_iters):
        for micro in range(3):
            idx, targets, seed, *_ = batches.draw_windows(
                split, c, types.SimpleNamespace(rank=0, world=1), step, micro
            )
            torch.manual_seed(seed)
            (model(idx, targets)[1] / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, c)
        optimizer.step()
        optimizer.zero_grad()
    for name, w in model.state_dict().items():
        assert torch.allclose(w, saved['model'][name], atol=1e-6), name


def test_resuming_needs_no_flags_but_the_folder(call, flags, tmp_path):
    call(main, *flags, '--dropout=0.1')
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    (tmp_path / 'out' / 'prev.pt').rename(tmp_path / 'out' / 'ckpt.pt')
    assert call(main, '--init_from=resume', f'--out_dir={tmp_path}/out')[0] == 0
    assert same(whole['model'], load(tmp_path / 'out' / 'ckpt.pt')['model'])
    assert len(losses(tmp_path / 'out')) == 12


def test_evaluating_more_often_changes_nothing(call, flags, tmp_path):
    for name, interval in (('a', 1), ('b', 5), ('c', 1000)):
        call(
            main,
            *flags,
            '--input_injection=inject_random',
            f'--out_dir={tmp_path}/{name}',
            f'--eval_interval={interval}',
        )
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') == losses(tmp_path / 'c')
    assert same(load(tmp_path / 'a' / 'ckpt.pt')['model'], load(tmp_path / 'c' / 'ckpt.pt')['model'])


def test_a_run_can_begin_without_an_evaluation(call, flags, tmp_path):
    for name, at_start in (('with', True), ('without', False)):
        assert call(main, *flags, f'--out_dir={tmp_path}/{name}', f'--eval_at_start={at_start}')[0] == 0
    steps = [
        [line['iter'] for line in read_log(tmp_path / n) if 'val/loss' in line] for n in ('with', 'without')
    ]
    assert steps == [[0, 4, 8, 12], [4, 8, 12]]
    model, other = (load(tmp_path / name / 'ckpt.pt')['model'] for name in ('with', 'without'))
    assert same(model, other)


def test_seeds_differ_and_repeat(call, flags, tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        call(main, *flags, f'--out_dir={tmp_path}/{name}', f'--seed={seed}')
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') != losses(tmp_path / 'c')


def test_micro_batches_are_their_places_in_the_global_batch(tiny_data):
    split = Split(tiny_data, read_meta(tiny_data), 'train', 8, 12)
    c = types.SimpleNamespace(seed=3, batch_size=4, gradient_accumulation_steps=4)

    def drawn(world):
        ranks = [types.SimpleNamespace(rank=rank, world=world) for rank in range(world)]
        return [batches.draw_windows(split, c, m, 5, micro) for micro in range(4 // world) for m in ranks]

    for world in (2, 4):
        assert same(drawn(1), drawn(world))
    assert len({x.numpy().tobytes() for x, *_ in drawn(1)}) == len({batch.seed for batch in drawn(1)}) == 4
    m = types.SimpleNamespace(rank=0, world=1, to_device=lambda x: x, copies_in_threads=True)
    assert not torch.equal(
        batches.draw_windows(split, c, m, 6, 0)[0], batches.draw_windows(split, c, m, 5, 0)[0]
    )
    ahead = batches.window_batches(split, c, m)(5)
    expected = [*drawn(1), batches.draw_windows(split, c, m, 6, 0)]
    assert same([next(ahead) for _ in range(5)], [batch.to_device(m) for batch in expected])


def test_accumulation_equals_one_large_batch(call, flags, tmp_path, monkeypatch):
    micro_batches = {}
    real = batches.draw_windows

    def together(split, c, m, step, micro):
        if c.gradient_accumulation_steps == 2:
            micro_batches[step, micro] = real(split, c, m, step, micro)
            return micro_batches[step, micro]
        a, b = micro_batches[step, 0], micro_batches[step, 1]
        return batches.Batch(torch.cat((a[0], b[0])), torch.cat((a[1], b[1])), a[2])

    monkeypatch.setattr(batches, 'draw_windows', together)
    call(main, *flags, '--gradient_accumulation_steps=2', f'--out_dir={tmp_path}/a', '--max_iters=10')
    micro_batches.update({(10, i): micro_batches[9, i] for i in (0, 1)})  # one is read ahead
    call(main, *flags, '--batch_size=8', f'--out_dir={tmp_path}/b', '--max_iters=10')
    assert losses(tmp_path / 'a') == pytest.approx(losses(tmp_path / 'b'), abs=1e-5)


# -----------------------------------------------------------------------------
# evaluation


def test_evaluation_is_the_whole_split_and_counts_bytes(call, tmp_path, tiny_data):
    from nanoloop.prepare import write_text
    from nanoloop.tokenizer import Characters

    text = tmp_path / 'input.txt'
    text.write_text('a\u20acb' * 100)  # the euro sign has three bytes
    write_text(tmp_path / 'euro', [text], Characters('ab\u20ac'), 'euro')
    meta = json.loads((tmp_path / 'euro' / 'meta.json').read_text())
    meta['token_bytes'][0] = 0  # as if a were a special token
    (tmp_path / 'euro' / 'meta.json').write_text(json.dumps(meta))
    flags = [f'--dataset={tmp_path}/euro', f'--out_dir={tmp_path}/out', *TINY]
    assert call(main, *flags, '--eval_iters=0', '--batch_size=7')[0] == 0
    from nanoloop.checkpoint import load_checkpoint

    model, _ = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    ids = torch.from_numpy(np.fromfile(tmp_path / 'euro' / 'val.bin', '<u2').astype(np.int64))
    nll, size, nll_of_bytes = 0.0, 0, 0.0
    for start in range(0, len(ids) - 1, 8):
        window = ids[start : start + 9]
        ce, _ = model.eval().double().loss_table(window[None, :-1], window[None, 1:])
        lengths = torch.tensor([0, 1, 3])[window[1:]]
        nll, size = nll + ce.sum().item(), size + int(lengths.sum())
        nll_of_bytes += ce[0, 0, lengths > 0].sum().item()
    line = [line for line in read_log(tmp_path / 'out') if 'val/loss' in line][-1]
    assert line['val/loss'] == pytest.approx(nll / (len(ids) - 1), abs=1e-5)
    assert line['val/bpb'] == pytest.approx(nll_of_bytes / size / math.log(2), abs=1e-5)
    assert line['val/ppl'] == pytest.approx(math.exp(line['val/loss']))


def test_evaluation_takes_eval_iters_batches(call, flags, monkeypatch):
    asked, real = [], Split.eval_windows
    monkeypatch.setattr(Split, 'eval_windows', lambda split, n=None: asked.append(n) or real(split, n))
    call(main, *flags, '--eval_iters=3', '--max_iters=1')
    assert asked == [12, 12] * 2  # at the first and the last step


def test_a_huge_loss_is_reported(tiny_data):
    split = Split(tiny_data, read_meta(tiny_data), 'val', 8, 12)
    m = types.SimpleNamespace(rank=0, world=1, device='cpu', cpu_group=None, autocast=contextlib.nullcontext)
    m.to_device = lambda x: x
    c = types.SimpleNamespace(eval_iters=1, eval_loops='', batch_size=2, dataset='tiny')
    table = lambda x, y, *_: (torch.full((1, *x.shape), 1000.0), None)  # noqa: E731
    model = types.SimpleNamespace(loss_table=table, training=True, eval=lambda: None, train=lambda mode: None)
    model.config = types.SimpleNamespace(n_loop=2)
    result = evaluate(model, {'val': split}, c, m, [1] * 12)
    assert result['val']['loss'] == 1000 and math.isfinite(result['val']['ppl'])


def test_the_untrained_model_is_evaluated_and_is_no_result(call, flags, tmp_path, monkeypatch):
    values = iter([1.0, 3.0, 2.0, 2.5])
    fake = lambda *_: dict.fromkeys(('train', 'val'), dict(loss=next(values), ppl=1.0, bpb=1.0))  # noqa: E731
    monkeypatch.setattr(pretraining, 'evaluate', fake)
    _, out, _ = call(main, *flags)
    log = read_log(tmp_path / 'out')
    assert 'step 0: train loss 1.0000, val loss 1.0000' in out and log[0]['val/loss'] == 1.0
    assert log[0]['iter'] == log[1]['iter'] == 0 and 'train/loss' in log[1]
    assert load(tmp_path / 'out' / 'best.pt')['best_val_loss'] == 2.0 and 'best val loss 2.0000' in out


def test_eval_only_evaluates_the_checkpoint_and_changes_nothing(call, flags, tmp_path):
    call(main, *flags)
    files = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    expected = [line for line in read_log(tmp_path / 'out') if 'val/loss' in line][-1]
    for n_loop in (2, 5):
        keys = ['--init_from=resume', '--eval_only=True', f'--n_loop={n_loop}']
        status, out, _ = call(main, *flags, *keys)
        told = f'step 12: train loss {expected["train/eval_loss"]:.4f}, val loss {expected["val/loss"]:.4f}'
        assert status == 0 and (told in out) == (n_loop == 2)
        assert f'executed layers: {2 + n_loop} (1 + 1 x {n_loop} + 1)' in out
        assert ('changed: n_loop was 2, is 5' in out) == (n_loop == 5)
        assert f'weights of {tmp_path}/out/ckpt.pt, step 12\n' in out
        assert out.endswith(f'\nadded to {tmp_path}/out/eval.jsonl\n')
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'eval.jsonl').read_text().splitlines()]
    assert [line['n_loop'] for line in lines] == [2, 5] and lines[0]['val/loss'] == expected['val/loss']
    (tmp_path / 'out' / 'eval.jsonl').unlink()
    assert {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == files


def test_best_is_kept_and_patience_ends_the_run(call, flags, tmp_path, monkeypatch):
    values = iter([9.0, 3.0, 3.5, 2.0, 2.5, 2.6, 1.0])
    fake = lambda *_: dict.fromkeys(('train', 'val'), dict(loss=next(values), ppl=1.0, bpb=1.0))  # noqa: E731
    monkeypatch.setattr(pretraining, 'evaluate', fake)
    status, out, _ = call(main, *flags, '--eval_interval=2', '--patience=2')
    assert status == 0 and 'best val loss 2.0000' in out
    last, best = (load(tmp_path / 'out' / name) for name in ('ckpt.pt', 'best.pt'))
    assert last['iter_num'] == 10 and best['iter_num'] == 6


def test_a_run_on_other_data_is_told_and_its_best_loss_begins_anew(call, flags, tmp_path):
    out_dir, sets = tmp_path / 'out', {}
    for name, text in (('easy', 'a' * 2000), ('hard', ''.join(random.Random(0).choices('ab', k=2000)))):
        sets[name] = tmp_path / name
        sets[name].with_suffix('.txt').write_text(text)
        write_text(sets[name], [sets[name].with_suffix('.txt')], Characters('\nab'), name)
    easy = call(main, *flags, f'--dataset={sets["easy"]}', '--max_iters=40', '--eval_interval=20')[1]
    assert float(easy.split('best val loss ')[1][:6]) < 0.3
    # a run that ends with a mistake has changed nothing
    wrong = call(
        main, f'--out_dir={out_dir}', '--init_from=resume', f'--dataset={sets["hard"]}', '--optimizer=muon'
    )
    assert wrong[0] == 2 and load(out_dir / 'best.pt')['iter_num'] == 40
    resume = [f'--out_dir={out_dir}', '--init_from=resume']
    _, out, _ = call(main, *resume, f'--dataset={sets["hard"]}', '--max_iters=48', '--eval_interval=4')
    hashes = [load(out_dir / name)['data']['sha256'] for name in ('best-before-40.pt', 'best.pt')]
    told = [f'{name} (sha256 {sha256[:8]})' for name, sha256 in zip(('easy', 'hard'), hashes, strict=True)]
    assert f'changed: data was {told[0]}, is {told[1]}\n' in out and hashes[0] != hashes[1]
    assert 'the best loss and the patience begin anew' in out
    assert float(out.split('best val loss ')[1][:6]) > 0.6 and load(out_dir / 'best.pt')['iter_num'] > 40
    shutil.copytree(sets['hard'], tmp_path / 'moved')  # the same tokens
    _, out, _ = call(main, *resume, f'--dataset={tmp_path}/moved', '--max_iters=50')
    assert 'changed: dataset' in out and 'changed: data was' not in out
    old = load(out_dir / 'ckpt.pt')
    del old['data']  # as older versions wrote it: they know the name only
    torch.save(old, out_dir / 'ckpt.pt')
    _, out, _ = call(main, *resume, f'--dataset={sets["easy"]}', '--max_iters=52')
    assert 'the best loss and the patience begin anew' in out


# -----------------------------------------------------------------------------
# nothing is lost


def test_killed_runs_go_on_as_if_they_had_not_been(tmp_path):
    survive(tmp_path, kills=1, seed=1, steps=60)


@pytest.mark.parametrize('share', [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_checkpoint_is_named_and_the_one_before_is_used(call, flags, tmp_path, share):
    call(main, *flags)
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    path = tmp_path / 'out' / 'ckpt.pt'
    data = path.read_bytes()
    path.unlink()  # best.pt is the same file
    path.write_bytes(data[: int(share * len(data))])
    status, out, err = call(main, *flags, '--init_from=auto')
    assert status == 0 and f'{path} cannot be read' in err and 'resuming at step 8' in out
    told = f'{path} is broken: it is now {path}.broken; the run goes on from prev.pt at step 8, up to 8 steps'
    assert told in out
    assert same(whole['model'], load(path)['model']) and len(losses(tmp_path / 'out')) == 12


def test_two_broken_checkpoints_are_not_overwritten(call, flags, tmp_path):
    call(main, *flags)
    for name in ('ckpt.pt', 'prev.pt'):
        (tmp_path / 'out' / name).unlink()
        (tmp_path / 'out' / name).write_bytes(b'x')
    status, _, err = call(main, *flags, '--init_from=auto')
    assert (
        status == 2
        and 'prev.pt cannot be read' in err
        and (tmp_path / 'out' / 'ckpt.pt').read_bytes() == b'x'
    )


FULL = OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('failure', [FULL, RuntimeError('PytorchStreamWriter failed writing file')])
def test_a_full_disk_leaves_the_last_good_checkpoint(call, flags, tmp_path, monkeypatch, failure):
    real, calls = torch.save, []

    def save(value, file):
        calls.append(1)
        if len(calls) == 3:
            file.write(b'half')
            raise failure
        real(value, file)

    monkeypatch.setattr(torch, 'save', save)
    status, _, err = call(main, *flags)
    assert status == 1 and 'ckpt.pt' in err and err.count('\n') == 1
    assert str(failure).split(']')[-1].strip() in err
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 8
    assert not (tmp_path / 'out' / 'ckpt.pt.tmp').exists()
    monkeypatch.undo()
    (tmp_path / 'out' / 'ckpt.pt.tmp').write_bytes(b'stale')
    assert call(main, *flags, '--init_from=auto')[0] == 0
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 12 and len(losses(tmp_path / 'out')) == 12


# of weights with 0.6 MB, and an optimizer's state of twice as much
@pytest.mark.parametrize('size, told', [('1000k', 'no space for a checkpoint'), ('1600k', 'cannot be saved')])
def test_a_full_disk_for_real(tmp_path, tiny_data, size, told):
    small = tmp_path / 'small'
    small.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', small]
    if subprocess.run(mount, capture_output=True).returncode:
        if size == '1000k':
            pytest.skip('without the right to mount a disk is not small')
        os.symlink('/dev/full', small / 'ckpt.pt.tmp')  # every write to it fails
    try:
        run = script('train.py', f'--dataset={tiny_data}', *TINY, '--n_embd=64', f'--out_dir={small}')
        out, _ = run.communicate()
        assert run.returncode == 1 and 'Traceback' not in out
        assert 'train.py: ' in out and told in out
        assert not (small / 'ckpt.pt').exists()
    finally:
        subprocess.run(['umount', small], capture_output=True)


def test_out_dir_that_cannot_be_written_is_told(call, flags, tmp_path):
    status, _, err = call(main, *flags, '--out_dir=/proc/nanoloop')
    assert status == 2 and 'cannot be written' in err


def test_starting_from_scratch_deletes_no_earlier_run(call, flags, tmp_path):
    call(main, *flags, '--max_iters=4')
    old = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    status, out, _ = call(main, *flags, '--seed=2')
    assert status == 0 and 'earlier run' in out
    earlier = tmp_path / 'out' / 'run-1'
    assert (earlier / 'best.pt').exists()
    assert (earlier / 'ckpt.pt').read_bytes() == old and len(losses(earlier)) == 4
    assert len(losses(tmp_path / 'out')) == 12


def test_a_run_that_ends_before_its_first_step_leaves_the_earlier_one(call, flags, tmp_path, monkeypatch):
    call(main, *flags, '--max_iters=4')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    real = train.train_step

    def stop(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, 'train_step', stop)
    status, out, err = call(main, *flags, '--seed=2')
    assert status == 130 and 'there is nothing new to save' in err and 'earlier run' not in out
    assert {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before
    monkeypatch.setattr(train, 'train_step', real)
    status, out, err = call(main, *flags, '--init_from=auto', '--max_iters=4')
    assert status == 0 and 'resuming at step 4 of 4: nothing is left to do, a larger max_iters goes on' in out


def test_the_log_is_there_after_the_first_step(call, flags, tmp_path, monkeypatch):
    steps, real = [], train.train_step

    def crash_at_the_second(*args):
        steps.append(1)
        if len(steps) > 1:
            raise OSError('crash')
        return real(*args)

    monkeypatch.setattr(train, 'train_step', crash_at_the_second)
    assert call(main, *flags)[0] == 1
    keys = [set(record) for record in read_log(tmp_path / 'out')]
    assert 'val/loss' in keys[0] and 'train/loss' in keys[1] and len(keys) == 2


def test_earlier_runs_are_named_where_there_is_nothing_to_resume(call, flags, tmp_path):
    for n in range(1, 12):
        (tmp_path / 'out' / f'run-{n}').mkdir(parents=True)
    (tmp_path / 'out' / 'run-12.log').touch(), (tmp_path / 'out' / 'run-13-seed2').mkdir()
    (tmp_path / 'out' / 'run-14').touch()
    earlier = f'earlier runs: ..., {tmp_path}/out/run-9, {tmp_path}/out/run-10, {tmp_path}/out/run-11'
    status, _, err = call(main, *flags, '--init_from=resume')
    assert status == 2 and f'there is none; {earlier}\n' in err
    status, _, err = call(main, *flags, '--init_from=auto', '--max_iters=1')
    assert status == 0 and f'a new run begins, there is no checkpoint in {tmp_path}/out; {earlier}\n' in err


def test_with_other_loops_the_best_loss_begins_anew(call, flags, tmp_path):
    call(main, *flags, '--max_iters=4', '--eval_interval=2', '--patience=9')
    before = load(tmp_path / 'out' / 'ckpt.pt')
    torch.save(before | dict(stale=5), tmp_path / 'out' / 'ckpt.pt')
    resume = [f'--out_dir={tmp_path}/out', '--init_from=resume']
    more = ['--max_iters=5', '--eval_interval=1', '--learning_rate=0', '--min_lr=0']
    _, out, _ = call(main, *resume, *more, '--n_loop=1')
    assert out.count('changed: n_loop was') == 1 and 'the best loss and the patience begin anew' in out
    last = load(tmp_path / 'out' / 'ckpt.pt')
    assert last['best_val_loss'] != before['best_val_loss']
    assert (last['iter_num'], last['stale']) == (5, 0)  # step 4 was evaluated again, and is no result
    assert (tmp_path / 'out' / 'best-before-4.pt').exists()
    _, out, _ = call(main, *resume, '--eval_only=True', '--n_loop=3')
    assert 'changed: n_loop was 1, is 3' in out and 'begin anew' not in out


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    'key, told', [('n_loop', 'n_loop was 2, is 3'), ('eval_iters', 'eval_iters was 2, is 3')]
)
def test_a_run_with_another_measure_changes_nothing_before_its_first_step(
    call, flags, tmp_path, monkeypatch, key, told
):
    call(main, *flags, '--max_iters=4')
    before, resume = files_of(tmp_path / 'out'), [*flags, '--init_from=resume', f'--{key}=3']
    for max_iters in (4, 3):  # nothing is left to do
        status, out, _ = call(main, *resume, f'--max_iters={max_iters}', '--warmup_iters=99')
        assert status == 0 and f'changed: {told}\n' in out and 'the best loss and the patience begin' in out
        assert 'nothing is left to do' in out and 'step 4: train loss' in out and 'saving' not in out
        assert 'best val loss' not in out and 'warning' not in out and files_of(tmp_path / 'out') == before
    assert 'resuming at step 4 of 3: the run has made more steps than max_iters allows, nothing' in out
    monkeypatch.setattr(train, 'train_step', lambda *args: os.kill(os.getpid(), signal.SIGINT))
    status, out, err = call(main, *resume, '--max_iters=8')
    assert status == 130 and 'nothing new to save' in err and files_of(tmp_path / 'out') == before


def test_the_same_windows_are_the_same_measure(call, flags, tmp_path):
    call(main, *flags, '--max_iters=4')
    _, out, _ = call(main, *flags, '--max_iters=5', '--init_from=resume', '--eval_iters=4', '--batch_size=2')
    assert 'changed: eval_iters was 2, is 4' in out and 'begin anew' not in out


def test_without_a_step_to_make_an_earlier_run_stays(call, flags, tmp_path):
    call(main, *flags, '--max_iters=1')
    before = files_of(tmp_path / 'out')
    status, _, err = call(main, *flags, '--max_iters=0')
    assert status == 2 and 'max_iters=0, expected one step or more' in err and 'an earlier run' in err
    assert files_of(tmp_path / 'out') == before
    status, out, _ = call(main, *flags, '--max_iters=0', f'--out_dir={tmp_path}/new')
    assert status == 0 and 'best val loss' not in out and (tmp_path / 'new' / 'ckpt.pt').exists()


def test_evaluating_random_weights_is_told(call, flags, tmp_path):
    assert 'random weights: --init_from=resume' in call(main, *flags, '--eval_only=True')[1]
    call(main, *flags, '--max_iters=1')
    out = call(main, *flags, '--eval_only=True', '--init_from=resume')[1]
    assert 'random weights' not in out


def test_a_second_run_is_kept_out(call, flags, tmp_path):
    lock = run_folder.open_out_dir(tmp_path / 'out')
    status, _, err = call(main, *flags)
    assert status == 2 and 'in use by another run' in err
    lock.close()
    assert call(main, *flags)[0] == 0


def test_a_finished_run_stays_as_it_is(call, flags, tmp_path):
    call(main, *flags)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    assert call(main, *flags, '--init_from=auto')[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before


def test_replacing_works_without_links(tmp_path, monkeypatch):
    (tmp_path / 'a').write_text('new')
    (tmp_path / 'b').write_text('old')
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    saving.replace_by_link(tmp_path / 'a', tmp_path / 'b')
    assert (tmp_path / 'b').read_text() == 'new' and sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']


# -----------------------------------------------------------------------------
# gradients that are not finite


def poison(monkeypatch, bad_steps):
    """Makes the loss of some steps not a number."""
    real, calls = train.TrainingLoss.forward, []

    def forward(self, *args):
        calls.append(1)
        loss, more = real(self, *args)
        return loss * (math.nan if len(calls) in bad_steps else 1), more

    monkeypatch.setattr(train.TrainingLoss, 'forward', forward)


def test_steps_without_a_finite_gradient_are_skipped(call, flags, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 4, 7})
    status, out, _ = call(main, *flags)
    assert status == 0 and out.count('the step is skipped') == 3
    checkpoint = load(tmp_path / 'out' / 'ckpt.pt')
    assert all(w.isfinite().all() for w in checkpoint['model'].values())
    assert all(state['step'] == 12 - 3 for state in checkpoint['optimizer']['state'].values())
    assert [step for step, loss in enumerate(losses(tmp_path / 'out')) if loss is None] == [2, 3, 6]  # JSON


def test_several_in_a_row_end_the_run_and_are_not_saved(call, flags, tmp_path, monkeypatch):
    poison(monkeypatch, {6, 7, 8})
    status, _, err = call(main, *flags)
    assert status == 2 and 'at iter 7, 3 steps were skipped in a row' in err and 'step 4' in err
    checkpoint = load(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter_num'] == 4 and all(w.isfinite().all() for w in checkpoint['model'].values())


def test_float16_looks_for_its_scale_without_giving_up(call, flags, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4, 5, 6})
    assert call(main, *flags, '--dtype=float16')[0] == 0
    scaler = load(tmp_path / 'out' / 'ckpt.pt')['scaler']
    assert scaler['scale'] == 2**16 / 2**5
    assert call(main, *flags, '--dtype=float16', '--init_from=resume', '--max_iters=14')[0] == 0
    assert load(tmp_path / 'out' / 'ckpt.pt')['scaler']['scale'] == 2**16 / 2**5


def test_float16_gives_up_when_no_scale_helps(call, flags, monkeypatch):
    poison(monkeypatch, range(1000))
    status, _, err = call(main, *flags, '--dtype=float16', '--max_iters=100', '--eval_interval=1000')
    assert status == 2 and 'at iter 18, 3 steps were skipped in a row' in err  # 2^16 is halved 17 times first


def test_float16_reports_and_clips_the_gradient_without_its_scale(call, flags, tmp_path):
    norms = []
    for dtype in ('float32', 'float16'):
        call(main, *flags, f'--dtype={dtype}', '--max_iters=1', f'--out_dir={tmp_path}/{dtype}')
        norms.append(read_log(tmp_path / dtype)[1]['train/grad_norm'])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_the_gradient_is_clipped_to_its_norm(call, flags, tmp_path, monkeypatch):
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *args, **keys):
        params = [p for group in self.param_groups for p in group['params']]
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in params]).item())
        return real(self, *args, **keys)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    call(main, *flags, '--grad_clip=0.01', '--max_iters=2')
    call(main, *flags, '--grad_clip=0', '--max_iters=2', f'--out_dir={tmp_path}/b')
    logged = [line['train/grad_norm'] for line in read_log(tmp_path / 'out') if 'lr' in line]
    assert seen[0] == pytest.approx(0.01, rel=1e-4)
    assert logged[0] > 0.1 and seen[2] == pytest.approx(logged[0])


# -----------------------------------------------------------------------------
# several processes, signals


def torchrun(*argv):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        str(ROOT / 'train.py'),
    ]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen([*command, *argv], env=env, cwd=ROOT, **pipe)


SAMPLED = '--loop_sampling=poisson --loop_max=5 --eval_loops=1,6 --diagnose=7 --learning_rate=1e-3'.split()


def test_two_processes_train_as_one(call, flags, tmp_path):
    options = [*flags, '--gradient_accumulation_steps=4', '--max_iters=20', '--dropout=0.1', '--eval_iters=0']
    options += SAMPLED
    run = torchrun(*options, f'--out_dir={tmp_path}/two')
    out, _ = run.communicate(timeout=100)
    assert run.returncode == 0, out
    call(main, *options)
    one, two = (read_log(tmp_path / name) for name in ('out', 'two'))
    assert [line['iter'] for line in one] == [line['iter'] for line in two]
    assert len(losses(tmp_path / 'two')) == 20
    keys = 'train/loss', 'val/loss', 'val/bpb', 'val/loss@1', 'val/loss@6', 'train/grad_norm'
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in keys:
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-5), (a, b)
    status, _, err = call(main, *flags, '--gradient_accumulation_steps=3')
    assert status == 0  # one process divides everything


def test_micro_batches_that_processes_cannot_share_are_refused():
    c, m = types.SimpleNamespace(gradient_accumulation_steps=3), types.SimpleNamespace(world=2)
    told = 'gradient_accumulation_steps=3, expected a multiple of the 2 processes: 2, 4, 8'
    with pytest.raises(ValueError, match=told):
        pretraining.pretraining(c, m, None, None, None)


def wait_for(out_dir, step):
    end = time.time() + 60
    while time.time() < end:
        if (Path(out_dir) / 'log.jsonl').exists() and len(read_log_so_far(out_dir)) > step:
            return
        time.sleep(0.01)
    raise AssertionError('the run does not start')


def read_log_so_far(out_dir):
    return (Path(out_dir) / 'log.jsonl').read_text().splitlines()


@pytest.mark.parametrize('target, number', [('rank', signal.SIGTERM), ('group', signal.SIGINT)])
def test_signals_save_and_all_ranks_leave(call, flags, tmp_path, target, number):
    long = [
        *flags,
        '--gradient_accumulation_steps=2',
        '--max_iters=100000',
        '--lr_decay_iters=12',
        '--eval_interval=100000',
    ]
    run = torchrun(*long)
    wait_for(tmp_path / 'out', 5)
    pids = [int(p.name) for p in Path('/proc').iterdir() if p.name.isdigit() and parent(p) == run.pid]
    workers = [pid for pid in pids if b'train.py' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    assert len(workers) == 2
    start = time.time()
    os.kill(workers[1], number) if target == 'rank' else os.killpg(run.pid, number)
    out, _ = run.communicate(timeout=60)
    assert time.time() - start < 20 and run.returncode != 0
    assert f'stopped by {signal.Signals(number).name} at step' in out, out
    assert not any(Path(f'/proc/{pid}').exists() for pid in workers)
    if target == 'rank':
        assert out.count(f'exitcode  : {128 + number}') == 2, out
    stopped = load(tmp_path / 'out' / 'ckpt.pt')
    n = stopped['iter_num']
    assert n > 5 and len(losses(tmp_path / 'out')) == n
    resumed = [*flags, '--gradient_accumulation_steps=2', f'--max_iters={n + 3}', '--lr_decay_iters=12']
    never = ['--eval_interval=100000', '--eval_iters=1']
    assert call(main, *resumed, *never, '--init_from=resume')[0] == 0
    assert losses(tmp_path / 'out')[:n] == pytest.approx(losses(tmp_path / 'out')[:n])
    assert call(main, *resumed, *never, f'--out_dir={tmp_path}/whole')[0] == 0
    assert losses(tmp_path / 'out') == pytest.approx(losses(tmp_path / 'whole'), abs=1e-4)


def parent(proc):
    try:
        return int((proc / 'stat').read_text().rsplit(')', 1)[1].split()[1])
    except (OSError, IndexError):
        return None


@pytest.mark.parametrize('place', ['step', 'micro', 'evaluation', 'first'])
def test_a_signal_anywhere_ends_in_a_bit_exact_checkpoint(call, flags, tmp_path, monkeypatch, place):
    options = [*flags, '--dropout=0.1', '--gradient_accumulation_steps=3']
    call(main, *options)
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    options.append(f'--out_dir={tmp_path}/stopped')
    count = []

    def after(real, n):
        def wrapped(*args, **keys):
            count.append(1)
            if len(count) == n:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # torchrun repeats itself
            return real(*args, **keys)

        return wrapped

    where = dict(step=(train, 'lr_at', 6), micro=(batches, 'draw_windows', 17))
    where.update(evaluation=(pretraining, 'evaluate', 3), first=(batches, 'draw_windows', 1))
    room, name, n = where[place]
    monkeypatch.setattr(room, name, after(getattr(room, name), n))
    status, out, err = call(main, *options)
    first = 'stopped by SIGTERM, there is nothing new to save' in err
    assert status == 128 + signal.SIGTERM and (first or 'stopped by SIGTERM at step' in out)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and first == (place == 'first')
    saved = tmp_path / 'stopped' / 'ckpt.pt'
    assert saved.exists() != first and (
        first or load(saved)['iter_num'] == (8 if place == 'evaluation' else 5)
    )
    assert call(main, *options, '--init_from=auto')[0] == 0
    assert same(whole['model'], load(tmp_path / 'stopped' / 'ckpt.pt')['model'])
    keep = ('iter', 'train/loss', 'val/loss', 'lr')
    logs = [[[row.get(k) for k in keep] for row in read_log(tmp_path / name)] for name in ('out', 'stopped')]
    assert logs[0] == logs[1]


# -----------------------------------------------------------------------------
# other ways to begin, other things to log


def test_init_from_a_path_takes_the_weights_only(call, flags, tmp_path):
    call(main, *flags)
    status, out, _ = call(
        main,
        f'--init_from={tmp_path}/out',
        *flags[:1],
        f'--out_dir={tmp_path}/b',
        '--max_iters=0',
        '--device=cpu',
        '--n_loop=3',
    )
    assert status == 0, out
    a, b = load(tmp_path / 'out' / 'ckpt.pt'), load(tmp_path / 'b' / 'ckpt.pt')
    assert same(a['model'], b['model']) and b['iter_num'] == 0 and not b['optimizer']['state']
    assert b['model_args'] == a['model_args'] | dict(n_loop=3)


def test_checkpoints_hold_nanogpts_keys_and_plain_values(call, flags, tmp_path):
    call(main, *flags)
    checkpoint = load(tmp_path / 'out' / 'ckpt.pt')
    ours = 'rng scaler tokenizer loops_trained log_bytes format_version git'.split()
    theirs = 'model optimizer model_args iter_num best_val_loss config'.split()
    assert {*theirs, *ours} <= set(checkpoint)
    assert not any(name.startswith(('_orig_mod.', 'module.')) for name in checkpoint['model'])
    assert (
        checkpoint['loops_trained'] == [2]
        and checkpoint['log_bytes'] == (tmp_path / 'out' / 'log.jsonl').stat().st_size
    )


def test_a_run_ends_with_a_sample_without_dropout_and_a_fused_optimizer(call, flags, monkeypatch):
    modes = []
    real = report.stream
    monkeypatch.setattr(
        report, 'stream', lambda model, *a, **k: modes.append(model.training) or real(model, *a, **k)
    )
    _, out, _ = call(main, *flags, '--sample_tokens=30', '--dropout=0.5')
    text = out.split('---------------\n')[1]
    assert modes == [False] and len(text) == 31 and set(text) <= set('\n abcdefghij')
    assert 'sample.py --out_dir=' in out.splitlines()[-1]
    (adamw,), _ = make_optimizers(GPT(GPTConfig(block_size=8, vocab_size=12, n_embd=12)), TrainConfig())
    assert adamw.defaults['fused']


def test_lines_keep_nanogpts_prefix(call, flags):
    _, out, _ = call(main, *flags)
    for start in (
        'tokens per iteration will be: 32',
        'number of parameters: 0.',
        'num decayed parameter tensors: 12, with ',
    ):
        assert f'\n{start}' in out
    assert '\nstep 4: train loss 2.' in out and ', val loss 2.' in out
    line = next(line for line in out.splitlines() if line.startswith('iter 3: loss 2.'))
    fields = [field.split()[0] for field in line.split(', ')]
    assert fields == ['iter', 'time', 'mfu', 'grad', 'lr', 'tok/s', 'loops', 'eta'] and 'mfu n/a' in line


def test_mfu_is_the_flops_of_a_step_over_its_time_and_the_peak(call, flags, tmp_path):
    _, out, _ = call(main, *flags, '--peak_flops=1e9', '--loop_sampling=uniform', '--log_interval=2',
                     '--eval_interval=100')  # fmt: skip
    lines = [line for line in read_log(tmp_path / 'out') if 'lr' in line]
    for before, line in zip(lines, lines[1:], strict=False):
        per_step = (line['train/flops'] - before['train/flops']) / 2
        assert line['mfu'] == pytest.approx(per_step / (line['train/ms'] / 1000) / 1e9)
    assert f'mfu {lines[-1]["mfu"]:.2%}' in out


def test_times_are_of_the_steps_since_the_last_line_without_evaluations(call, flags, tmp_path, monkeypatch):
    now, evaluate_ = [0.0], pretraining.evaluate
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])

    def pass_time(seconds, f):
        def timed(*args):
            now[0] += seconds
            return f(*args)

        return timed

    monkeypatch.setattr(pretraining, 'evaluate', pass_time(100.0, evaluate_))
    monkeypatch.setattr(train, 'train_step', pass_time(0.5, train.train_step))
    _, out, _ = call(main, *flags, '--log_interval=2', '--max_iters=7', '--eval_interval=4')
    assert [line['train/ms'] for line in read_log(tmp_path / 'out') if 'lr' in line] == [500.0] * 4
    assert out.count('took 100.0s') == 3 and 'iter 4' in out and 'eta 0:00:00' in out


def test_the_first_estimate_of_the_rest_is_without_the_first_step(call, flags, tmp_path, monkeypatch):
    """The first step compiles. Also after resuming between two lines of the log."""
    now, real, calls = [0.0], train.train_step, []

    def step(*args):
        calls.append(1)
        now[0] += 100.0 if len(calls) == 1 else 1.0
        return real(*args)

    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(train, 'train_step', step)
    _, out, _ = call(main, *flags, '--log_interval=5', '--max_iters=7')
    assert re.findall(r'iter (\d+):.* eta (\S+)', out) == [('0', '?'), ('5', '0:00:01')]
    calls.clear()
    resume = f'--out_dir={tmp_path}/out --init_from=resume --max_iters=12 --lr_decay_iters=7'.split()
    _, out, _ = call(main, *resume)
    assert re.findall(r'iter (\d+):.* eta (\S+)', out) == [('10', '0:00:01')]


def test_a_silent_run_says_what_it_is_doing(monkeypatch):
    monkeypatch.setattr(report.Teller, 'SILENCE_S', 0.05)
    lines = []
    with report.Teller(lines.append) as say:
        say('begun')
        say.now('compiling')
        end = time.monotonic() + 10
        while len(lines) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert lines[:3] == ['begun', *['... compiling (0 s so far)'] * 2]
    quiet = report.Teller(None)
    quiet('nothing is printed by other ranks'), quiet.now('')


@pytest.mark.parametrize(
    'doing, told',
    [
        ('training', 'SIGINT: the run saves after this micro-batch'),
        ('evaluating the loss on val', 'SIGINT: the run saves after this batch of the evaluation'),
        ('saving', 'SIGINT: the run ends when this checkpoint is saved'),
        ('sampling', 'SIGINT: the run ends after this token'),
    ],
)
def test_a_signal_says_what_is_still_done(doing, told):
    say = report.Teller(None)
    say.now(doing, ': step 5 of 10')
    say.hurry('SIGINT')
    assert say.doing + say.progress == told


@pytest.mark.parametrize('rate, told', [(1e12, False), (1e9, True)])
def test_the_cost_of_a_step_is_told_before_the_first(monkeypatch, rate, told):
    monkeypatch.setattr(report, 'matmul_rate', lambda m, size: rate)
    m = types.SimpleNamespace(kind='cpu', world=1)
    lines = [*report.describe_cost(m, 2e10, 1800)]
    seconds = '0.02 s at the 1 TFLOP/s of this CPU: 0:00:36' if rate == 1e12 else '20 s at the 0.001 TFLOP/s'
    assert lines[0].startswith(f'a step computes 0.02 TFLOP, at least {seconds}')
    assert ('python train.py config/quickstart.py' in lines[-1]) == told
    assert not [*report.describe_cost(m, 1e9, 1800)]  # not worth measuring
    assert not [*report.describe_cost(m, 2e10, 0)]  # no step is left
    m.kind = 'cuda'
    assert not [*report.describe_cost(m, 2e10, 1800)]


def test_wandb_gets_what_the_log_gets_and_its_run_goes_on(call, flags, tmp_path, monkeypatch):
    runs = []

    class Fake:
        def __init__(self, **keys):
            runs.append(dict(keys, lines=[]))

        def log(self, record, step):
            runs[-1]['lines'].append((step, record))

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=Fake))
    call(main, *flags, '--wandb_log=True', '--max_iters=4')
    call(main, *flags, '--wandb_log=True', '--init_from=resume', '--max_iters=8')
    assert runs[0]['id'] == runs[1]['id'] and runs[1]['resume'] == 'allow'
    logged = [record for run in runs for _, record in run['lines']]
    assert [r['iter'] for r in logged] == [r['iter'] for r in read_log(tmp_path / 'out')]


def test_a_run_goes_on_without_wandb_but_does_not_begin_without(call, flags, tmp_path, monkeypatch):
    class Run:
        def log(self, record, step):
            raise ConnectionError('quota')

    fake = types.SimpleNamespace(init=lambda **keys: Run())
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    status, out, _ = call(main, *flags, '--wandb_log=True')
    assert status == 0 and out.count('wandb.log failed, the run goes on without it: quota') == 1
    assert read_log(tmp_path / 'out')[-1]['iter'] == 12
    fake.init = lambda **keys: 1 / 0
    status, out, err = call(main, *flags, '--wandb_log=True', f'--out_dir={tmp_path}/b')
    assert status == 2 and 'wandb_log=True, but wandb.init failed: division by zero; log in with' in err


def test_wandb_is_not_imported_unless_asked_for(call, flags, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # importing it fails
    assert call(main, *flags, '--max_iters=1')[0] == 0
    status, _, err = call(main, *flags, '--max_iters=1', '--wandb_log=True')
    assert status == 2 and 'pip install -e ".[wandb]"' in err
