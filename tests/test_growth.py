"""A checkpoint that is continued with more tokens: embedding and head grow, old tokens keep their logits."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, load, randomize, same

import eval as evaluate
import sample
import train
from model import GPT, GPTConfig
from nanoloop import tokenizer as tokenizers
from nanoloop.added_tokens import SPECIAL, Added, chat_tokenizer
from nanoloop.checkpoint import load_checkpoint
from nanoloop.growth import EMBEDDING, HEAD, NOISE, Growth, grow_rows, plan_growth
from nanoloop.prepare import write_text
from nanoloop.pretraining import find_growth
from nanoloop.tokenizer import Bytes, Characters

SIZES = dict(n_embd=32, n_head=2, block_size=8, n_prelude=1, n_block=1, n_coda=1, n_loop=2)


def make(rows, **options):
    """A checkpoint of a model with this many rows and random weights."""
    model = randomize(GPT(GPTConfig(vocab_size=rows, **SIZES, **options))).eval()
    return model, dict(model=model.state_dict(), model_args=asdict(model.config))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize(
    'growth', [Growth(40, 49, 49, 0), Growth(40, 45, 48, 0), Growth(40, 49, 64, 0)], ids=str
)
@pytest.mark.parametrize('options', [{}, dict(softcap=15.0, norm_emb=True, pos='rope')], ids=str)
def test_old_tokens_keep_their_logits(tied, growth, options):
    old, checkpoint = make(48 if growth.size == 48 else 40, tie_weights=tied, **options)  # 48: 8 are padding
    new, _ = load_checkpoint(checkpoint | dict(growth=growth))
    assert new.config.vocab_size == growth.size == len(new.lm_head.weight)
    assert (new.lm_head.weight is new.transformer.wte.weight) == tied
    idx = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(0))
    before, after = (model(idx, idx)[0][..., :40] for model in (old, new))
    assert (before - after).abs().max() < 1e-6
    assert (before.softmax(-1) - after.softmax(-1)).abs().max() < 1e-6
    share = new(idx, idx)[0].softmax(-1)[..., growth.first : growth.end].sum(-1)
    assert share.mean() < (growth.end - growth.first) / 40  # less than as many average tokens have


@pytest.mark.parametrize('tied', [True, False])
def test_new_rows_are_the_mean_of_the_old_tokens_plus_noise(tied):
    _, checkpoint = make(48, tie_weights=tied)
    weights, growth = checkpoint['model'], Growth(40, 45, 500, 7)
    weights[EMBEDDING] += 3
    grown = grow_rows(weights, growth, tied)
    assert (grown[HEAD] is grown[EMBEDDING]) == tied
    for name in (EMBEDDING, HEAD):
        old, new = weights[name], grown[name]
        assert len(new) == 500 and new.dtype == old.dtype
        assert torch.equal(new[:40], old[:40]) and torch.equal(
            new[45:48], old[45:48]
        )  # the latter are padding
        added = torch.cat([new[40:45], new[48:]])  # (457, C)
        noise = (added - old[:40].mean(0)) / (old[:40] - old[:40].mean(0)).square().mean().sqrt()
        assert abs(noise.std() / NOISE - 1) < 0.05 and abs(noise.mean()) < NOISE / 30
        assert noise.square().mean(1).min() > 0 and len(added.unique(dim=0)) == len(added)
    assert tied or not torch.allclose(grown[EMBEDDING][48:] - 3, grown[HEAD][48:])
    assert same(grown, grow_rows(weights, growth, tied))  # a function of the seed
    assert not same(grown, grow_rows(weights, growth._replace(seed=8), tied))
    others = weights.keys() - {EMBEDDING, HEAD}
    assert same({name: grown[name] for name in others}, {name: weights[name] for name in others})


def test_only_a_tokenizer_with_added_tokens_lets_a_model_grow():
    chat, some = chat_tokenizer(Bytes()).spec, Added(Bytes(), SPECIAL[:3]).spec
    assert plan_growth(Bytes.spec, chat, 256, 1) == (256, 265, 265, 1)
    assert plan_growth(Bytes.spec, chat, 512, 1) == (256, 265, 512, 1)  # padded: rows become tokens
    assert plan_growth(some, chat, 259, 1) == (259, 265, 265, 1)
    assert plan_growth(Bytes.spec, chat, 256, 1, vocab_size=320) == (256, 265, 320, 1)
    for old, new, rows in (
        (chat, chat, 265),
        (chat, Bytes.spec, 265),
        (chat, some, 265),
        (Characters('ab').spec, chat, 256),
        (Bytes.spec, chat, 255),  # these are not the rows of its tokens
    ):
        assert plan_growth(old, new, rows, 1) is None
    for rows, size in ((256, 264), (512, 511)):
        with pytest.raises(ValueError, match=f'vocab_size={size}, expected at least {max(rows, 265)}'):
            plan_growth(Bytes.spec, chat, rows, 1, vocab_size=size)


@pytest.mark.parametrize('rows, size', [(50257, 50266), (50304, 50304)])
def test_a_file_of_nanogpt_with_gpt_2s_tokens_grows(monkeypatch, rows, size):
    gpt2 = Bytes()
    gpt2.spec, gpt2.token_bytes = dict(kind='tiktoken', name='gpt2'), [1] * 50257
    monkeypatch.setitem(tokenizers.TOKENIZERS, 'tiktoken', lambda name: gpt2)
    c = SimpleNamespace(init_from='a.pt', given={'dataset'}, seed=5, dataset='sft')
    args = dict(n_layer=1, n_head=1, n_embd=4, block_size=4, bias=True, vocab_size=rows, dropout=0.0)
    checkpoint = dict(model_args=args, model={}, path='a.pt')
    meta = dict(tokenizer=chat_tokenizer(gpt2).spec)
    assert find_growth(c, meta, checkpoint) == (50257, 50266, size, 5)
    c.init_from = 'resume'
    assert find_growth(c, meta, checkpoint) is None


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """The folders of two data sets of one text: of characters, and of these with the tokens of chats."""
    folder = tmp_path_factory.mktemp('sets')
    (folder / 'input.txt').write_text('abcd efgh\n' * 200)
    base = Characters('\n abcdefgh')
    other = Added(Characters('\n abcdefghx'), ['y'])
    for name, made in dict(plain=base, chat=chat_tokenizer(base), other=other).items():
        (folder / name).mkdir()
        write_text(folder / name, [folder / 'input.txt'], made, source='letters')
    return folder


def test_a_run_grows_goes_on_bit_for_bit_and_samples(sets, call, tmp_path):
    def run(data, out, *argv):
        return call(train.main, f'--dataset={sets / data}', f'--out_dir={tmp_path / out}', *TINY, *argv)

    assert run('plain', 'base')[0] == 0
    begin = f'--init_from={tmp_path / "base"}'
    status, out, _ = run('chat', 'grown', begin)
    told = 'step 12, 9 new tokens (ids 10 to 18) that start as the mean of the old ones'
    assert status == 0 and f'weights of {tmp_path / "base"}, {told}' in out.splitlines()
    assert run('chat', 'twice', begin, '--max_iters=6', '--lr_decay_iters=12')[0] == 0
    assert run('chat', 'twice', '--init_from=resume', '--max_iters=12')[0] == 0
    whole, twice = (load(tmp_path / name / 'ckpt.pt') for name in ('grown', 'twice'))
    assert same(whole['model'], twice['model']) and whole['model_args']['vocab_size'] == 19
    assert whole['tokenizer']['kind'] == 'added' and 'growth' not in whole

    argv = [
        '--start=<|user_start|>ab<|user_end|>',
        '--temperature=100',
        '--device=cpu',
        '--max_new_tokens=80',
    ]
    status, out, _ = call(sample.main, f'--out_dir={tmp_path / "grown"}', *argv)
    assert status == 0 and '<|assistant_end|>' in out and out.startswith('<|user_start|>ab<|user_end|>')

    measure = [
        f'--out_dir={tmp_path / "grown"}',
        f'--csv={tmp_path / "a.csv"}',
        '--windows=4',
        '--device=cpu',
    ]
    assert call(evaluate.main, *measure, f'--dataset={sets / "plain"}')[0] == 0  # of the old tokens
    status, _, error = call(evaluate.main, *measure, f'--dataset={sets / "other"}')
    assert status == 2 and 'expected one in the tokens of the model' in error

    status, _, error = run('chat', 'base', '--init_from=resume')
    assert status == 2 and error.count('\n') == 1
    assert (
        '10 of kind char, not 19 of kind added; --init_from=PATH with another out_dir adds the new' in error
    )
    for data, argv, told in (
        ('other', [], 'expected one in the tokens of the checkpoint: 10 of kind char, not 12 of kind added'),
        ('plain', [f'--init_from={tmp_path / "grown"}'], '19 of kind added, not 10 of kind char'),
        ('chat', ['--vocab_size=18'], 'vocab_size=18, expected at least 19: 10 rows, 19 tokens'),
    ):
        status, _, error = run(data, 'new', begin, *argv)
        assert status == 2 and told in error and error.count('\n') == 1 and not (tmp_path / 'new').exists()
