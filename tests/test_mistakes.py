"""What a user can get wrong ends in one line on stderr and status 2, or works where the meaning is plain."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import TINY, load, script

import bench
import sample
import train
from nanoloop.prepare import Writer
from nanoloop.tokenizer import Bytes, Characters

RESUME = ['--init_from=resume', '--out_dir={tmp}/done']
WRONG = [  # (flags of train.py after those of a tiny run, what must be told)
    (['--leanring_rate=1'], "unknown key 'leanring_rate', did you mean 'learning_rate'?"),
    (['{tmp}/typo.py'], "typo.py, line 1: unknown key 'n_lop', did you mean 'n_loop'?"),
    (['{tmp}/type.py'], "type.py, line 1: n_embd='wide', expected int"),
    (['{tmp}/broken.py'], 'broken.py, line 2: SyntaxError'),
    (['config/nowhere.py'], 'there is no config file config/nowhere.py'),
    (['--max_iters'], '--max_iters=value'),
    (['--max_iters', '5'], '--max_iters=value'),
    (['--max_iters=many'], "max_iters='many', expected int"),
    (['--max_iters=-1'], 'max_iters=-1, expected at least 0'),
    (['--learning_rate=fast'], "learning_rate='fast', expected float"),
    (
        ['--weight_decay=0', '--weight_decay_end=0.1'],
        'weight_decay=0.0, expected above 0 with weight_decay_end',
    ),
    (['--learning_rate=-1'], 'learning_rate=-1.0, expected at least 0'),
    (['--learning_rate=1e999'], 'learning_rate='),
    (['--eval_only=maybe'], "eval_only='maybe', expected True or False"),
    (['--n_embd=15'], 'n_head=2, expected a divisor of n_embd=15'),
    (['--n_embd=0'], 'n_embd=0, expected at least 1'),
    (['--n_loop=0'], 'n_loop=0, expected at least 1'),
    (['--n_block=0'], 'n_block=0, expected at least 1'),
    (['--n_layer=6'], "unknown key 'n_layer', did you mean 'n_prelude' or 'n_block' or 'n_coda'?"),
    (['--n_prelude=-1'], 'n_prelude=-1, expected at least 0'),
    (['--bptt_k=0'], 'bptt_k=0, expected at least 1'),
    (['--bptt_k=two'], "bptt_k='two', expected int or None"),
    (['--input_injection=passthrough', '--bptt_k=1'], 'with passthrough the prelude would get no gradient'),
    (['--input_injection=injct'], 'expected one of passthrough, inject'),
    (['--input_injection=passthrough', '--state_init=zero'], "'zero', expected prelude with passthrough"),
    (['--state_init=noise'], 'expected one of prelude, random, zero'),
    (['--state_std=0.5'], "state_std=0.5, expected None with state_init='prelude'"),
    (['--norm=batchnorm'], 'expected one of layernorm, rmsnorm'),
    (['--norm_place=everywhere'], 'expected one of pre, branch, around, post'),
    (['--n_kv_head=3'], 'n_kv_head=3, expected a divisor of n_head=2'),
    (['--window_pattern=LX'], "window_pattern='LX', expected letters L and S"),
    (['--window_size=4'], 'window_size=4, expected None without an S'),
    (['--window_pattern='], "window_pattern='', expected letters L and S"),
    (['--window_pattern=S', '--window_size=9'], 'window_size=9, expected at most block_size=8'),
    (['--window_pattern=S', '--window_size=0'], 'window_size=0, expected at least 1'),
    (['--softcap=0'], 'softcap=0.0, expected above 0'),
    (['--emb_scale=0'], 'emb_scale=0.0, expected above 0'),
    (['--pos=rope', '--rope_base=0'], 'rope_base=0.0, expected above 0'),
    (['--size=1', '--n_head=1', '--n_embd=768'], 'n_embd=768, expected 128 with the other keys'),
    (['--size=0'], 'size=0, expected at least 1'),
    (['--n_hidden=0'], 'n_hidden=0, expected at least 1'),
    (['--n_kv_head=0'], 'n_kv_head=0, expected at least 1'),
    (['--norm_eps=1'], 'norm_eps=1.0, expected above 0 and below 1'),
    (['--state_init=random', '--state_std=0'], 'state_std=0.0, expected above 0'),
    (['--input_injection=inject_random', '--state_init=zero'], "'zero', expected no value with"),
    (['--init=nanochat'], "init='nanochat', expected another with tie_weights"),
    (['--objective=last'], "objective='last', expected one of end, step, few, exit, gate"),
    (['--objective=exit'], 'exit_gate=False, expected True with objective=exit'),
    (
        ['--objective=exit', '--exit_gate=True', '--n_loop=1'],
        'n_loop=1, expected at least 2 with objective=exit',
    ),
    (
        ['--objective=step', '--bptt_k=1'],
        'bptt_k=1, expected None or at least 2: objective=step reads out that many',
    ),
    (['--objective=few', '--n_loop=7', '--bptt_k=2'], 'bptt_k=2, expected None or at least 3'),
    (
        ['--objective=step', '--bptt_k=5', '--loop_sampling=poisson', '--loop_max=6'],
        'expected None or at least 6',
    ),
    (['--input_injection=passthrough', '--bptt_k=2', '--loop_sampling=uniform'], 'None or at least n_loop=3'),
    (['--loop_sampling=normal'], "loop_sampling='normal', expected one of fixed, uniform, poisson"),
    (['--loop_growth=late'], 'expected sqrt without a loop_warmup'),
    (['--loop_sampling=poisson'], 'loop_max=None, expected a number with loop_sampling=poisson'),
    (['--loop_max=4'], 'loop_max=4, expected None with loop_sampling=fixed'),
    (['--loop_max=1', '--loop_sampling=uniform'], 'loop_max=1, expected at least n_loop=2'),
    (
        ['--objective=gate', '--exit_gate=True', '--n_loop=1'],
        'n_loop=1, expected at least 2 with objective=gate',
    ),
    (['--head_lr=1'], 'head_lr=1.0, expected None with tie_weights'),
    (['--loop_max=0', '--loop_sampling=uniform'], 'loop_max=0, expected at least 1'),
    (['--learning_rate=0', '--min_lr=0', '--head_lr=1'], 'learning_rate=0.0, expected above 0 with head_lr'),
    (['--optimizer=adam'], "optimizer='adam', expected one of adamw, muon"),
    (['--max_flops=0'], 'max_flops=0.0, expected at least 1'),
    (
        ['--init_from={tmp}/done', '--baseline=same_params'],
        "baseline='same_params', expected none with the weights",
    ),
    (['--dataset={tmp}/broken.py'], 'is a file, run: python data/text/prepare.py --input'),
    (['config/quickstart'], 'did you mean config/quickstart.py?'),
    (['--baseline=plain'], "baseline='plain', expected one of '', same_params, same_flops"),
    (['--init=xavier'], 'expected one of gpt2, nanochat, huginn'),
    (['--mlp=swish'], 'expected one of gelu, gelu_tanh'),
    (['--pos=rope', '--n_embd=6'], 'RoPE rotates pairs of channels, and a head has 3'),
    (['--dropout=1.5'], 'dropout=1.5, expected at least 0 and below 1'),
    (['--block_size=0'], 'block_size=0, expected at least 1'),
    (['--block_size=400'], 'block_size=400 is too long for'),
    (
        ['--block_size=1000000000000'],
        'block_size=1000000000000 is too long for',
    ),  # before any memory is taken
    (['--batch_size=0'], 'batch_size=0, expected at least 1'),
    (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps=0, expected at least 1'),
    (['--eval_interval=0'], 'eval_interval=0, expected at least 1'),
    (['--beta2=1'], 'beta2=1.0, expected at least 0 and below 1'),
    (['--seed=-3'], 'seed=-3, expected at least 0'),
    (['--min_lr=1'], 'min_lr=1.0, expected at most learning_rate=0.01'),
    (
        ['--batch_size=99999999999999999999'],
        'batch_size=99999999999999999999, expected an integer of 64 bits',
    ),
    (['--batch_size=1e12'], 'batch_size=1000000000000, expected fewer: the states of'),
    (['--vocab_size=1e15'], 'vocab_size=1000000000000000, expected fewer: the embeddings of all tokens take'),
    (['--n_gram=2', f'--n_gram_rows={2**45}'], 'expected fewer: the embeddings of n-grams take'),
    (['--n_embd=1e8'], 'n_embd=100000000, expected fewer: queries and outputs of attention in 3 layers take'),
    (['--n_block=1e12'], 'queries and outputs of attention in 1,000,000,000,002 layers take'),
    (['--seed=9223372036854775808'], 'seed=9223372036854775808, expected an integer of 64 bits'),
    (['--dataset={tmp}/masked'], 'expected targets that count in train, its mask leaves none'),
    (['--lr_schedule=step'], 'expected one of cosine, linear'),
    (['--device=tpu'], "device='tpu', expected auto, cpu, cuda, cuda:N or mps"),
    (['--dtype=int8'], "dtype='int8', expected one of auto, float32, bfloat16, float16"),
    (['--compile=maybe'], "compile='maybe', expected one of True, False, auto"),
    (['--compile=0'], "compile='0', expected one of True, False, auto"),
    (['--out_dir='], "out_dir='', expected a name or a path"),
    (['--dataset='], "dataset='', expected a name or a path"),
    (['--init_from='], "init_from=''"),
    (['--backend=mpi'], "backend='mpi', expected auto, gloo or nccl"),
    (['--backend=nccl'], "backend='nccl', expected gloo, nccl does not work on cpu"),
    (['--vocab_size=11'], 'vocab_size=11, expected at least 12'),
    (['--dataset=nowhere'], "dataset='nowhere': there is no folder"),
    (['--dataset=shakspeare'], "data/shakspeare, did you mean 'shakespeare'?"),
    (['--dataset=openwebtext'], 'openwebtext is not prepared, run: python data/openwebtext/prepare.py'),
    (['--dataset={tmp}/beyond'], 'vocab_size=256, expected at least 300'),
    (['--dataset={tmp}/short', '--block_size=64'], 'block_size=64 is too long for'),
    (['--dataset={tmp}/json'], 'meta.json is broken'),
    (['--dataset={tmp}/noval'], 'has no val split, only train'),
    (['--init_from=scrach'], "init_from='scrach': there is no folder scrach, expected scratch, resume, auto"),
    (['--init_from=resume', '--out_dir={tmp}/empty'], "init_from='resume', expected a checkpoint in"),
    ([*RESUME, '--n_embd=32'], 'n_embd=32, expected 16 as in the checkpoint'),
    ([*RESUME, '--n_head=4'], 'n_head=4, expected 2 as in the checkpoint'),
    (['--init_from={tmp}/done', '--n_coda=2'], 'n_coda=2, expected 1 as in the checkpoint'),
    (['--init_from={tmp}/done', '--dataset={tmp}/others'], 'expected one in the tokens of the checkpoint'),
    (['--init_from={tmp}/done', '--dataset={tmp}/bytes'], '12 of kind char, not 256 of kind byte'),
    (['--init_from={tmp}/diverged'], 'norm_recur.weight has values that are not finite'),
    (['--init_from=resume', '--out_dir={tmp}/foreign'], 'that file has no state to resume'),
    (['--out_dir={tmp}/typo.py', '--dataset=nowhere'], 'typo.py is a file, expected a folder'),
    (['--out_dir={tmp}/typo.py/out', '--dataset=nowhere'], 'typo.py is a file, expected a folder'),
]
SAMPLE = [
    (['--temperature=1e999'], 'temperature=inf, expected at least 0'),
    (['--out_dir={tmp}/empty'], '/empty holds no model, expected the folder of a run with a checkpoint'),
    (['--out_dir={tmp}/nowhere'], "/nowhere': there is no folder "),
    (['--start=a<|abc|>'], "not know: '<' '>' '|'; this tokenizer has no special tokens"),
    (['--start=a<'], "characters that the tokenizer does not know: '<'\n"),
    (['--exit=gate'], "exit='gate', expected kl or diff: the model has no exit gate"),
    (['--start=Zebra'], "characters that the tokenizer does not know: 'Z' 'r'"),
    (['--start=FILE:{tmp}/nowhere.txt'], "nowhere.txt' cannot be read: No such file"),
    (['--start=FILE:'], "start='FILE:', expected FILE:PATH"),
    (['--start=FILE:{tmp}'], 'cannot be read: Is a directory'),
    (['--out_dir={tmp}/diverged'], 'norm_recur.weight has values that are not finite'),
    (['--stream'], "argument='--stream', expected --stream=value"),
    (['--out_dir={tmp}/typo.py'], 'typo.py cannot be read: it was cut, or is no checkpoint'),
    (['--temperature=-1'], 'temperature=-1.0, expected at least 0'),
    (['--top_k=0'], 'top_k=0, expected at least 1'),
    (['--top_p=0'], 'top_p=0.0, expected above 0'),
    (['--num_samples=0'], 'num_samples=0, expected at least 1'),
    (['--n_loop=0'], 'n_loop=0, expected at least 1'),
    (['--n_lop=2'], "unknown key 'n_lop', did you mean 'n_loop'?"),
    (['--exit=entropy'], "exit='entropy', expected one of '', kl, diff, gate"),
    (['--min_loops=2'], 'min_loops=2, expected 1 without an exit'),
    (['--draft_loops=2'], 'draft_loops=2, expected 1 without speculate'),
    (['--init_from=ouro:x'], "model='ouro:x', expected a folder with config.json"),
    (['--exit=diff'], 'exit_threshold=None, expected a number with exit=diff: try 0.1'),
    (['--exit_threshold=0.1'], 'exit_threshold=0.1, expected None without an exit'),
    (['--exit=kl', '--exit_threshold=-1'], 'exit_threshold=-1.0, expected at least 0, or None'),
    (['--exit=gate', '--exit_threshold=0.5'], "exit='gate', expected kl or diff: the model has no exit gate"),
    (['--exit=diff', '--exit_threshold=1', '--min_loops=3'], 'min_loops=3, expected at most n_loop=2'),
    (['--min_loops=0'], 'min_loops=0, expected at least 1'),
    (['--kv_budget=0'], 'kv_budget=0, expected at least 1'),
    (['--kv_budget=3'], 'kv_budget=3, expected from 1 to n_loop=2'),
    (['--speculate=-1'], 'speculate=-1, expected at least 0'),
    (['--speculate=3', '--draft_loops=2'], 'draft_loops=2, expected at least 1, below n_loop=2'),
    (['--speculate=3', '--kv_budget=1'], 'speculate=3, expected 0 with kv_budget=1'),
    (['--speculate=3', '--warm_start=True'], 'speculate=3, expected 0 with warm_start'),
]
FINE = [  # what looks odd but is plain
    ['--max_iters=1e0'],
    ['--dropout=0'],
    ['--wandb_run_name=123'],
    ['--out_dir={tmp}/a=b'],
    ['--bptt_k=None'],
    ['--bptt_k=9'],
    ['--objective=gate', '--exit_gate=True', '--bptt_k=1'],
    ['--input_injection=query_all', '--state_init=none', '--norm_place=around', '--window_pattern=LS'],
    ['--exit_gate=True', '--tie_weights=False', '--softcap=15', '--mlp=swiglu', '--n_kv_head=1'],
    ['--input_injection=passthrough', '--bptt_k=2'],
    ['--warmup_iters=4', '--lr_decay_iters=4'],
    ['--always_save_checkpoint=False'],
    ['--eval_iters=0'],
    ['--grad_clip=0'],
    ['--max_iters=0'],
]
FINE_SAMPLE = [['--start='], ['--temperature=0'], ['--top_k=None'], ['--top_k=999'], ['--top_p=1'], []]


@pytest.fixture(scope='module')
def tmp(tmp_path_factory, tiny_data):
    """Config files, data sets and checkpoints with something wrong."""
    tmp = tmp_path_factory.mktemp('mistakes')
    (tmp / 'typo.py').write_text('n_lop = 3')
    (tmp / 'type.py').write_text('n_embd = "wide"')
    (tmp / 'broken.py').write_text('n_loop = 3\nn_embd = = 4')
    (tmp / 'empty').mkdir()
    many = range(200)
    sets = dict(beyond=[0] * 300, short=range(20), noval=many, bytes=[*many] * 2, json=many, masked=many)
    for name, ids in sets.items():
        writer = Writer(tmp / name, Bytes(), name)
        writer.add('train', ids)
        if name != 'noval':
            writer.add('val', ids)
        writer.finish()
    meta = json.loads((tmp / 'beyond' / 'meta.json').read_text())
    del meta['max_id']  # as old sets: it is searched
    (tmp / 'beyond' / 'meta.json').write_text(json.dumps(meta))
    np.arange(300).astype('<u2').tofile(tmp / 'beyond' / 'train.bin')
    (tmp / 'json' / 'meta.json').write_text('{')
    for split in ('train', 'val'):
        (tmp / 'masked' / f'{split}.mask').write_bytes(bytes(200))
    writer = Writer(tmp / 'others', Characters('xyzwvutsrqpo'), 'others')
    for split in ('train', 'val'):
        writer.add(split, np.arange(200) % 12)
    writer.finish()
    train.main([f'--dataset={tiny_data}', *TINY, '--max_iters=1', f'--out_dir={tmp}/done'])
    (tmp / 'foreign').mkdir()
    old = load(tmp / 'done' / 'ckpt.pt')
    torch.save({key: old[key] for key in ('model', 'model_args', 'config')}, tmp / 'foreign' / 'ckpt.pt')
    (tmp / 'diverged').mkdir()
    old['model']['norm_recur.weight'][0] = math.inf
    torch.save(old, tmp / 'diverged' / 'ckpt.pt')
    return tmp


@pytest.mark.parametrize('argv, told', WRONG, ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_mistakes_in_training_are_told(call, tmp, tmp_path, tiny_data, argv, told):
    argv = [arg.format(tmp=tmp) for arg in argv]
    chosen = any(arg.startswith('--init_from') for arg in argv)  # sizes come from the checkpoint
    tiny = [flag for flag in TINY if not chosen or flag.startswith(('--device', '--compile', '--batch_size'))]
    status, _, err = call(train.main, f'--dataset={tiny_data}', f'--out_dir={tmp_path}/out', *tiny, *argv)
    assert status == 2 and told in err and err.count('\n') == 1 and err.startswith('train.py: '), err
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


@pytest.mark.parametrize('argv', FINE, ids=' '.join)
def test_what_is_plain_in_training_works(call, tmp, flags, argv):
    status, _, err = call(train.main, *flags, *(arg.format(tmp=tmp) for arg in argv))
    assert status == 0 and not err


@pytest.mark.parametrize(
    'argv, told',
    [
        ('--warmup_iters=50', 'warmup_iters=50: the learning rate rises until the last step, 1'),
        ('--loop_warmup=5', 'loop_warmup=5: the last step, 1, comes before all loops'),
        ('--beta=0.5', "beta=0.5 changes nothing with objective='end'"),
        ('--objective=exit --exit_gate=True --beta=0.5', ''),
        ('--gate_ahead=True', "gate_ahead=True changes nothing with objective='end'"),
        ('--warmdown_frac=0.5', "warmdown_frac=0.5 changes nothing with lr_schedule='cosine'"),
        ('--lr_schedule=linear --warmdown_frac=0.5', ''),
        ('--decay_lr=False --min_lr=0', 'min_lr=0.0 changes nothing with decay_lr=False'),
    ],
)
def test_keys_that_may_be_mistakes_are_noted(call, flags, argv, told):
    argv = ['--max_iters=1', '--min_lr=0', '--lr_decay_iters=None', '--warmup_iters=0', *argv.split()]
    status, out, err = call(train.main, *flags, *argv)
    assert status == 0, err
    warnings = [line for line in out.splitlines() if line.startswith('warning: ')]
    assert any(told in line for line in warnings) if told else not warnings


@pytest.mark.parametrize('argv, told', SAMPLE, ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_mistakes_in_sampling_are_told(call, tmp, argv, told):
    status, out, err = call(
        sample.main, f'--out_dir={tmp}/done', '--device=cpu', *(arg.format(tmp=tmp) for arg in argv)
    )
    last = err.splitlines(keepends=True)[-1]
    assert status == 2 and not out and 'Traceback' not in err
    assert told in last and last.startswith('sample.py: ')


@pytest.mark.parametrize('argv', FINE_SAMPLE, ids=' '.join)
def test_what_is_plain_in_sampling_works(call, tmp, argv):
    status, out, _ = call(sample.main, f'--out_dir={tmp}/done', '--device=cpu', '--max_new_tokens=5', *argv)
    assert status == 0 and out.endswith('---------------\n')


@pytest.mark.parametrize(
    'argv, told',
    [
        (['--vs=--n_lop=3'], "unknown key 'n_lop'"),
        (['--vs=--dtype=bfloat16'], 'expected the same dtype'),
        (['--rounds=0'], 'rounds=0, expected at least 1'),
        (['--mode=sample'], "mode='sample', expected one of train, decode"),
        (['--mode=decode', '--tokens=0'], 'tokens=0, expected at least 1'),
        (['--json=nowhere/x.jsonl'], "json='nowhere/x.jsonl', expected a file with the ending .jsonl in a"),
        (
            ['--n_embd=1e8', '--vocab_size=256'],
            'vocab_size=256, expected fewer: the embeddings of all tokens',
        ),
        (['--count_only=True', '--nvlink=100'], 'nvlink=100.0, expected no value without --plan=N'),
        (['--json=ckpt.pt'], "json='ckpt.pt', expected a file with the ending .jsonl"),
    ],
)
def test_mistakes_in_measuring_are_told(call, argv, told):
    status, _, err = call(bench.main, *TINY, *argv)
    assert status == 2 and told in err and err.count('\n') == 1


@pytest.mark.parametrize(
    'name, argv',
    [
        ('train.py', ['--n_lop=3']),
        ('sample.py', ['--out_dir=nowhere']),
        ('data/text/prepare.py', ['--input=nowhere.txt']),
    ],
)
def test_mistakes_end_processes_with_status_2(name, argv):
    run = script(name, *argv)
    out, _ = run.communicate()
    assert run.returncode == 2 and out.strip().splitlines()[-1].startswith(f'{name.split("/")[-1]}: ')
    assert 'Traceback' not in out


def test_a_defect_of_ours_keeps_its_traceback(call, flags, monkeypatch):
    monkeypatch.setattr(train, 'lr_at', lambda *_: json.loads('{'))
    with pytest.raises(ValueError):
        call(train.main, *flags)
