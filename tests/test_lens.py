"""What a model says after every loop."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from decoding import IDX, dividing_threshold, expected, gated, make
from helpers import randomize

import sample
import train
from model import GPT, GPTConfig
from nanoloop import kv_cache
from nanoloop.checks import UserError
from nanoloop.decode import Decoder
from nanoloop.early_exit import EXIT, EarlyExit
from nanoloop.lens import loss_by_loop, predictions_by_loop, top_predictions
from nanoloop.lens_page import LensView, columns, fit, token_text
from nanoloop.tokenizer import Bytes, Characters

SIZES = dict(block_size=16, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=3)


def test_each_loop_says_what_a_model_with_as_many_loops_says():
    model = randomize(GPT(GPTConfig(**SIZES))).double().eval()
    ids = torch.randint(23, (2, 13), generator=torch.Generator().manual_seed(0))
    idx, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -1
    for n_loop, loops in ((None, 3), (5, 5)):
        losses, (tokens, p) = (
            loss_by_loop(model, idx, targets, n_loop),
            top_predictions(model, idx, n_loop, k=4),
        )
        assert losses.shape == (loops,) and tokens.shape == p.shape == (loops, 2, 4)
        for i in range(loops):
            logits, loss = model(idx, targets, n_loop=i + 1)
            assert torch.allclose(losses[i], loss, atol=1e-12)
            expected = logits[:, -1].softmax(dim=-1).sort(dim=-1, descending=True)
            assert torch.equal(tokens[i], expected.indices[:, :4])
            assert torch.allclose(p[i], expected.values[:, :4], atol=1e-12)


# -----------------------------------------------------------------------------
# every position


@pytest.mark.parametrize(
    'keys, n_loop',
    [
        (dict(pos='rope', input_injection='add', state_init='zero', window_pattern='LS'), None),
        (dict(pos='rope', input_injection='query_all', state_init='none', norm='layernorm'), 4),
        (dict(n_coda=0, input_injection='inject', state_init='random', n_kv_head=1), 5),
    ],
)
def test_every_position_and_loop_says_what_a_forward_pass_says(keys, n_loop, monkeypatch):
    monkeypatch.setattr(kv_cache, 'PREFILL_CHUNK', 5)  # pieces of 5 tokens
    model = make(**keys)
    model.head_chunk = 5  # logits of 5 tokens at once
    idx = IDX[:2, : 12 if model.config.pos == 'learned' else 40]
    lens = predictions_by_loop(model, idx, n_loop, k=4)
    loops = n_loop or model.config.n_loop
    assert lens.tokens.shape == lens.p.shape == (loops, *idx.shape, 4) and lens.exits is None
    before = None
    for i in range(loops):
        (s,), attn_inputs = model.loop_states(idx, n_loop=i + 1)
        p = model.logits(model.run_coda(s, attn_inputs)).softmax(dim=-1)
        expected = p.sort(dim=-1, descending=True)
        assert torch.equal(lens.tokens[i], expected.indices[..., :4])
        assert torch.allclose(lens.p[i], expected.values[..., :4], atol=1e-12)
        if before is None:
            before = first_state(model, idx)
        change = ((s - before) ** 2).sum(-1).sqrt() / (s**2).sum(-1).sqrt()
        assert torch.allclose(lens.change[i], change, atol=1e-12)
        before = s
    final = lens.tokens[-1, ..., 0]
    for row, t in itertools.product(range(2), range(idx.size(1))):
        best = [tokens[row, t, 0] for tokens in lens.tokens]
        kept = next(i for i in range(loops) if all(token == final[row, t] for token in best[i:]))
        assert lens.kept[row, t] == kept + 1
    assert len(lens.kept.unique()) > 1


def first_state(model, idx):
    """s_0 of idx (B, T), 0 if there is none."""
    pos = torch.arange(idx.size(1))
    e = model.apply_blocks(model.transformer.prelude, model.embed(idx, pos), model.attn_inputs(pos))
    s = model.start(e, pos)
    return torch.zeros_like(e) if s is None else s


def test_more_predictions_than_tokens_are_all():
    lens = predictions_by_loop(make(), IDX[:, :3], k=100)
    assert lens.tokens.size(-1) == 23 and torch.allclose(lens.p.sum(-1), torch.ones(()).double())
    assert top_predictions(make(), IDX[:, :3], k=100)[0].size(-1) == 23


def test_learned_positions_that_are_used_up_start_anew_as_in_sampling():
    model, said = make(), []
    lens = predictions_by_loop(model, IDX, k=1, say=said.append)
    for row, best in zip(IDX, lens.tokens[-1, ..., 0], strict=True):
        assert torch.equal(best, expected(model, row).logits.argmax(-1))
    assert said == [
        '40 tokens are more than block_size=12 learned positions: beyond them a token is predicted from 7 to '
        '12 tokens, as when a text is sampled'
    ]
    predictions_by_loop(model, IDX[:, :12], say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize('rule', EXIT)
def test_exits_are_those_of_the_decoder_and_of_the_equations(rule):
    model, idx = gated(), IDX[:1, :12]
    threshold = dividing_threshold(model, rule, idx[0])
    for min_loops in (1, 3):
        early_exit = EarlyExit(rule, threshold, min_loops)
        decoder = Decoder(model, 1, early_exit=early_exit)
        with torch.no_grad():
            decoder.prefill(idx)
        exits = predictions_by_loop(model, idx, early_exit=early_exit).exits
        assert torch.equal(exits, decoder.loops) and exits.min() >= min_loops
        if min_loops == 1:
            assert len(exits.unique()) > 1
            assert exits[0].tolist() == expected(model, idx[0], rule=rule, threshold=threshold).loops


def test_exits_of_a_text_longer_than_the_positions_are_those_of_each_view():
    model = gated(pos='learned')
    threshold = dividing_threshold(model, 'diff', IDX[0, :12])
    exits = predictions_by_loop(model, IDX[:1], early_exit=EarlyExit('diff', threshold)).exits
    assert exits[0].tolist() == expected(model, IDX[0], rule='diff', threshold=threshold).loops


def test_an_exit_that_the_model_cannot_have_is_refused():
    with pytest.raises(UserError, match='min_loops=3, expected at most n_loop=2'):
        predictions_by_loop(make(), IDX, early_exit=EarlyExit('diff', 0.1, min_loops=3))
    with pytest.raises(UserError, match='the model has no exit gate'):
        predictions_by_loop(make(), IDX, early_exit=EarlyExit('gate', 0.1))


# -----------------------------------------------------------------------------
# lines and page


def test_tokens_are_shown_in_a_line_and_can_be_told_apart():
    bytes_, chars = Bytes(), Characters(['\n', ' ', "'", '\\', '\u05d0', '\u0301', '\u200f', '\u3000', 'é'])
    assert [token_text(bytes_, i) for i in b'a \n<'] == ["'a'", "' '", r"'\n'", "'<'"]
    assert [token_text(bytes_, i) for i in (0xC3, 0, 300)] == ["'<0xC3>'", r"'\x00'", '<300>']
    shown = [token_text(chars, i) for i in range(9)]
    accent = "'\N{DOTTED CIRCLE}\u0301'"
    expected = [r"'\n'", "' '", '"\'"', r"'\\'", "'\u05d0'", accent, r"'\u200f'", r"'\u3000'", "'é'"]
    assert shown == expected
    assert token_text(Characters(['\\udce2']), 0) == r"'\\udce2'"  # a text, not a byte


def test_texts_fit_their_columns():
    assert fit('abc', 5) == 'abc  ' and fit('abcdef', 5) == 'abcd…'
    assert fit('\u4e2d\u6587', 5) == '\u4e2d\u6587 ' and fit('\u4e2d\u6587\u5b57', 5) == '\u4e2d\u6587…'
    assert fit('e\u0301', 3) == 'e\u0301  '
    assert fit('\u05d0', 2) == '\u200e\u05d0\u200e ' and columns(fit('\u05d0', 2)) == 2


class Page(HTMLParser):
    """A page as it is parsed: elements, the texts of the tokens, the scripts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.tokens, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == 'script':
            self.scripts.append('')
        if ('class', 'token') in attrs:
            self.tokens.append('')
        if tag not in ('meta',):
            self.open.append((tag, dict(attrs).get('class')))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == 'script':
            self.scripts[-1] += data
        if ('td', 'token') in self.open:
            self.tokens[-1] += data


