"""Links of README.md and of the pages beside it lead somewhere, and their commands have keys that exist."""

import re
import shlex

import pytest

from bench import BenchConfig
from chat import ChatConfig
from configurator import configure
from eval import EvalConfig
from export import ExportConfig
from model import GPTConfig
from nanoloop import ROOT
from nanoloop.chat.settings import Settings
from nanoloop.checks import hints_of
from nanoloop.rl import RLConfig
from plot import PlotConfig
from sample import SampleConfig
from train import TrainConfig

DOCS = sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))
# the commands of results.md are those of the commits that it names
PAGES = ['README.md', 'CONTRIBUTING.md', *DOCS, 'runs/README.md', 'runs/results.md']
CLASSES = {
    'train.py': (TrainConfig, RLConfig, GPTConfig),
    'sample.py': (SampleConfig,),
    'bench.py': (BenchConfig, TrainConfig, GPTConfig),
    'eval.py': (EvalConfig,),
    'export.py': (ExportConfig,),
    'plot.py': (PlotConfig,),
    'chat.py': (ChatConfig, Settings),
}
KEYS = {key for classes in CLASSES.values() for cls in classes for key in hints_of(cls)}
SOURCES = [path for name in ('data', 'runs', 'tests', 'nanoloop') for path in (ROOT / name).rglob('*.py')]
TEXT = '\n'.join(path.read_text() for path in SOURCES)
ARGPARSE = {name for pair in re.findall(r"'-?-?([\w-]+)'|(\w+)=dict\(", TEXT) for name in pair}
FOREIGN = """nproc_per_node nnodes node_rank master_addr master_port standalone max-restarts signals-to-handle
nodes signal array partition account time no-sync no-deps check model model_args tasks help""".split()
PLACEHOLDER = re.compile(r'\$|^\.\.\.|^[A-Z]+$|--help|--key=|=[A-Z]$')


def slug(heading):
    """Returns the anchor that GitHub gives to a heading."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def anchors(path):
    return {slug(line.lstrip('# ')) for line in path.read_text().splitlines() if line.startswith('#')}


def code(page):
    """Returns the pieces of code of a page: the lines of its blocks, and the text between backticks."""
    parts = re.split(r'^```.*$', (ROOT / page).read_text(), flags=re.MULTILINE)
    lines = [line for block in parts[1::2] for line in block.splitlines()]
    return lines + [span for text in parts[::2] for span in re.findall(r'`([^`\n]+)`', text)]


def commands(page):
    """Yields (path of a script, its arguments) of every command of a page that runs a script of Python."""
    for line in code(page):
        for part in line.split(' && '):
            match = re.search(r'(?:^|\s)(?:python|torchrun|run)\b.*?\s([\w/]+\.py)(\s.*|$)', part)
            if match and 'NAME' not in match[1]:
                argv = shlex.split(match[2], comments=True)
                yield match[1], [arg for arg in argv if not PLACEHOLDER.search(arg)]


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if not target.startswith('http'):
            name, _, anchor = target.partition('#')
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize('page', PAGES[:-1])
def test_commands_have_scripts_and_keys_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, argv in commands(page):
        assert (ROOT / script).exists(), script
        if script in CLASSES:
            configure(CLASSES[script], argv, say=None)
    for flag in re.findall(r'(?<![\w-])--([\w-]+)', '\n'.join(code(page))):
        assert flag in KEYS | ARGPARSE | {*FOREIGN, 'key'}, flag


def test_commands_are_found():
    found = [script for page in PAGES for script, _ in commands(page)]
    assert set(CLASSES) <= set(found) and found.count('train.py') > 15


def test_every_part_is_in_the_list_of_files():
    page = (ROOT / 'CONTRIBUTING.md').read_text()
    listed = re.findall(r'`(\w+\.py)`', page[page.index('## The files of nanoloop') :])
    parts = {path.name for path in (ROOT / 'nanoloop').glob('*.py')}
    assert parts - set(listed) == {'__init__.py', 'model.py', 'nanoloop.py'}
