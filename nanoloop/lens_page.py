"""
Shows what a model predicts after every loop (nanoloop/lens.py), as lines of text and as a page of HTML.

    view = LensView(lens, prompt, tokenizer)
    print('\n'.join(view.lines()))
    view.write(path, about)

The page is one file that loads nothing. Its template is lens_page.html. Its script reads the predictions from
JSON; everything else is there without it.
"""

import html
import json
import re
import unicodedata
from pathlib import Path
from string import Template

from nanoloop.checks import check
from nanoloop.files import replace_file

PRINTED = 100  # most positions that are shown as lines
TOKEN_WIDTH = 18  # most columns of a token in a line
MARK = '\N{LEFT-TO-RIGHT MARK}'
SUFFIXES = ('.html', '.htm')
SAMPLING = (  # keys of sample.py for text that is generated
    'num_samples max_new_tokens stop stream temperature top_k top_p seed kv_budget warm_start speculate '
    'draft_loops compile'
).split()


def check_lens(c):
    """Raises UserError for keys of sample.py that mean nothing with a lens, or without one. c: its keys."""
    if not c.lens:
        check(not c.lens_html, 'lens_html', c.lens_html, "'' without a lens: try --lens=5")
        return
    for key in SAMPLING:
        default, value = getattr(type(c), key), getattr(c, key)
        check(value == default, key, value, f'{default!r} with lens, which samples nothing')
    if not c.lens_html:
        return
    path = Path(c.lens_html)
    fits = path.suffix in SUFFIXES and path.parent.is_dir() and not path.is_dir()
    check(fits, 'lens_html', str(path), f'a file {" or ".join(SUFFIXES)} in a folder that exists')


def token_text(tokenizer, token):
    """Returns a token as a quoted text in one line, blanks and line ends visible.

    A byte that is no character by itself is shown as <0xE2>, an id without a text as <50300>.
    """
    if token >= len(tokenizer.token_bytes):
        return f'<{token}>'
    text = tokenizer.decode_bytes([token]).decode('utf-8', 'surrogateescape')
    if unicodedata.category(text[:1] or ' ').startswith('M'):  # an accent would sit on the quote
        text = '\N{DOTTED CIRCLE}' + text
    # repr writes a backslash as two, and a byte that is no UTF-8 as \udce2
    return re.sub(r'\\\\|\\udc(..)', lambda m: f'<0x{m[1].upper()}>' if m[1] else m[0], repr(text))


