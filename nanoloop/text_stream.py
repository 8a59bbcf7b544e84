"""
Turns the tokens of a sample into text while they are drawn.
"""

import codecs


class TextStream:
    """Turns the tokens of one sample into text, and ends it before the first of the texts `stops`.

    An empty text in stops is ignored. done: the sample has ended, because of stops or because rest() was
    called.
    """

    def __init__(self, tokenizer, *stops):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.starts = {stop[:n] for stop in self.stops for n in range(1, len(stop))}
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character can take several tokens
        self.text, self.printed, self.done = '', 0, False

    def add(self, token):
        """Takes a token. Returns the new text, without an end that may become a stop or half a character."""
        return '' if self.done else self.grow(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def rest(self):
        """Ends the sample. Returns the text that was held back."""
        return '' if self.done else self.grow(self.decoder.decode(b'', final=True), last=True)

    def grow(self, text, last=False):
        """Appends text. Returns what can now be printed; last: nothing follows."""
        self.text += text
        found = [self.text.find(stop) for stop in self.stops if stop in self.text]
        self.done = bool(found) or last
        end = min(found, default=len(self.text))
        if not self.done:  # the longest end of the text that is a beginning of a stop
            end -= max((len(start) for start in self.starts if self.text.endswith(start)), default=0)
        new, self.printed = self.text[self.printed : end], end
        return new
