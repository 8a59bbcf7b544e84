"""
The results of eval.py: eval.csv, a line per task, number of loops and policy.

A line is written in one call when it is finished. So an evaluation that was killed has whole lines only, and
is continued by the same command. Several processes can add lines to one file.
"""

import csv
import hashlib
import io
import os
from pathlib import Path

from nanoloop.checks import UserError
from nanoloop.files import check_writable, wait_for_file
from nanoloop.tables import align

VALUES = (
    'loss',
    'loss_se',
    'ppl',
    'bpb',
    'accuracy',
    'accuracy_se',
    'centered',
    'seed_sd',
    'items',
    'tokens',
)
COLUMNS = ('task', 'loops', 'policy', *VALUES, 'mean_loops', 'flops_per_token', 'seconds', 'note', 'settings')
COLUMNS += ('dtype', 'step', 'run', 'checkpoint')
KEY = ('task', 'loops', 'policy', 'settings', 'dtype', 'step')  # two lines with the same ones are the same

AVERAGED = '-ema'  # behind the run, and behind the name of the file, of results of the weights' average

SHOWN = dict(  # {title: (column, its standard error, format)} of the printed table
    loss=('loss', 'loss_se', '.4f'),
    ppl=('ppl', None, '.3f'),
    bpb=('bpb', None, '.4f'),
    accuracy=('accuracy', 'accuracy_se', '.4f'),
    centered=('centered', None, '.4f'),
    loops=('mean_loops', None, '.2f'),
)


def run_id(checkpoint):
    """Returns what is the same for all checkpoints of a run: its id, or a hash of weights if it has none.

    The average of the weights is as another run.
    """
    if checkpoint.get('weights') == 'ema':
        return run_id(checkpoint | dict(weights='raw')) + AVERAGED
    if checkpoint.get('wandb_id'):
        return checkpoint['wandb_id']
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint['model'].items()):
        digest.update(f'{name} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.flatten()[:1024].float().numpy().tobytes())
    return digest.hexdigest()[:8]


def csv_beside(checkpoint):
    """Returns the path of eval.csv for a checkpoint: in its folder; here, with its name, if it has none.

    It is eval-ema.csv for the average of the weights.
    """
    path = Path(checkpoint['path'])
    name = f'eval{AVERAGED}.csv' if checkpoint.get('weights') == 'ema' else 'eval.csv'
    if path.is_dir():
        return path / name
    return path.parent / name if path.is_file() else Path(f'eval-{path.name}.csv')


class Results:
    """The lines of an eval.csv: dicts of texts. run: the run_id that all of them must have.

    Raises UserError for a file that is not one of eval.py, or of another run.
    """

    def __init__(self, path, run):
        self.path, self.run, self.rows = Path(path), run, []
        if not self.path.parent.is_dir():
            raise UserError(f'csv={str(path)!r}, expected a file in a folder that exists')
        check_writable(self.path, 'csv')
        if self.path.exists():
            self.rows = read_csv(self.path)
        others = {row['run'] for row in self.rows} - {run}
        if others:
            checkpoint = next(row['checkpoint'] for row in self.rows if row['run'] in others)
            raise UserError(
                f'{path} has results of another run ({checkpoint}): --csv=FILE names another file'
            )

    def find(self, row):
        """Returns the finished line with the KEY of a row, the last one if there are several, else None."""
        wanted = [as_text(row.get(column)) for column in KEY]
        return next((old for old in reversed(self.rows) if [old[column] for column in KEY] == wanted), None)

    def add(self, row):
        """Adds a row, {column: value}. Returns it as a line."""
        self.rows.append({column: as_text(row.get(column)) for column in COLUMNS})
        return self.rows[-1]

    def write(self, line):
        """Appends a line to the file, in one write."""
        text = io.StringIO(newline='')
        writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
        with open(self.path, 'a+b', buffering=0) as file:
            wait_for_file(file)  # another process may be writing a line
            cut_half_line(file)
            if not os.fstat(file.fileno()).st_size:
                writer.writeheader()
            writer.writerow(line)
            file.write(text.getvalue().encode())


def cut_half_line(file):
    """Removes what follows the last line end of an open file, from a machine that failed while it wrote."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b'\n') + 1)
    file.seek(0, os.SEEK_END)


def read_csv(path):
    """Returns the lines of an eval.csv, dicts of texts. Raises UserError if it is none."""
    try:
        content, _, _ = path.read_text().rpartition('\n')
        rows = list(csv.DictReader(io.StringIO(content)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} cannot be read: {error}') from None
    missing = [column for column in COLUMNS if any(row.get(column) is None for row in rows)]
    if missing:
        raise UserError(f'{path} is not a table of eval.py, it has no column {", ".join(missing)}')
    return rows


def as_text(value):
    """Returns a value of a row as text: floats with 8 digits, None as ''."""
    if value is None:
        return ''
    return f'{value:.8g}' if isinstance(value, float) else str(value)


# -----------------------------------------------------------------------------
# the printed table


def format_table(rows):
    """Returns the lines of a table of results, aligned: what was measured, with standard errors."""
    titles = [title for title, (column, *_) in SHOWN.items() if any(row[column] for row in rows)]
    before = None
    lines = [['task', 'n_loop', 'policy', *titles, 'items', 'GFLOP/token', 'note']]
    for row in rows:
        gflops = f'{float(row["flops_per_token"]) / 1e9:.4g}' if row['flops_per_token'] else ''
        values = [format_value(row, *SHOWN[title]) for title in titles]
        same = row['task'].partition('/')[0], row['note']  # a note is shown where it changes
        note, before = '' if same == before else row['note'], same
        lines.append([row['task'], row['loops'], row['policy'], *values, row['items'], gflops, note])
    return align(lines)


def format_value(row, column, error, form):
    """Returns a value of a line with its standard error, as `2.1034 +- 0.0051`; '' if there is none."""
    if not row[column]:
        return ''
    text = format(float(row[column]), form)
    return f'{text} +- {float(row[error]):{form}}' if error and row[error] not in ('', 'nan') else text


def against_one_loop(rows, n_loop):
    """Returns what the loops give: a line per task that has results for one loop and for more.

    n_loop: the number of loops of the model, which is compared with 1; the most of the rows if they lack it.
    """
    lines = []
    for task in dict.fromkeys(row['task'] for row in rows if '/' not in row['task']):
        plain = {int(row['loops']): row for row in rows if row['task'] == task and not row['policy']}
        if len(plain) < 2 or 1 not in plain:
            continue
        most = n_loop if n_loop in plain and n_loop > 1 else max(plain)
        column = next(name for name in ('accuracy', 'loss', 'ppl', 'centered') if plain[1][name])
        one, all_loops = float(plain[1][column]), float(plain[most][column])
        values = f'{one:.4f} with 1 loop, {all_loops:.4f} with {most}: {all_loops - one:+.4f}'
        lines.append(f'{task}: {column} {values}')
    return lines
