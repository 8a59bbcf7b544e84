"""
Splits a text at long runs of blanks, which the library tiktoken cannot take, without a change of its tokens.
"""

import re

LONG_RUN = 10**5  # blanks in a row; tiktoken gives up at a million with something else behind them
BLANK = r' \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'  # \s in Rust; Python's has more

# Encodings of tiktoken: whether a line end in a run of blanks ends a token. All leave the last blank of a run
# to the word behind it.
LINE_ENDS = dict.fromkeys(('gpt2', 'r50k_base', 'p50k_base', 'p50k_edit'), False)
LINE_ENDS |= dict.fromkeys(('cl100k_base', 'o200k_base', 'o200k_harmony'), True)


def split_at_blanks(text, line_ends, long_run=LONG_RUN):
    """Yields the parts of a text whose tokens, one after the other, are those of the text.

    A part ends in a run of at least long_run blanks, where the encoding ends a token anyway. line_ends: see
    LINE_ENDS; with None the text stays whole.
    """
    start = 0
    if line_ends is not None and len(text) > long_run:
        for run in re.finditer(rf'(?<![{BLANK}])[{BLANK}]{{{long_run},}}(?=[^{BLANK}/])', text):
            cuts = [run.end() - 1]
            if line_ends and (line := max(text.rfind(end, *run.span()) for end in '\r\n')) >= 0:
                cuts = sorted({line + 1, max(line + 1, run.end() - 1)})
            for cut in cuts:
                yield text[start:cut]
                start = cut
    yield text[start:]
