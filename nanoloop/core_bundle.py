"""
The files of CORE: core.yaml (the tasks), eval_meta_data.csv (the accuracies of random answers) and
eval_data/*/*.jsonl (the questions), in the layout of nanochat's evaluation bundle. Needs no torch.

CORE: DataComp-LM, arXiv:2406.11794.
"""

import csv
import hashlib
import http.client
import io
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from nanoloop.checks import UserError, check, missing_package
from nanoloop.files import cache_folder, lock_folder, sync_folder
from nanoloop.tables import read_jsonl
from nanoloop.tokenizer import read_text

BUNDLE_URL = 'https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip'
BUNDLE = 'eval_bundle'  # the folder in it
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
SECONDS = 60  # without an answer


class Task(NamedTuple):
    """A task of core.yaml."""

    label: str
    path: Path  # of its questions
    kind: str  # see KINDS
    n_shots: int  # answered questions in front of each question
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of random answers, from 0 to below 1


class Fields(NamedTuple):
    """The fields of a question: texts, and a list of texts of which the number `gold` is right, or None."""

    texts: tuple
    options: str | None


KINDS = dict(
    multiple_choice=Fields(('query',), 'choices'),
    schema=Fields(('continuation',), 'context_options'),
    language_modeling=Fields(('context', 'continuation'), None),
)

# -----------------------------------------------------------------------------
# the folder


def find_bundle(folder, say):
    """Returns the folder of the bundle, downloaded if `folder` is '' and it is not in the cache.

    Raises UserError if there is no such folder, or the network cannot be reached.
    """
    if folder:
        folder = Path(folder).expanduser()
        check(folder.is_dir(), 'core_dir', str(folder), "a folder; '' downloads the data of CORE")
        return folder
    cache = cache_folder()
    if not (cache / BUNDLE).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(cache, 'a second download', say, wait=True)
        try:
            if not (cache / BUNDLE).is_dir():  # another process may have been faster
                say(f'downloading {BUNDLE_URL} (about 162 MB) to {cache / BUNDLE}')
                download_bundle(cache)
        finally:
            if lock:
                lock.close()
    return cache / BUNDLE


def download_bundle(cache):
    """Downloads and unpacks the bundle: the folder BUNDLE in cache is complete or absent."""
    help_line = f'download and unpack it elsewhere, --core_dir=FOLDER names its folder {BUNDLE}'
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        archive = Path(temporary) / 'bundle.zip'
        try:
            with urllib.request.urlopen(BUNDLE_URL, timeout=SECONDS) as answer, open(archive, 'wb') as file:
                shutil.copyfileobj(answer, file)
        except NETWORK_ERRORS as error:
            reason = getattr(error, 'reason', '') or error
            raise UserError(
                f'the data of CORE, {BUNDLE_URL}, cannot be reached ({reason}): {help_line}'
            ) from None
        try:
            with zipfile.ZipFile(archive) as content:
                content.extractall(temporary)
        except zipfile.BadZipFile as error:
            raise UserError(f'{BUNDLE_URL} came incomplete ({error}): try again, or {help_line}') from None
        if not (Path(temporary) / BUNDLE / 'core.yaml').is_file():
            raise UserError(f'{BUNDLE_URL} has no {BUNDLE}/core.yaml: {help_line}')
        os.rename(Path(temporary) / BUNDLE, cache / BUNDLE)
    sync_folder(cache)


# -----------------------------------------------------------------------------
# the tasks


def read_tasks(folder):
    """Returns the Tasks of a bundle. Raises UserError for a missing or broken core.yaml or csv file."""
    for name in ('core.yaml', 'eval_meta_data.csv'):
        check((folder / name).is_file(), 'core_dir', str(folder), f'a folder with {name}')
    path = folder / 'core.yaml'
    content = read_yaml(path)
    entries = content.get('icl_tasks') if isinstance(content, dict) else None
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise UserError(f'{path}: expected icl_tasks, a list of tasks')
    baselines = read_baselines(folder / 'eval_meta_data.csv')
    tasks = [read_entry(entry, number, folder, baselines) for number, entry in enumerate(entries, 1)]
    labels = [task.label for task in tasks]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    check(not twice, f'{path}: label', ' '.join(twice), 'a label for each task')
    return tasks


