"""
Packs conversations into rows of one length, whole, for supervised fine-tuning. Needs no torch.
"""

from bisect import bisect_right, insort
from itertools import islice

WAITING = 100  # conversations from which the next one of a row is chosen


def pack(conversations, row_len, filler, n_waiting=WAITING):
    """Yields rows (ids, mask) of row_len tokens, two lists each, with all conversations, each whole.

    conversations: an iterable of (ids, mask), none longer than a row; n_waiting of them wait at a time. A row
    takes the longest one that still fits (best fit), the earlier of equal ones. When none fits, the rest of
    the row is the id `filler` with mask 0.
    """
    waiting, numbered = [], enumerate(conversations)  # waiting: (length, -number, ids, mask), sorted
    while True:
        ids, mask = [], []
        while True:
            for number, (new_ids, new_mask) in islice(numbered, n_waiting - len(waiting)):
                insort(waiting, (len(new_ids), -number, new_ids, new_mask))
            place = bisect_right(waiting, (row_len - len(ids), 1))
            if place == 0:
                break
            _, _, new_ids, new_mask = waiting.pop(place - 1)
            ids += new_ids
            mask += new_mask
        if not ids:
            assert not waiting, 'a conversation is longer than a row'
            return
        rest = row_len - len(ids)
        yield ids + [filler] * rest, mask + [0] * rest
