"""
Turns the tokens of a sample into text while they are drawn.
"""

import codecs


class TextStream:
    """Turns the tokens of one sample into text, and ends it before the text `stop`.

    done: the sample has ended, because of stop or because rest() was called.
    """

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character can take several tokens
        self.text, self.printed, self.done = '', 0, False

    def add(self, token):
        """Takes a token. Returns the new text, without an end that may become `stop` or half a character."""
        return '' if self.done else self.grow(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def rest(self):
        """Ends the sample. Returns the text that was held back."""
        return '' if self.done else self.grow(self.decoder.decode(b'', final=True), last=True)

    def grow(self, text, last=False):
        """Appends text. Returns what can now be printed; last: nothing follows."""
        self.text += text
        stop_at = self.text.find(self.stop) if self.stop else -1
        self.done = stop_at >= 0 or last
        end = len(self.text) if stop_at < 0 else stop_at
        if not self.done:  # the longest end of the text that is a beginning of stop
            lengths = range(len(self.stop) - 1, 0, -1)
            end -= next((n for n in lengths if self.text.endswith(self.stop[:n])), 0)
        new, self.printed = self.text[self.printed : end], end
        return new
