"""Parameters and FLOPs against the published figures."""

import pytest
import torch
from helpers import load
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as model_file
from configurator import configure
from model import GPT, GPTConfig
from nanoloop import ROOT
from nanoloop.count import flops, parameters
from train import TrainConfig, main


def build(*argv):
    """The model of a config file and flags, without memory."""
    c = configure((TrainConfig, GPTConfig), argv, say=None)
    with torch.device('meta'):
        return GPT(c.build(GPTConfig))


SIZES = [  # size, parameters, training FLOPs per token, effective parameters where published
    (8, 92_816_896, '7.678034e+08', 132_163_072),
    (10, 124_049_280, '1.081651e+09', None),
    (12, 158_492_928, '1.444258e+09', 247_003_392),
    (14, 196_147_840, '1.855623e+09', None),
    (16, 237_014_016, '2.315747e+09', None),
    (18, 281_091_456, '2.824630e+09', None),
    (20, 328_380_160, '3.382272e+09', 574_201_600),
]


@pytest.mark.parametrize('size, total, training, effective', SIZES)
def test_looped_nanochats_dial_counts_as_published(size, total, training, effective):
    model = build('config/train_looped_nanochat.py', f'--size={size}')
    counted = parameters(model)
    assert (
        counted['total'] == total == model.get_num_params()
        and f'{sum(flops(model)["training"].values()):.6e}' == training
    )
    assert effective in (None, counted['effective'])


@pytest.mark.parametrize('name, total', [('1_4b', 1_434_652_673), ('2_6b', 2_667_974_657)])
def test_ouro_counts_as_published(name, total):
    model = build(f'config/train_ouro_{name}.py')
    assert parameters(model)['total'] == total == model.get_num_params()


def test_looplm_small_counts_as_published_and_its_final_norm():
    assert parameters(build('config/train_ouro_small.py'))['total'] == 80_235_265 + 768


@pytest.mark.parametrize('name', ['flt', 'flt_res', 'lt', 'lt_i', 'lt_ia'])
def test_the_flt_family_differs_in_nothing_that_counts(name):
    model = build(f'config/train_{name}.py')
    assert parameters(model)['total'] == 2 * 50304 * 384 + 6 * 12 * 384**2
    assert model.config.depth == 72
    assert flops(model)['training'] == {kind: 3 * n for kind, n in flops(model)['forward'].items()}


def test_the_size_dial_is_refused_beside_another_width():
    assert (GPTConfig(size=9).n_embd, GPTConfig(size=9).n_head) == (640, 5)
    with pytest.raises(ValueError, match='n_embd=512, expected no value with size=20, which makes it 1280'):
        GPTConfig(size=20, n_embd=512)


RECIPES = sorted(path.stem for path in (ROOT / 'config').glob('train_*.py'))


COUNTED = [(None, 1), (2, 1), (9, 3), (2, 2)]  # bptt_k, and the loops that are read
CASES = [(name, *COUNTED[i % 4]) for i, name in enumerate(RECIPES)]
CASES += [('train_flt', *pair) for pair in COUNTED]


@pytest.mark.parametrize('name, bptt_k, rows', sorted(set(CASES), key=str))
def test_flops_of_every_recipe_equal_torchs_counter(name, bptt_k, rows, monkeypatch):
    monkeypatch.setattr(model_file, 'maybe_checkpoint', lambda again, f, *args: f(*args))
    small = ['--n_loop=3', '--block_size=32', '--vocab_size=70', '--window_pattern=L', '--n_block=3']
    small += ['--window_size=None']
    small += ['--size=1'] if name == 'train_looped_nanochat' else ['--n_embd=24', '--n_head=2']
    truncated = not build(f'config/{name}.py', *small, '--bptt_k=None').inject.needs_full_bptt
    model = build(f'config/{name}.py', *small, f'--bptt_k={bptt_k if truncated else None}')
    with torch.device('meta'):
        idx = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        ce, gates = model.loss_table(idx, idx, loops=range(3 - rows, 3))
        loss = ce.mean() if gates is None else ce.mean() + gates.mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    ours = [kinds['matmul'] + kinds['attention'] for kinds in flops(model, loops_read=rows).values()]
    assert tuple(64 * n for n in ours) == counted
    assert flops(model, 3) == flops(model)


@pytest.mark.parametrize('injection', ['query_first', 'query_all'])
def test_queries_from_a_state_without_gradient_cost_less(injection):
    keys = [f'--input_injection={injection}', '--state_init=random', '--block_size=32', '--vocab_size=70']
    model = build('config/train_flt.py', *keys, '--n_embd=24', '--n_head=2', '--n_loop=3')
    with torch.device('meta'):
        idx = torch.zeros(2, 32, dtype=torch.long)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    kinds = flops(model)['training']
    assert 64 * (kinds['matmul'] + kinds['attention']) == counter.get_total_flops()


def test_a_window_counts_the_keys_it_sees():
    full, narrow, wide = (
        flops(build('config/train_gpt2.py', '--n_embd=24', '--n_head=2', '--block_size=32', *window))[
            'forward'
        ]
        for window in (
            (),
            ('--window_pattern=S', '--window_size=8'),
            ('--window_pattern=S', '--window_size=32'),
        )
    )
    assert narrow['attention'] * 4 == full['attention'] == wide['attention'] == 12 * 4 * 24 * 32


def counts(call, *flags):
    """What bench.py prints of FLT, {name: number}."""
    out = call(bench.main, 'config/train_flt.py', '--vocab_size=64', '--count_only=True', *flags)[1]
    assert ('baseline same_' in out and ': n_loop = 1\n' in out) == bool(flags)
    lines = out[out.index('embedding parameters') :].splitlines()
    return {line[:24].strip(): float(line[24:41].replace(',', '')) for line in lines}


def test_baselines_have_the_same_parameters_or_the_same_flops(call):
    looped = counts(call)
    plain = counts(call, '--baseline=same_params')
    assert plain['total parameters'] == looped['total parameters'] and plain['executed layers'] == 6
    deep = counts(call, '--baseline=same_flops')
    assert deep['training FLOPs per token'] == looped['training FLOPs per token']
    assert deep['executed layers'] == looped['executed layers'] == 72
    assert deep['recur parameters'] == 12 * looped['recur parameters']


@pytest.mark.parametrize('baseline, layers', [('same_params', 3), ('same_flops', 4)])
def test_baselines_train_and_resume(call, flags, tmp_path, baseline, layers):
    damped = ['--state_update=damp', '--update_alpha=0.5']
    keys = [*flags, '--input_injection=inject_random', '--state_std=0.5', *damped, f'--baseline={baseline}']
    status, out, _ = call(main, *keys, '--max_iters=2')
    assert status == 0 and f'executed layers: {layers} ' in out
    updates = dict(same_params=('damp', 0.5), same_flops=('replace', 1.0))
    args = load(tmp_path / 'out' / 'ckpt.pt')['model_args']
    assert (args['state_update'], args['update_alpha']) == updates[baseline]
    status, out, _ = call(main, '--init_from=resume', f'--out_dir={tmp_path}/out', '--max_iters=3')
    assert status == 0 and f'executed layers: {layers} ' in out