NASTY = [*'"\'\\\n é\u4e2d', *'</script> <b> &amp; <!-- $rows \u05d0\u05d1'.split()]


def lens_view(prompt, **options):
    """A LensView of a tiny model whose tokens are NASTY."""
    model = gated(vocab_size=len(NASTY))
    early_exit = EarlyExit('diff', 0.9, min_loops=2)
    lens = predictions_by_loop(model, torch.tensor([prompt]), early_exit=early_exit, k=3)
    return lens, LensView(lens, prompt, Characters(NASTY), early_exit)


def test_the_page_has_every_token_and_prediction_and_nothing_from_elsewhere(tmp_path):
    prompt = [*range(13), *range(12, -1, -1)]
    lens, view = lens_view(prompt)
    view.write(tmp_path / 'a.html', 'a <model> & "more"')
    text = (tmp_path / 'a.html').read_text(encoding='utf-8')
    page = Page(text)
    assert page.tokens == [token_text(Characters(NASTY), token) for token in prompt]
    assert page.tags.count('script') == 2 and page.tags.count('b') == 5 + 26  # the legend, and a row's loop
    assert '<title>a &lt;model&gt; &amp; &quot;more&quot;</title>' in text
    data = json.loads(page.scripts[0])
    assert data['tokens'] == lens.tokens[:, 0].transpose(0, 1).tolist()
    assert data['exits'] == lens.exits[0].tolist() and data['kept'] == lens.kept[0].tolist()
    assert data['texts'] == {str(i): token_text(Characters(NASTY), i) for i in range(13)}
    assert data['next'] == [*prompt[1:], None]
    assert data['p'][3][2] == [f'{100 * p:.1f}' for p in lens.p[2, 0, 3].tolist()]
    assert data['change'][3][2] == f'{lens.change[2, 0, 3].item():.2g}'
    assert not {'src', 'href', 'srcset', 'action'} & {name for name, _ in page.attributes}
    assert '://' not in text and 'url(' not in text and '@import' not in text