def read_yaml(path):
    """Returns the content of a YAML file. Raises UserError if it is none."""
    try:
        import yaml
    except ImportError:
        raise missing_package('CORE', 'eval', 'pyyaml') from None
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f'{path} is no YAML: {" ".join(str(error).split())}') from None


def read_entry(entry, number, folder, baselines):
    """Returns the Task of an entry of core.yaml, a dict. Raises UserError for a value of a wrong type."""
    where = f'{folder / "core.yaml"}, task {number}'
    entry = {'continuation_delimiter': ' '} | entry
    for key in ('label', 'dataset_uri', 'icl_task_type', 'continuation_delimiter'):
        check(isinstance(entry.get(key), str) and entry[key], f'{where}: {key}', entry.get(key), 'a text')
    label, kind, shots = entry['label'], entry['icl_task_type'], entry.get('num_fewshot')
    plain = re.fullmatch(r'[\w.-]+', label)  # labels stand in names of rows and in lists of them
    check(plain, f'{where}: label', label, 'letters, digits, _ . and -')
    where = f'{folder / "core.yaml"}, {label}'
    check(kind in KINDS, f'{where}: icl_task_type', kind, f'one of {", ".join(KINDS)}')
    fits = isinstance(shots, list) and shots and type(shots[0]) is int and shots[0] >= 0
    check(fits, f'{where}: num_fewshot', shots, 'a list that begins with the number of shots, such as [10]')
    table, path = folder / 'eval_meta_data.csv', folder / 'eval_data' / entry['dataset_uri']
    if label not in baselines:
        raise UserError(f'{table}: expected a row for the task {label}')
    baseline = read_percent(baselines[label], f'{table}: Random baseline of {label}')
    return Task(label, path, kind, shots[0], entry['continuation_delimiter'], baseline)


def read_baselines(path):
    """Returns {task: accuracy of random answers in percent, a text} of eval_meta_data.csv."""
    columns = ['Eval Task', 'Random baseline']
    table = csv.DictReader(io.StringIO(read_text(path), newline=''))
    names = table.fieldnames or []
    if not set(columns) <= set(names):
        raise UserError(f'{path}: expected the columns {" and ".join(columns)}, got {", ".join(names)[:200]}')
    try:
        return {row[columns[0]]: row[columns[1]] for row in table}
    except csv.Error as error:
        raise UserError(f'{path} is no table: {error}') from None


def read_percent(text, where):
    """Returns a share, at least 0 and below 1, from a text in percent. Raises UserError for another text."""
    try:
        share = float(text or 'nothing') / 100
    except ValueError:
        share = -1.0
    check(0 <= share < 1, where, text, 'percent, at least 0 and below 100')
    return share


# -----------------------------------------------------------------------------
# the questions


def read_questions(task):
    """Returns the questions of a Task, a dict each. Raises UserError for a field of a wrong type."""
    rows = read_jsonl(task.path)
    for number, row in enumerate(rows, 1):
        problem = find_problem(row, KINDS[task.kind])
        if problem:
            raise UserError(f'{task.path}, question {number}: expected {problem}')
    if len(rows) <= task.n_shots:
        raise UserError(f'{task.path} has {len(rows)} questions, expected more than its {task.n_shots} shots')
    return rows


def find_problem(row, fields):
    """Returns what a question lacks to have all fields, '' if it has them."""
    for name in fields.texts:
        if not isinstance(row.get(name), str):
            return f'{name}, a text'
    if fields.options is None:
        return '' if row['continuation'].strip() else 'continuation, a text that is not blank'
    options, gold = row.get(fields.options), row.get('gold')
    if not (isinstance(options, list) and len(options) > 1 and all(isinstance(o, str) for o in options)):
        return f'{fields.options}, a list of two or more texts'
    if not (type(gold) is int and 0 <= gold < len(options)):
        return f'gold, the index of the right one of {len(options)} {fields.options}'
    return ''


def hash_task(task, rows):
    """Returns a short hash of all that decides the results of a task beside the flags."""
    digest = hashlib.sha256(repr((*task._replace(path=''), rows)).encode())
    return digest.hexdigest()[:8]
