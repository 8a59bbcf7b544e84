"""
The calculator that an answer may use: arithmetic, and the count of a text in a text. Nothing is ever run: an
expression is parsed, and only what the tables below name is computed. Needs no torch.

    calculate('1,200 / 5')                   '240'
    calculate("'strawberry'.count('r')")     '3'
    calculate('9**9**9')                     None
"""

import ast
import operator
import re
import warnings
from decimal import Context, Decimal
from fractions import Fraction

MAX_LENGTH = 200  # characters of an expression: so no number has more digits, and no step takes long
DIGITS = 12  # significant digits of a result that is no integer

ARITHMETIC = re.compile(r'[0-9+\-*/(). ]+')
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression):
    """Returns the value of an expression as a text, None if it is not one of these:

    + - * / and parentheses of decimal numbers, whose commas are left out. Fractions are exact; a result that
    is no integer has DIGITS digits. There are no powers and no other functions.

    'text'.count('part'), with two texts in quotes and without a backslash.
    """
    if len(expression) > MAX_LENGTH or '\\' in expression:
        return None
    numbers = expression.replace(',', '')
    is_arithmetic = ARITHMETIC.fullmatch(numbers)
    text = (numbers if is_arithmetic else expression).strip(' ')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # on texts that are nearly Python
            tree = ast.parse(text, mode='eval').body
        return write_number(evaluate(tree, text)) if is_arithmetic else count(tree)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # ast.parse raises the last two for deep nesting


def evaluate(node, text):
    """Returns the value of a tree of arithmetic as a Fraction. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(text[node.col_offset : node.end_col_offset])  # as it was written: 0.1 is exact
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(operand, text))
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left, text), evaluate(right, text))
    raise ValueError('no arithmetic')


def write_number(value):
    """Returns a Fraction as a text: an integer in full, another rounded to DIGITS digits."""
    if value.denominator == 1:
        return str(value.numerator)
    text = f'{Context(prec=DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator)):f}'
    return text.rstrip('0').rstrip('.') if '.' in text else text


def count(node):
    """Returns the value of a tree such as 'text'.count('part') as a text, None for another tree."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr='count'),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return str(text.count(part))