def test_the_lines_are_aligned_and_only_the_last_positions_are_printed():
    lens, view = lens_view([i % 13 for i in range(130)])
    first, legend, title, *lines = view.lines()
    assert first == 'the last 100 of 130 positions; a page (lens_html) has all'
    assert 'exit: a token leaves by diff at 0.9, min_loops=2 after this loop' in legend
    assert len(lines) == 100 * 5 and lines[0].startswith(' 30  ') and lines[-5].startswith('129  ')
    assert len(lens.kept.unique()) > 1
    for t, i in itertools.product(range(30, 129), range(5)):
        line = lines[5 * (t - 30) + i].replace('\u200e', '')
        best = zip(lens.tokens[i, 0, t].tolist(), lens.p[i, 0, t].tolist(), strict=True)
        stars = [(token, f'{p:.1%}' + r'\*' * (token == view.next[t])) for token, p in best]
        predictions = ''.join(f'{re.escape(view.texts[token])} +{number} *' for token, number in stars)
        exit_mark = ' exit' if lens.exits[0, t] == i + 1 else ''
        kept_mark = '=' if i + 1 >= lens.kept[0, t] else ' '
        token = f'{t} +{re.escape(view.texts[t % 13])}' if i == 0 else ''
        change = re.escape(f'{lens.change[i, 0, t]:.2g}')
        assert re.fullmatch(f' *{token} +{i + 1}{kept_mark} +{change} *{exit_mark} +{predictions}', line)
    assert len({columns(line.rstrip('*')) for line in lines}) == 1


# -----------------------------------------------------------------------------
# sample.py