def columns(text):
    """Returns the number of columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(char) in 'WF' for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ('Mn', 'Me', 'Cf') for char in text)


def fit(text, width):
    """Returns a text in exactly so many columns: cut, or with blanks behind it.

    A text from right to left is put between marks, without which the numbers beside it would change places.
    """
    if columns(text) > width:
        while columns(text) >= width:
            text = text[:-1]
        text += '…'
    blanks = ' ' * (width - columns(text))
    leftward = any(unicodedata.bidirectional(char) in ('R', 'AL', 'AN') for char in text)
    return (f'{MARK}{text}{MARK}' if leftward else text) + blanks


class LensView:
    """A Lens of a single row of tokens with its texts.

    prompt: its T token ids, a list. early_exit: the EarlyExit of the lens, if it has one.
    """

    def __init__(self, lens, prompt, tokenizer, early_exit=None):
        self.prompt, self.n_loop, self.policy = prompt, len(lens.tokens), ''
        if early_exit is not None:
            self.policy = f'{early_exit.name} at {early_exit.threshold:g}'
            self.policy += f', min_loops={early_exit.min_loops}' * (early_exit.min_loops > 1)
        # [T][R][k] twice, [T][R]
        self.tokens, self.p, change = (x[:, 0].transpose(0, 1).tolist() for x in lens[:3])
        self.kept = lens.kept[0].tolist()  # [T]
        self.exits = None if lens.exits is None else lens.exits[0].tolist()  # [T]
        self.change = [[f'{x:.2g}' for x in loops] for loops in change]
        ids = {*prompt, *(token for loops in self.tokens for best in loops for token in best)}
        self.texts = {token: token_text(tokenizer, token) for token in sorted(ids)}
        self.next = [*prompt[1:], None]  # the token that is right at each position

    def lines(self):
        """Yields the lines of a table: a line per position and loop, for the last PRINTED positions."""
        first = max(0, len(self.prompt) - PRINTED)
        shown = {*self.prompt[first:], *(t for loops in self.tokens[first:] for best in loops for t in best)}
        width = min(TOKEN_WIDTH, max(5, *(columns(self.texts[token]) for token in shown)))
        digits = len(str(len(self.prompt) - 1))
        if first:
            yield f'the last {PRINTED} of {len(self.prompt):,} positions; a page (lens_html) has all'
        legend = "= the last loop's prediction, kept from here on; * the text's next token"
        exit_title = ''
        if self.exits:
            legend += f'; exit: a token leaves by {self.policy} after this loop'
            exit_title = '  exit'
        yield legend
        yield f'{"":{digits}}  {fit("token", width)}  loop   change{exit_title}  predictions'
        for t in range(first, len(self.prompt)):
            start = f'{t:{digits}}  {fit(self.texts[self.prompt[t]], width)}'
            for i in range(self.n_loop):
                leaves = ('  exit' if self.exits[t] == i + 1 else ' ' * 6) if self.exits else ''
                best = '  '.join(
                    f'{fit(self.texts[token], width)} {p:6.1%}{"*" if token == self.next[t] else " "}'
                    for token, p in zip(self.tokens[t][i], self.p[t][i], strict=True)
                )
                kept = '=' if i + 1 >= self.kept[t] else ' '
                yield f'{start}  {i + 1:3}{kept}  {self.change[t][i]:>7}{leaves}  {best}'.rstrip()
                start = ' ' * (digits + 2 + width)

    def rows(self):
        """Yields the rows of the page's table, a row per position."""
        for t, token in enumerate(self.prompt):
            best, p = self.tokens[t][-1][0], self.p[t][-1][0]
            right = ' class="right"' if best == self.next[t] else ''
            leaves = f'<td>{self.exits[t]}</td>' if self.exits else ''
            yield (
                f'<tr data-t="{t}" style="--hue:{self.hue(self.kept[t]):.0f}"><td>{t}</td>'
                f'<td class="token"><bdi>{html.escape(self.texts[token])}</bdi></td>'
                f'<td><b>{self.kept[t]}</b></td>{leaves}<td class="change">{self.change[t][-1]}</td>'
                f'<td{right}><bdi>{html.escape(self.texts[best])}</bdi> <small>{p:.1%}</small></td></tr>'
            )

    def hue(self, loop):
        """Returns the colour of a loop in degrees: blue for the first, over green, to red for the last."""
        return 230 - 220 * (loop - 1) / max(1, self.n_loop - 1)

    def page(self, about):
        """Returns the text of the page. about: a line on the model, its heading."""
        data = dict(
            texts=self.texts, next=self.next, tokens=self.tokens, change=self.change, kept=self.kept,
            exits=self.exits, hues=[round(self.hue(i + 1)) for i in range(self.n_loop)],
            p=[[[f'{100 * p:.1f}' for p in best] for best in loops] for loops in self.p],
        )  # fmt: skip
        text, loops = json.dumps(data, separators=(',', ':')), range(1, self.n_loop + 1)
        template = Template(Path(__file__).with_suffix('.html').read_text(encoding='utf-8'))
        return template.substitute(
            about=html.escape(about),
            n_tokens=f'{len(self.prompt):,}',
            policy=f'Exit: the loop after which a token leaves by {self.policy}.' if self.exits else '',
            exit_title='<th>exit</th>' if self.exits else '',
            legend=''.join(f'<b style="--hue:{self.hue(i):.0f}">{i}</b>' for i in loops),
            rows='\n'.join(self.rows()),
            # in JSON these three can stand as escapes: no token ends the script
            data=re.sub('[<>&]', lambda char: f'\\u{ord(char[0]):04x}', text),
        )

    def write(self, path, about):
        """Writes the page as a file of UTF-8, whole or not at all."""
        with replace_file(path, 'wb') as file:
            file.write(self.page(about).encode('utf-8', 'replace'))
