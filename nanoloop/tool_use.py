"""
The calculator in answers: what stands between <|python_start|> and <|python_end|> is computed, and the result
follows. Needs no torch.
"""

from nanoloop.calculator import calculate
from nanoloop.conversation import special_id


def make_calculator(tokenizer):
    """Returns the tool of rollout.roll_out: a function of the ids of an answer so far -> the ids that follow.

    They are <|output_start|>, the result and <|output_end|> behind <|python_end|>, and none elsewhere, or if
    the calculator has no result. Raises UserError for a tokenizer without the special tokens.
    """
    names = 'python_start', 'python_end', 'output_start', 'output_end'
    start, end, output_start, output_end = (special_id(tokenizer, name) for name in names)

    def tool(ids):
        if not ids or ids[-1] != end or start not in ids:
            return []
        first = len(ids) - ids[::-1].index(start)  # behind the last start
        result = calculate(tokenizer.decode(ids[first:-1]))
        return [] if result is None else [output_start, *tokenizer.encode(result), output_end]

    return tool
