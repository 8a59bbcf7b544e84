"""Other programs' weights are what those programs compute, and every script takes every name of a model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import load, randomize, rms, softmax_attention, turn

import bench
import export
import sample
import train
from model import GPT, GPTConfig
from nanoloop import pretraining
from nanoloop.checkpoint import load_checkpoint
from nanoloop.plain_tokenizers import Tokenizer
from nanoloop.pretrained import find_pretrained

IDX = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
OURO = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    vocab_size=40,
    total_ut_steps=3,
    rms_norm_eps=1e-3,
    rope_theta=1e6,
    max_position_embeddings=64,
)


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    """(transformers' GPT-2 of 6 layers with random weights, its folder)."""
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=40, n_positions=16, n_embd=12, n_layer=6, n_head=2, n_inner=20)
    sizes.update(layer_norm_epsilon=1e-2, activation_function='gelu_pytorch_tanh')
    theirs = randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))).eval()
    folder = tmp_path_factory.mktemp('gpt2')
    theirs.save_pretrained(folder)
    return theirs, str(folder)


def taken(folder, **given):
    return load_checkpoint(folder, **given)[0]


CUTS = [
    {},
    dict(n_prelude=2, n_block=2, n_coda=2, n_loop=1),
    dict(n_prelude=1, n_coda=0, n_loop=1),
    dict(n_block=2, n_loop=1),
    dict(n_loop=1, input_injection='passthrough', n_prelude=0, n_coda=3),
    dict(n_loop=1, input_injection='gated'),
]


@pytest.mark.parametrize('given', CUTS, ids=str)
def test_one_loop_is_gpt2_however_it_is_cut(gpt2, given):
    theirs, folder = gpt2
    model = taken(folder, **given)
    expected = theirs(IDX).logits
    assert torch.allclose(model(IDX, IDX)[0], expected, atol=1e-5)
    double = theirs.double()(IDX).logits
    theirs.float()
    assert torch.allclose(model.double()(IDX, IDX)[0], double, atol=1e-10)
    assert all(getattr(model.config, key) == value for key, value in given.items())


def test_a_cut_gpt2_starts_as_the_identity_and_learns_to_use_its_state(gpt2):
    model = taken(gpt2[1], n_prelude=2, n_block=2, n_coda=2)
    assert model.config.n_loop == 4 and torch.equal(model(IDX, IDX)[0], model(IDX, IDX, n_loop=1)[0])
    model(IDX, IDX)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad
    assert not torch.allclose(model(IDX, IDX)[0], model(IDX, IDX, n_loop=1)[0], atol=1e-3)


def test_what_gpt2_does_not_have_starts_as_in_a_new_model(gpt2):
    model = taken(gpt2[1], n_loop=2, exit_gate=True)
    assert torch.equal(model.inject.weight, torch.eye(12, 24)) and not model.inject.bias.any()
    assert model.exit_gate.weight.any() and not model.exit_gate.bias.any()
    damped = taken(gpt2[1], state_update='damp', update_alpha=0.5)
    assert (damped.config.n_loop, damped.config.state_update, damped.config.update_alpha) == (4, 'damp', 0.5)
    gated = taken(gpt2[1], input_injection='gated', state_update='gate')
    new = GPT(gated.config).state_dict()
    values = {name: w for name, w in gated.state_dict().items() if name.startswith(('inject.', 'update.'))}
    assert values and all(torch.equal(w, new[name]) for name, w in values.items())


def test_nothing_else_starts_anew(gpt2):
    checkpoint = find_pretrained(gpt2[1], dict(n_loop=2))
    del checkpoint['model']['transformer.ln_f.weight']
    with pytest.raises(ValueError, match='does not fit: it lacks .*ln_f'):
        load_checkpoint(checkpoint)
    args = dict(n_embd=12, n_head=2, vocab_size=40, block_size=16, norm='rmsnorm')
    weights = GPT(GPTConfig(**args)).state_dict()
    del weights['inject.weight']  # a checkpoint of ours is broken without it
    with pytest.raises(ValueError, match='does not fit: it lacks .*inject'):
        load_checkpoint(dict(model=weights, model_args=args))


