"""Diagnostics against plain autograd, and that looking changes nothing."""

import pytest
import torch
from helpers import load, randomize, read_log, same
from torch.nn import functional as F

import model as model_file
import nanoloop.diagnose as diagnose_file
from model import GPT, GPTConfig
from nanoloop.diagnose import diagnose
from nanoloop.objective import TrainingLoss
from train import TrainConfig, main

SIZES = dict(block_size=12, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=4)
IDX = torch.randint(23, (3, 13), generator=torch.Generator().manual_seed(0))


def by_hand(model, idx, targets, n_loop, truncated):
    """{name: value}, the loop written out with every output's gradient retained."""
    context, found, kept = model.attn_inputs(torch.arange(idx.size(1))), {}, {}
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    e = s = model.apply_blocks(model.transformer.prelude, wte[idx] + wpe[: idx.size(1)], context)
    states = []
    for k in range(n_loop):
        if k == truncated:
            s = s.detach()
        x = model.inject(e, s, k)
        for i, block in enumerate(model.transformer.recur):
            kept[f'grad_norm/block_{1 + i:02d}/attn/loop_{k:02d}'] = y = block.attn(block.ln_1(x), *context)
            x = x + y
            kept[f'grad_norm/block_{1 + i:02d}/mlp/loop_{k:02d}'] = y = block.mlp(block.ln_2(x))
            x = x + y
            kept[f'grad_norm/block_{1 + i:02d}/loop_{k:02d}'] = x
        found[f'hidden_norm/loop_{k:02d}'] = x.pow(2).sum(-1).sqrt().mean()
        s = model.norm_recur(x)
        states.append(s)
    logits = [model.lm_head(model.run_coda(s, context)) for s in states]
    for k, s in enumerate(states):
        found[f'loss/loop_{k:02d}'] = F.cross_entropy(
            logits[k].flatten(0, 1), targets.flatten(), ignore_index=-1
        )
        p, q = logits[-1].softmax(-1), logits[k].softmax(-1)
        found[f'kl/loop_{k:02d}'] = (p * (p / q).log()).sum(-1)[targets != -1].mean()
        if k:
            moved = s - states[k - 1]
            found[f'change/loop_{k:02d}'] = (moved.pow(2).sum(-1) / s.pow(2).sum(-1)).sqrt().mean()
            found[f'cosine/loop_{k:02d}'] = F.cosine_similarity(s, states[k - 1], dim=-1).mean()
    for x in kept.values():
        if x.requires_grad:
            x.retain_grad()
    ce = F.cross_entropy(logits[-1].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
    (ce / (targets != -1).sum()).backward()
    return found | {name: x.grad.norm() for name, x in kept.items() if x.grad is not None}


@pytest.mark.parametrize('chunk', [model_file.HEAD_CHUNK, 4 * 23 * 5])
@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('bptt_k', [None, 2])
def test_what_is_found_is_what_autograd_finds(bptt_k, recompute, chunk, monkeypatch):
    monkeypatch.setattr(model_file, 'HEAD_CHUNK', chunk)
    model = randomize(GPT(GPTConfig(**SIZES, bptt_k=bptt_k, recompute=recompute))).double()
    idx, targets = IDX[:, :-1], IDX[:, 1:].clone()
    targets[0, 3:5] = -1
    found = diagnose(TrainingLoss(model, TrainConfig()), idx, targets, 4)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    expected = by_hand(model, idx, targets, 4, 4 - (bptt_k or 4))
    live = {name for name in expected if 'grad' not in name or bptt_k is None or name[-2:] >= '02'}
    assert set(found) == live
    for name in live:
        assert found[name] == pytest.approx(expected[name].item(), rel=1e-9, abs=1e-12), name


def test_looking_changes_nothing_and_is_logged(call, flags, tmp_path):
    flags = [*flags, '--dropout=0.1', '--input_injection=inject_random', '--gradient_accumulation_steps=2']
    call(main, *flags)
    status, out, err = call(main, *flags, '--diagnose=5', f'--out_dir={tmp_path}/seen')
    assert status == 0, err
    plain, seen = (load(tmp_path / name / 'ckpt.pt') for name in ('out', 'seen'))
    assert same(plain['model'], seen['model']) and same(plain['optimizer'], seen['optimizer'])
    looks = [line for line in read_log(tmp_path / 'seen') if 'kl/loop_00' in line]
    assert [line['iter'] for line in looks] == [0, 5, 10] and out.count('\nlook 5: hidden_norm/loop_01 ') == 1
    assert looks[1]['loss/loop_01'] != looks[1]['loss/loop_00']
    weights = [f'grad_norm/{name}' for name in ('block_00/attn', 'block_02/mlp', 'embed', 'lm_head')]
    assert all(looks[1][name] > 0 for name in weights)


def test_the_gradient_of_the_weights_is_that_of_the_step_after_clipping(call, flags, tmp_path):
    few = ['--pos=rope', '--norm=rmsnorm_fixed', '--input_injection=passthrough', '--tie_weights=False']
    call(main, *flags, *few, '--diagnose=1', '--grad_clip=0.01')
    for line in read_log(tmp_path / 'out'):
        if 'grad_norm/embed' in line:
            parts = [line[f'grad_norm/block_{i:02d}/{part}'] for i in range(3) for part in ('attn', 'mlp')]
            parts += [line['grad_norm/embed'], line['grad_norm/lm_head']]
            assert sum(x * x for x in parts) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_loops_that_do_nothing_are_seen_as_such():
    model = GPT(GPTConfig(**SIZES, dropout=0.5))
    found = diagnose(
        TrainingLoss(model, TrainConfig()), IDX[:, :-1], IDX[:, 1:], 4
    )  # u = e, whatever the state
    assert model.training and found['kl/loop_00'] > 0  # of dropout in the loop, not in the readout
    model.transformer.drop.p = 0.0
    for block in model.blocks():
        block.attn.dropout = block.dropout = 0.0
    model.transformer.coda[0].dropout = 0.5
    found = diagnose(TrainingLoss(model, TrainConfig()), IDX[:, :-1], IDX[:, 1:], 4)
    assert max(abs(found[f'kl/loop_{k:02d}']) for k in range(4)) < 1e-6


def test_a_look_sees_the_dropout_of_its_step(call, flags, monkeypatch):
    seeds, real, forward = [], diagnose_file.diagnose, TrainingLoss.forward
    monkeypatch.setattr(diagnose_file, 'diagnose', lambda *a: seeds.append(torch.initial_seed()) or real(*a))
    monkeypatch.setattr(TrainingLoss, 'forward', lambda *a: seeds.append(torch.initial_seed()) or forward(*a))
    call(main, *flags, '--diagnose=1', '--max_iters=2', '--gradient_accumulation_steps=2')
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] and seeds[4] == seeds[5] == seeds[6] != seeds[0]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_look_computes_in_the_precision_of_the_run_and_without_its_scale(call, flags, tmp_path, dtype):
    looks = {}
    for name in ('float32', dtype):
        call(main, *flags, '--diagnose=1', '--max_iters=1', f'--dtype={name}', f'--out_dir={tmp_path}/{name}')
        _, looks[name], step, _ = read_log(tmp_path / name)
        # the loss that is read out after the last loop is the one that the step reports, rounded as it is
        assert looks[name]['loss/loop_01'] == pytest.approx(step['train/loss'], rel=1e-6)
    assert looks[dtype]['loss/loop_01'] != looks['float32']['loss/loop_01']
    for key, value in looks['float32'].items():
        if key.startswith('grad_norm'):
            assert looks[dtype][key] == pytest.approx(value, rel=0.1), key


def test_compiled_blocks_are_looked_into(call, flags, tmp_path):
    model = GPT(GPTConfig(**SIZES))
    for block in model.blocks():
        block.compile(backend='eager')
    objective = TrainingLoss(model, TrainConfig())
    before = objective(IDX[:, :-1], IDX[:, 1:], 4)[0]
    found = diagnose(objective, IDX[:, :-1], IDX[:, 1:], 4)
    assert found['grad_norm/block_02/mlp/loop_03'] > 0
    assert torch.equal(objective(IDX[:, :-1], IDX[:, 1:], 4)[0], before)
