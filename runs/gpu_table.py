"""
Prints the table of runs/gpu_check.sh, in Markdown, from what its steps have left in a folder.

    python runs/gpu_table.py out-gpu-check

Ends with status 1 if a step failed. A step NAME leaves NAME.status and NAME.log, bench.py's results in
NAME.jsonl, and pytest's in NAME.xml.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # ours come first, also with python -P
from nanoloop.run_folder import git_commit


def step_time(result):
    """Returns the text for a result of training: time and MFU."""
    mfu = 'n/a' if result['mfu'] is None else f'{result["mfu"]:.1%}'
    return f'{result["ms"]:.1f} ms, MFU {mfu}, {result["memory_mib"] / 1024:.1f} GiB'


def ratio(results, key, of, to):
    """Returns the text for results[of][key] / results[to][key]."""
    return f'{results[of][key] / results[to][key]:.3f}'


def speed(results, rows, way):
    """Returns the text for a way of decoding with the smallest or largest number of rows (0 or -1)."""
    n_rows = sorted({result['rows'] for result in results})[rows]
    found = [result for result in results if result['rows'] == n_rows and result['name'] == way]
    if not found:
        return 'not measured'
    return f'{found[0]["tokens_per_s"]:,.0f} tokens/s, MBU {found[0]["mbu"]:.1%} ({n_rows} rows)'


TESTS = 'tests_training', 'tests_windows', 'tests_decoding'  # steps of pytest
# (step, name, wanted, function: the step's results -> value); the first result is `this` of bench.py
ROWS = [
    ('gpt2', 'a step of config/train_gpt2.py', 'MFU 45 % or more', lambda r: step_time(r[0])),
    ('looped', 'a step of config/train_gpt2_looped.py', 'MFU 45 % or more', lambda r: step_time(r[0])),
    ('looped', 'FLOP/s, looped / plain', '0.95 or more', lambda r: ratio(r, 'tflops_per_s', 0, 1)),
    (
        'medium',
        'a step of 350M parameters, 8 + 8x4 + 8 layers',
        'MFU 45 % or more',
        lambda r: step_time(r[0]),
    ),
    ('window', 'time, full attention / windows of 512 in 8,192', 'above 1', lambda r: ratio(r, 'ms', 1, 0)),
    ('recompute', 'memory, recompute / not', 'below 1', lambda r: ratio(r, 'memory_mib', 1, 0)),
    ('recompute', 'time, recompute / not', '', lambda r: ratio(r, 'ms', 1, 0)),
    ('decode', 'decoding one row', '', lambda r: speed(r, 0, 'cached')),
    ('decode', 'decoding one row, compiled', '', lambda r: speed(r, 0, 'compiled')),
    ('decode', 'decoding 64 rows', '', lambda r: speed(r, -1, 'cached')),
    ('decode', 'decoding 64 rows, compiled', '', lambda r: speed(r, -1, 'compiled')),
]


def failure(folder, step):
    """Returns FAILED and the last line that a step has printed; '' if it did not fail."""
    status = folder / f'{step}.status'
    code = int(status.read_text()) if status.exists() else None
    if code == 0:
        return ''
    log = folder / f'{step}.log'
    lines = log.read_text(errors='replace').split('\n') if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), 'nothing was printed')
    return f'FAILED: {"out of time, " * (code == 124)}{last}'


def read_results(folder, step):
    """Returns the results in NAME.jsonl, dicts; [] without such a file."""
    path = folder / f'{step}.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def outcome(case):
    """Returns the text for a test case of pytest's XML: what it has measured, passed, skipped or FAILED."""
    for kind, word in (('failure', 'FAILED'), ('error', 'FAILED'), ('skipped', 'skipped')):
        for element in case.iter(kind):
            return f'{word}: {(element.get("message") or "").strip().split(chr(10))[0]}'
    return properties(case).get('value', 'passed')


def properties(case):
    """Returns what a test case gave to record_property, {name: value}."""
    return {element.get('name'): element.get('value') for element in case.iter('property')}


def test_rows(folder):
    """Yields (name, value, wanted) of every test function, or one row for a group that did not run."""
    functions = {}
    for group in TESTS:
        path = folder / f'{group}.xml'
        if not path.exists():
            fault = failure(folder, group) or f'FAILED: no {path.name}'
            yield f'tests/test_cuda.py, {group}', fault, 'passed'
            continue
        for case in ElementTree.parse(path).iter('testcase'):
            functions.setdefault(case.get('name').partition('[')[0], []).append(case)
    for name, cases in functions.items():
        outcomes = list(map(outcome, cases))
        value = next((text for text in outcomes if text.startswith('FAILED')), outcomes[0])
        value += f' ({len(cases)} cases)' if len(cases) > 1 else ''
        wanted = properties(cases[0]).get('wanted', 'passed')
        yield name.removeprefix('test_').replace('_', ' '), value, wanted


def bench_rows(folder):
    """Yields (name, value, wanted) of what bench.py has measured."""
    for step, name, wanted, value_of in ROWS:
        results, failed = read_results(folder, step), failure(folder, step)
        yield name, failed or (value_of(results) if results else 'FAILED: no results'), wanted


def main(folder):
    rows = [*test_rows(folder), *bench_rows(folder)]
    results = [result for step, *_ in ROWS for result in read_results(folder, step)]
    device = results[0]['device'] if results else 'unknown'
    torch, commit = version('torch'), (git_commit() or 'unknown')[:8]
    place = f'{device} | {torch} | {commit}'
    print('| what | value | wanted | device | torch | commit |\n|---|---|---|---|---|---|')
    for row in rows:
        print('|', ' | '.join(text.replace('|', '/') for text in row), '|', place, '|')
    values = [value for _, value, _ in rows] + [failure(folder, group) for group in TESTS]
    return int(any(value.startswith('FAILED') for value in values))


if __name__ == '__main__':
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