def test_a_cut_gpt2_trains(gpt2, tiny_data, call, tmp_path):
    run = f'--dataset={tiny_data} --out_dir={tmp_path} --device=cpu --compile=False --batch_size=4'.split()
    run += '--learning_rate=1e-2 --warmup_iters=0 --eval_iters=2 --eval_interval=20 --sample_tokens=0'.split()
    cut = [f'--init_from={gpt2[1]}', '--n_prelude=2', '--n_block=2', '--n_coda=2', '--n_loop=4']
    status, out, err = call(train.main, *run, *cut, '--max_iters=20')
    assert status == 0, err
    losses = [float(line.split()[3].strip(',')) for line in out.splitlines() if line.startswith('iter ')]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    args = load(tmp_path / 'ckpt.pt')['model_args']
    assert (args['n_prelude'], args['n_block'], args['n_coda'], args['n_loop'], args['norm_loop']) == (
        2,
        2,
        2,
        4,
        False,
    )
    assert call(train.main, f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=22')[0] == 0


def test_gpt2_is_sampled_from_without_training(gpt2, call, monkeypatch):
    theirs, folder = gpt2
    monkeypatch.setattr(sample, 'find_tokenizer', lambda checkpoint: Plain())
    options = [f'--init_from={folder}', '--device=cpu', '--dtype=float32', '--temperature=0', '--start=abc']
    status, out, err = call(sample.main, *options, '--max_new_tokens=5')
    ids = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    assert status == 0 and out == Plain().decode_bytes(ids.tolist()).decode() + '\n---------------\n', err


class Plain(Tokenizer):
    eot_token = 0

    def encode(self, text, special=False):
        return [ord(x) - 96 for x in text]

    def decode_bytes(self, ids):
        return ''.join(chr(96 + i) for i in ids).encode()


@pytest.fixture
def ouro(tmp_path):
    """(the weights of a small random Ouro, its folder, in two files as the large ones come)."""
    safetensors = pytest.importorskip('safetensors.torch')
    c, generator = OURO, torch.Generator().manual_seed(0)
    C, F, kv = c['hidden_size'], c['intermediate_size'], 8
    shapes = {'model.embed_tokens': (40, C), 'lm_head': (40, C), 'model.norm': (C,)}
    for i in range(3):
        p = f'model.layers.{i}.'
        shapes |= {p + f'self_attn.{x}_proj': (n, C) for x, n in zip('qkvo', (C, kv, kv, C), strict=True)}
        shapes |= {p + 'mlp.gate_proj': (F, C), p + 'mlp.up_proj': (F, C), p + 'mlp.down_proj': (C, F)}
        for name in ('input_layernorm', 'post_attention_layernorm'):
            shapes |= {p + name: (C,), p + name + '_2': (C,)}
    shapes['model.early_exit_gate'] = (1, C)
    w = {f'{name}.weight': torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w['model.early_exit_gate.bias'] = torch.tensor([0.3])
    w = {name: 0.2 * x if x.dim() > 1 else 1 + 0.1 * x for name, x in w.items()}
    names = sorted(w)
    for k in range(2):
        part = {name: w[name] for name in names[k::2]}
        safetensors.save_file(part, tmp_path / f'model-0000{k + 1}-of-00002.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(OURO | dict(model_type='ouro')))
    return w, tmp_path


def test_ouros_text_is_read_and_written_by_its_tokenizer_json(ouro, call, flags, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    _, folder = ouro
    names = ['<|endoftext|>', *'abcdefghijklmnopqrstuvwxyz', '\u0120', '\u010a', 'ab']
    vocabulary = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [('a', 'b')]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(['<|endoftext|>'])
    made.save(str(folder / 'tokenizer.json'))
    options = ['--device=cpu', '--dtype=float32', '--temperature=0', '--max_new_tokens=8']
    status, out, err = call(sample.main, f'--init_from=ouro:{folder}', *options, '--start=ab<|endoftext|> c')
    model, checkpoint = load_checkpoint(f'ouro:{folder}')
    expected = model.generate(torch.tensor([[29, 0, 27, 3]]), 8, temperature=0)[0].tolist()
    assert status == 0, err
    assert out.split('\n-------')[0] == ''.join((names + ['?'] * 10)[i] for i in expected).replace(
        '\u0120', ' '
    )
    weights = next(folder.glob('*.safetensors'))
    weights.write_bytes(b'')  # a tokenizer that is broken or missing is told before they are read
    (folder / 'tokenizer.json').write_text('{"model": 3}')
    status, _, err = call(sample.main, f'--init_from=ouro:{folder}', *options)
    assert status == 2 and 'tokenizer.json cannot be read' in err.splitlines()[-1]
    (folder / 'tokenizer.json').unlink()
    status, _, err = call(sample.main, '--init_from=resume', f'--out_dir=ouro:{folder}', *options)
    assert status == 2 and err.splitlines()[-1].endswith(
        'expected a folder with tokenizer.json, without it there is no text'
    )


def ouro_by_hand(w, idx):
    """Ouro's equations with Ouro's names: logits after the last iteration, and every iteration's gate."""

    def norm(x, name):
        return rms(x, 1e-3) * w[name + '.weight']

    def linear(x, name):
        return x @ w[name + '.weight'].T

    h, gates = w['model.embed_tokens.weight'][idx], []
    for _ in range(3):
        for i in range(3):
            p = f'model.layers.{i}.'
            x = norm(h, p + 'input_layernorm')
            q, k, v = (linear(x, p + f'self_attn.{name}_proj') for name in 'qkv')
            heads = []
            for n in range(4):
                mine, shared = slice(4 * n, 4 * n + 4), slice(4 * (n // 2), 4 * (n // 2) + 4)
                rotated = turn(q[..., mine], 1e6), turn(k[..., shared], 1e6)
                heads.append(softmax_attention(*rotated, v[..., shared]))
            y = linear(torch.cat(heads, dim=-1), p + 'self_attn.o_proj')
            h = h + norm(y, p + 'input_layernorm_2')
            x = norm(h, p + 'post_attention_layernorm')
            gate, up = linear(x, p + 'mlp.gate_proj'), linear(x, p + 'mlp.up_proj')
            y = linear(gate * gate.sigmoid() * up, p + 'mlp.down_proj')
            h = h + norm(y, p + 'post_attention_layernorm_2')
        h = norm(h, 'model.norm')
        gates.append((linear(h, 'model.early_exit_gate')[..., 0] + w['model.early_exit_gate.bias']).sigmoid())
    return linear(h, 'lm_head'), torch.stack(gates)


def test_ouros_safetensors_are_ouro(ouro):
    weights, folder = ouro
    model = taken(f'ouro:{folder}', block_size=16)
    logits, gates = ouro_by_hand({name: w.double() for name, w in weights.items()}, IDX)
    assert torch.allclose(model.double()(IDX, IDX)[0], logits, atol=1e-10)
    assert torch.allclose(model.loss_table(IDX, IDX, loops=(0, 1, 2))[1], gates, atol=1e-10)
    assert model.config.block_size == 16 and model.config.n_loop == 3


def test_weights_that_cannot_be_had_are_told(call, gpt2, ouro, tiny_data, tmp_path, monkeypatch):
    def told(*argv):
        status, _, err = call(train.main, f'--dataset={tiny_data}', f'--out_dir={tmp_path}/out', *argv)
        assert status == 2 and 'Traceback' not in err and not (tmp_path / 'out').exists(), err
        return err.splitlines()[-1]  # transformers shows its progress before it

    folder, (_, theirs) = gpt2[1], ouro
    assert f'n_block=3, expected 2: {folder} has 6 layers, of which n_prelude=2, n_coda=2' in told(
        f'--init_from={folder}', '--n_block=3'
    )
    assert 'n_prelude=4, n_coda=2 leave none for the loop' in told(f'--init_from={folder}', '--n_prelude=4')
    assert "norm='rmsnorm', expected 'layernorm'" in told(f'--init_from={folder}', '--norm=rmsnorm')
    assert 'expected a folder with config.json' in told('--init_from=ouro:nowhere')
    (theirs / 'model-00002-of-00002.safetensors').unlink()
    assert 'it is no Ouro' in told(f'--init_from=ouro:{theirs}')
    (theirs / 'model-00001-of-00002.safetensors').write_bytes(b'cut')
    assert 'cannot be read' in told(f'--init_from=ouro:{theirs}')
    assert 'cannot be loaded' in told(f'--init_from={theirs}')
    status, _, err = call(sample.main, '--init_from=gpt3', '--device=cpu')
    assert status == 2 and 'expected resume, the folder of a run' in err and 'gpt2-xl' in err
    monkeypatch.setitem(sys.modules, 'transformers', None)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    assert 'needs transformers: pip install -e ".[pretrained]"' in told(f'--init_from={folder}')
    assert 'needs safetensors: pip install -e ".[pretrained]"' in told(f'--init_from=ouro:{theirs}')


def test_the_tokens_must_be_gpt2s(gpt2, call, tiny_data, tmp_path, monkeypatch):
    real = pretraining.find_from_flags

    def find(*args, **keys):
        return dict(real(*args, **keys), tokenizer=dict(kind='tiktoken', name='gpt2'))

    monkeypatch.setattr(pretraining, 'find_from_flags', find)
    status, _, err = call(
        train.main, f'--init_from={gpt2[1]}', f'--dataset={tiny_data}', f'--out_dir={tmp_path}/a'
    )
    assert status == 2 and 'expected one in the tokens of the checkpoint: 40 of kind tiktoken' in err
    assert 'prepare it with --tokenizer gpt2' in err


@pytest.mark.parametrize(
    'changes, told',
    [
        (dict(scale_attn_weights=False), 'expected attention scaled as in GPT-2'),
        (dict(scale_attn_by_inverse_layer_idx=True), 'expected attention scaled as in GPT-2'),
        (dict(activation_function='silu'), 'an activation of gelu_new'),
        (dict(n_layer=7), 'there is no transformer.h.6.attn'),
    ],
    ids=str,
)
def test_a_gpt2_of_another_kind_is_refused(gpt2, tmp_path, changes, told):
    plain = json.loads((Path(gpt2[1]) / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(plain | changes))
    (tmp_path / 'model.safetensors').symlink_to(Path(gpt2[1]) / 'model.safetensors')
    with pytest.raises(ValueError, match=told):
        find_pretrained(str(tmp_path), {})


def test_an_untied_gpt2_with_the_exact_gelu(tmp_path):
    transformers = pytest.importorskip('transformers')
    sizes = dict(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    config = transformers.GPT2Config(**sizes, activation_function='gelu', tie_word_embeddings=False)
    theirs = randomize(transformers.GPT2LMHeadModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    model = taken(str(tmp_path))
    assert torch.allclose(model.double()(IDX, IDX)[0], theirs.double()(IDX).logits, atol=1e-10)


@pytest.mark.parametrize(
    'changes, told',
    [
        (dict(rope_scaling=dict(factor=2)), 'which has no rope_scaling'),
        (dict(tie_word_embeddings=True), 'which has no tie_word_embeddings'),
        (dict(hidden_act='gelu'), 'which has no hidden_act'),
        (dict(rope_theta=None), 'cannot be read'),
        (dict(use_sliding_window=True), 'which has no sliding window'),
        (dict(layer_types=['full_attention', 'sliding_attention']), 'which has no sliding window'),
        (dict(num_hidden_layers=2), 'which has no model.layers.2'),
        (dict(num_hidden_layers='three'), 'cannot be read'),
    ],
    ids=str,
)
def test_an_ouro_of_another_kind_is_refused(ouro, changes, told):
    folder = ouro[1]
    (folder / 'config.json').write_text(json.dumps(OURO | changes))
    with pytest.raises(ValueError, match=told):
        find_pretrained(f'ouro:{folder}', {})


def test_the_original_nanoloop_truncates_passthrough(tmp_path):
    args = dict(n_prelude=1, n_block=1, n_coda=1, n_loop=3, n_head=2, n_embd=12, block_size=16, bias=False,
                vocab_size=23, dropout=0.0, bptt_k=2, input_injection='passthrough')  # fmt: skip
    model = randomize(GPT(GPTConfig(**args | dict(bptt_k=None), norm_eps=torch.finfo(torch.float32).eps)))
    weights = {f'_orig_mod.module.{name}': w for name, w in model.state_dict().items()}
    torch.save(dict(model=weights, model_args=args), tmp_path / 'ckpt.pt')
    loaded, _ = load_checkpoint(tmp_path / 'ckpt.pt')
    assert torch.equal(loaded(IDX % 23, IDX % 23)[0], model.eval()(IDX % 23, IDX % 23)[0])


# -----------------------------------------------------------------------------
# one way from a name to a model

KINDS = ['run', 'file', 'export', 'gpt2', 'transformers', 'ouro']


@pytest.fixture
def name(request, call, flags, gpt2, ouro, tmp_path, monkeypatch):
    """A name of a model, of the kind that the test's parameter asks for."""
    if request.param in ('gpt2', 'transformers'):
        from transformers import GPT2LMHeadModel

        real = GPT2LMHeadModel.from_pretrained
        local = lambda name, **keys: real(gpt2[1] if name == 'gpt2' else name, **keys)  # noqa: E731
        monkeypatch.setattr(GPT2LMHeadModel, 'from_pretrained', local)  # the hub is not asked
        return 'gpt2' if request.param == 'gpt2' else gpt2[1]
    if request.param == 'ouro':
        return f'ouro:{ouro[1]}'
    call(train.main, *flags, '--max_iters=4', '--exit_gate=True')
    run = tmp_path / 'out'
    (run / 'best.pt').unlink()  # which file is preferred is another test's question
    shutil.copy(run / 'ckpt.pt', tmp_path / 'copy.pt')
    if request.param == 'export':
        call(export.main, f'--out_dir={run}', f'--to={tmp_path}/exported')
    return str(dict(run=run, file=tmp_path / 'copy.pt', export=tmp_path / 'exported')[request.param])


@pytest.mark.parametrize('name', KINDS, indirect=True)
def test_every_script_takes_every_name(call, name, tiny_data, tmp_path, monkeypatch):
    pytest.importorskip('safetensors')
    idx, seen = IDX[:, :8] % 12, []
    model, checkpoint = load_checkpoint(name)
    expected = model(idx, idx)[0]

    def load(*args, **changes):
        model, checkpoint = load_checkpoint(*args, **changes)
        seen.append(model(idx, idx)[0])
        return model, checkpoint

    for script in (sample, bench):
        monkeypatch.setattr(script, 'load_checkpoint', load)
    monkeypatch.setattr(sample, 'find_tokenizer', lambda checkpoint: Plain())
    monkeypatch.setattr(sample, 'check_tokenizer', lambda name: None)
    cpu, no_compile = ['--device=cpu', '--dtype=float32'], '--compile=False'
    small = [f'--dataset={tiny_data}', '--eval_iters=1', '--batch_size=2', '--sample_tokens=0', no_compile]
    by_out_dir = ['--init_from=resume', f'--out_dir={name}']
    for argv in ([f'--init_from={name}'], by_out_dir):
        assert call(sample.main, *argv, *cpu, '--max_new_tokens=2')[0] == 0
        decode = [*argv, *cpu, no_compile, '--mode=decode', '--tokens=2', '--rounds=1']
        assert call(bench.main, *decode)[0] == 0
        status, _, err = call(export.main, *argv, f'--to={tmp_path}/to')
        assert status == 0 and ('has no tokenizer' in err) == (checkpoint['tokenizer'] is None)
        seen.append(load_checkpoint(tmp_path / 'to')[0](idx, idx)[0])
    argv = [f'--init_from={name}', f'--out_dir={tmp_path}/trained', '--max_iters=0']
    status, _, err = call(train.main, *argv, *small, *cpu)
    assert status == 0, err
    seen.append(load_checkpoint(tmp_path / 'trained')[0](idx, idx)[0])
    assert len(seen) == 7 and all(torch.equal(logits, expected) for logits in seen)


@pytest.mark.parametrize('name', ['ouro'], indirect=True)
def test_without_a_tokenizer_there_is_no_text(call, name):
    status, out, err = call(sample.main, f'--init_from={name}', '--device=cpu')
    assert status == 2 and not out and 'expected a folder with tokenizer.json' in err.splitlines()[-1]


def test_training_takes_the_last_checkpoint_and_using_a_model_the_best(call, flags, tmp_path):
    call(train.main, *flags)
    run, cpu = tmp_path / 'out', ['--device=cpu', '--compile=False']
    for file, step in dict(ckpt=12, prev=8, best=4).items():
        checkpoint = torch.load(run / f'{file}.pt', weights_only=True)
        (run / f'{file}.pt').unlink()  # two of the three may be links to one file
        torch.save(dict(checkpoint, iter_num=step), run / f'{file}.pt')

    def check_steps(latest, best, broken):
        """Training and measuring take the step `latest`, the others `best`; broken: the files passed over."""
        name, to = f'--init_from={run}', tmp_path / 'to'
        train_argv = [
            name,
            flags[0],
            f'--out_dir={tmp_path}/{latest}',
            '--max_iters=0',
            '--sample_tokens=0',
            *cpu,
        ]
        _, out, err = call(train.main, *train_argv)
        assert f'weights of {run}, step {latest}\n' in out and err.count(
            f'{broken}.pt cannot be read'
        ) == bool(broken)
        _, out, _ = call(bench.main, name, flags[0], '--mode=decode', '--tokens=1', '--rounds=1', *cpu)
        assert f', step {latest}: ' in out
        assert f': step {best}, ' in call(sample.main, name, '--max_new_tokens=1', '--device=cpu')[2]
        assert call(export.main, name, f'--to={to}')[0] == 0
        assert load_checkpoint(to)[1]['iter_num'] == best

    check_steps(latest=12, best=4, broken='')
    assert load_checkpoint(run)[1]['iter_num'] == 4
    for file in ('ckpt', 'best'):
        (run / f'{file}.pt').write_bytes(b'cut')
    check_steps(latest=8, best=8, broken='ckpt')
    with pytest.warns(UserWarning, match='cannot be read') as warned:
        assert load_checkpoint(run)[1]['iter_num'] == 8
    assert 'best.pt' in str(warned[0].message) and 'ckpt.pt' in str(warned[1].message)


def test_a_checkpoint_of_an_unknown_program_is_refused():
    with pytest.raises(ValueError, match='expected one of this program, the original nanoLOOP, nanoGPT'):
        load_checkpoint(dict(model={}, model_args=dict(d_model=8)))
