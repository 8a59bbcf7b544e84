"""
The text of --help: the keys of a script, read from the source of its dataclasses.
"""

import ast
import inspect
import io
import shutil
import textwrap
import tokenize

from nanoloop.checks import find_table, hints_of

INDENT = 36  # columns before the explanation of a key


def help_text(classes):
    """Returns the docstring of a script and the keys of its dataclasses, in lines of the terminal's width."""
    width = shutil.get_terminal_size((100, 24)).columns  # 100 where the width is unknown
    lines = [inspect.getmodule(classes[0]).__doc__]
    for cls in classes:
        hints = hints_of(cls)
        for key, default, comment in source_of_fields(cls):
            if key in hints:
                lines += lines_of_key(key, default, explain(comment, hints[key]), width)
            else:
                lines.append(comment)
    return '\n'.join(lines)


def explain(comment, hint):
    """Returns the comment of a field, followed by the names to choose from if it has a table of them."""
    table = find_table(hint)
    choices = f'one of {", ".join([table.choices(), *table.aliases])}' if table else ''
    return '; '.join(part for part in (comment, choices) if part)


def lines_of_key(key, default, explanation, width):
    """Returns the lines of a key: its default on the left, its explanation, wrapped, on the right."""
    wrapped = textwrap.wrap(
        explanation, max(20, width - INDENT), break_long_words=False, break_on_hyphens=False
    )
    first, *others = wrapped or ['']
    left = f'  --{key}={default}'.ljust(INDENT - 2)
    return [f'{left}  {first}'.rstrip(), *(' ' * INDENT + line for line in others)]


def source_of_fields(cls):
    """Returns [(name, default, comment)] of the fields of a dataclass, as its source has them.

    A field can take several lines; its comment is all comments on them. A comment on a line of its own
    between two fields is the heading of a section and is returned as ('', '', comment).
    """
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    entries = {}  # {line of the source: (name, default, comment)}
    for field in fields:
        lines = range(field.lineno, field.end_lineno + 1)
        comment = ' '.join(text_of(comments.pop(line)) for line in lines if line in comments)
        default = ast.get_source_segment(source, field.value)
        entries[field.lineno] = (field.target.id, ' '.join(default.split()), comment)
    for line, token in comments.items():
        if token.line.lstrip().startswith('#') and line < fields[-1].lineno:
            entries[line] = ('', '', text_of(token))
    return [entry for _, entry in sorted(entries.items())]


def text_of(comment):
    """Returns the text of a comment's token."""
    return comment.string.lstrip('# ')