def test_sample_prints_the_lens_and_writes_its_page(call, flags, tmp_path):
    assert call(train.main, *flags, '--max_iters=4')[0] == 0
    model = [f'--out_dir={tmp_path}/out', '--device=cpu', '--dtype=float32']
    lens = [*model, '--start=ab cab', '--lens=3']
    status, out, err = call(sample.main, *lens)
    legend, title, *lines = out.splitlines()
    assert status == 0 and len(lines) == 6 * 2 and 'exit' not in title and '---' not in out
    assert [line.split()[0] for line in lines[::2]] == [*'012345']
    page = tmp_path / 'lens.html'
    options = ['--n_loop=5', '--exit=diff', '--exit_threshold=1e9', '--min_loops=2', f'--lens_html={page}']
    status, out, err = call(sample.main, *lens, *options)
    lines = out.splitlines()[2:]
    assert status == 0 and len(lines) == 6 * 5 and f'written: {page}, 6 positions' in err
    assert [i for i, line in enumerate(lines) if ' exit ' in line] == [1, 6, 11, 16, 21, 26]
    assert Page(page.read_text()).tokens == ["'a'", "'b'", "' '", "'c'", "'a'", "'b'"]
    assert 'step 4, n_loop 5, trained with 2</h1>' in page.read_text()
    status, out, err = call(sample.main, *model, '--lens=1', '--start=' + 'abc' * 40)
    assert status == 0 and out.startswith('the last 100 of 120 positions')
    assert '120 tokens are more than block_size=8 learned positions' in err
    page.unlink()
    for options, told in [
        (['--exit=gate', '--exit_threshold=0.5'], 'the model has no exit gate'),
        (['--exit=kl', '--exit_threshold=1', '--min_loops=3'], 'min_loops=3, expected at most n_loop=2'),
    ]:
        status, out, err = call(sample.main, *lens, f'--lens_html={page}', *options)
        assert status == 2 and not out and told in err and not page.exists()


@pytest.mark.parametrize(
    'options, told',
    [
        (['--lens=-1'], 'lens=-1, expected at least 0 and at most 100'),
        (['--lens=101'], 'lens=101, expected at least 0 and at most 100'),
        (['--lens=yes'], "lens='yes', expected int"),
        (['--lens_html=a.html'], "lens_html='a.html', expected '' without a lens: try --lens=5"),
        (['--lens=5', '--lens_html=nowhere/a.html'], 'expected a file .html or .htm in a folder that exists'),
        (['--lens=5', '--lens_html=x.pt'], "lens_html='x.pt', expected a file .html"),
        (['--lens=5', '--exit=kl'], 'exit_threshold=None, expected a number with exit=kl'),
        (['--lens=5', '--num_samples=3'], 'num_samples=3, expected 1 with lens, which samples nothing'),
        (['--lens=5', '--max_new_tokens=9'], 'max_new_tokens=9, expected 500 with lens'),
        (['--lens=5', '--stop=x'], "stop='x', expected '' with lens"),
        (['--lens=5', '--stream=True'], 'stream=True, expected False with lens'),
        (['--lens=5', '--temperature=1'], 'temperature=1.0, expected 0.8 with lens'),
        (['--lens=5', '--top_k=5'], 'top_k=5, expected 200 with lens'),
        (['--lens=5', '--top_p=0.5'], 'top_p=0.5, expected None with lens'),
        (['--lens=5', '--seed=1'], 'seed=1, expected 1337 with lens'),
        (['--lens=5', '--kv_budget=1'], 'kv_budget=1, expected None with lens'),
        (['--lens=5', '--warm_start=True'], 'warm_start=True, expected False with lens'),
        (['--lens=5', '--speculate=2'], 'speculate=2, expected 0 with lens'),
        (['--lens=5', '--compile=True'], 'compile=True, expected False with lens'),
    ],
)
def test_what_means_nothing_with_a_lens_is_refused_in_one_line(call, options, told):
    status, out, err = call(sample.main, *options)
    assert status == 2 and told in err and not out
    assert [line for line in err.splitlines() if not line.startswith('Overriding')] == [err.splitlines()[-1]]
