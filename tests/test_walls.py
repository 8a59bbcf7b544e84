"""The walls between the rooms of the house (CONTRIBUTING.md) and the sizes of files, read from the sources.

A check is a function of sources, {path: text}. It returns what is broken, as lines `path:line what`. Every
check is tried on small sources first, then on the repository's.
"""

import ast
import io
import re
import tokenize

import pytest
from helpers import ROOT

FOLDERS = ('', 'nanoloop/', 'nanoloop/*/', 'data/*/', 'runs/', 'config/')  # tests/ may name devices and print
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FOLDERS
    for path in sorted(ROOT.glob(f'{folder}*.py'))
}


def nodes_of(text):
    """Returns the nodes of a source's syntax tree that have a line, in the order of their lines."""
    nodes = [node for node in ast.walk(ast.parse(text)) if hasattr(node, 'lineno')]
    return sorted(nodes, key=lambda node: node.lineno)


def imports(path, text):
    """Returns [(line, dotted name)] of all imports, also those in functions: a.b for `from a import b`."""
    found = []
    for node in nodes_of(text):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            folders = path.split('/')[:-1]
            parents = folders[: len(folders) + 1 - node.level] if node.level else []
            module = [*parents, node.module] if node.module else parents
            found += [(node.lineno, '.'.join([*module, alias.name])) for alias in node.names]
    return found


def is_in(name, module):
    """Returns whether a dotted name is a module, or something in it."""
    return f'{name}.'.startswith(f'{module}.')


def module_of(path):
    """Returns the name of a file for import: nanoloop.checks, or nanoloop for nanoloop/__init__.py."""
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def calls(node, function):
    """Returns whether a node calls a function by its plain name."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function


def check_all(check):
    """Fails with the lines that a check returns for the repository."""
    broken = check(SOURCES)
    assert not broken, '\n' + '\n'.join(broken)


def test_the_sources_are_found():
    expected = {'model.py', 'train.py', 'configurator.py', 'nanoloop/machine.py', 'nanoloop/parallel.py'}
    assert expected | {'data/text/prepare.py', 'runs/recipes.py', 'config/quickstart.py'} <= SOURCES.keys()


# -----------------------------------------------------------------------------
# wall 1: model.py knows no files, no decoding, no argv, and imports nothing of ours but nanoloop/checks.py

FILE_MODULES = 'argparse io json os pathlib pickle shutil subprocess sys tempfile'.split()


def broken_wall_1(sources):
    path, text = 'model.py', sources['model.py']
    ours = {module_of(other).split('.')[0] for other in sources}
    broken = []
    for line, name in imports(path, text):
        top = name.split('.')[0]
        if top in FILE_MODULES or (top in ours and not is_in(name, 'nanoloop.checks')):
            broken.append(f'{path}:{line} imports {name}')
    return broken + [f'{path}:{node.lineno} opens a file' for node in nodes_of(text) if calls(node, 'open')]


@pytest.mark.parametrize(
    'text, broken',
    [
        ('import torch\nfrom nanoloop import checks\nfrom nanoloop.checks import check\n', []),
        ('import nanoloop.checks\nimport samples\n', []),
        ('from nanoloop import ROOT\n', ['1 imports nanoloop.ROOT']),
        ('import nanoloop\n', ['1 imports nanoloop']),
        ('from nanoloop import checks, decode\n', ['1 imports nanoloop.decode']),
        ('def f():\n    import nanoloop.decode\n', ['2 imports nanoloop.decode']),
        ('from .nanoloop import decode\n', ['1 imports nanoloop.decode']),
        ('import sample as s\n', ['1 imports sample']),
        ('from . import sample\n', ['1 imports sample']),
        ('from pathlib import Path\n', ['1 imports pathlib.Path']),
        ('import sys\n', ['1 imports sys']),
        ("x = open('a')\n", ['1 opens a file']),
    ],
)
def test_the_check_of_wall_1(text, broken):
    others = {'sample.py': '', 'nanoloop/__init__.py': '', 'nanoloop/checks.py': '', 'nanoloop/decode.py': ''}
    assert broken_wall_1({'model.py': text, **others}) == [f'model.py:{line}' for line in broken]


def test_wall_1_the_model_stands_alone():
    check_all(broken_wall_1)


# -----------------------------------------------------------------------------
# wall 4: torch.distributed, signals and device names appear in three files only

MACHINE_FILES = ('nanoloop/machine.py', 'nanoloop/parallel.py', 'nanoloop/signals.py')
MACHINE_MODULES = ('signal', 'torch.distributed', 'torch.nn.parallel', 'torch.cuda', 'torch.mps')
MACHINE_NAMES = ('DistributedDataParallel', 'distributed', 'cuda', 'mps', 'is_cuda', 'is_mps')
DEVICE = re.compile('(cuda|mps|nccl|gloo)(:.*)?')  # of a whole string: a text may mention a device


def broken_wall_4(sources):
    broken = []
    for path, text in sources.items():
        if path in MACHINE_FILES:
            continue
        for line, name in imports(path, text):
            if any(is_in(name, module) for module in MACHINE_MODULES):
                broken.append(f'{path}:{line} imports {name}')
        for node in nodes_of(text):
            if isinstance(node, ast.Attribute) and node.attr in MACHINE_NAMES:
                broken.append(f'{path}:{node.lineno} names {node.attr}')
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and DEVICE.fullmatch(node.value)
            ):
                broken.append(f'{path}:{node.lineno} names {node.value}')
    return broken


@pytest.mark.parametrize(
    'text, broken',
    [
        ("device = 'auto'  # auto, cpu, cuda, cuda:N, mps\nsignals = ['cpu']\n", []),
        ("'cuda, mps, nccl, gloo and the like'\nm.device.type == 'cpu'\n", []),
        ('import signal\n', ['1 imports signal']),
        ('def f():\n    from signal import SIGTERM\n', ['2 imports signal.SIGTERM']),
        ('import torch.distributed as dist\n', ['1 imports torch.distributed']),
        ('from torch import distributed\n', ['1 imports torch.distributed']),
        ('torch.distributed.barrier()\n', ['1 names distributed']),
        ('torch.nn.parallel.DistributedDataParallel(f)\n', ['1 names DistributedDataParallel']),
        ("if kind == 'cuda':\n    pass\n", ['1 names cuda']),
        ("f(device='cuda:0')\n", ['1 names cuda:0']),
        ("f'cuda:{n}'\n", ['1 names cuda:']),
        ("kinds = ('mps', 'cpu')\n", ['1 names mps']),
        ("backend = 'nccl' if gpu else 'gloo'\n", ['1 names nccl', '1 names gloo']),
        ('torch.cuda.synchronize()\n', ['1 names cuda']),
        ('x.is_cuda\n', ['1 names is_cuda']),
    ],
)
def test_the_check_of_wall_4(text, broken):
    sources = {'bench.py': text, 'nanoloop/machine.py': text, 'nanoloop/parallel.py': text}
    assert broken_wall_4(sources) == [f'bench.py:{line}' for line in broken]


def test_wall_4_the_machine_is_in_its_room():
    check_all(broken_wall_4)


# -----------------------------------------------------------------------------
# wall 6: only scripts read argv and print; nanoloop/ and model.py import no script; there is no import cycle


def is_part(path):
    return path == 'model.py' or path.startswith('nanoloop/')


def broken_wall_6(sources):
    scripts = [module_of(path) for path in sources if not is_part(path)]
    broken = []
    for path in filter(is_part, sources):
        for line, name in imports(path, sources[path]):
            if name == 'sys.argv' or any(is_in(name, script) for script in scripts):
                broken.append(f'{path}:{line} imports {name}')
        for node in nodes_of(sources[path]):
            if calls(node, 'print'):
                broken.append(f'{path}:{node.lineno} prints')
            if isinstance(node, ast.Attribute) and node.attr == 'argv':
                broken.append(f'{path}:{node.lineno} reads argv')
    return broken


@pytest.mark.parametrize('path', ['model.py', 'nanoloop/decode.py'])
@pytest.mark.parametrize(
    'text, broken',
    [
        ('import sys\nfrom nanoloop.checks import check\nsay("print")\nsys.exit(1)\n', []),
        ('import samples\nimport model\n', []),
        ('print(1)\n', ['1 prints']),
        ('def f():\n    if x:\n        print(1, file=sys.stderr)\n', ['3 prints']),
        ('import sys\nsys.argv[1:]\n', ['2 reads argv']),
        ('from sys import argv\n', ['1 imports sys.argv']),
        ('def f():\n    from sample import main\n', ['2 imports sample.main']),
        ('import data.text.prepare\n', ['1 imports data.text.prepare']),
    ],
)
def test_the_check_of_wall_6(path, text, broken):
    others = {
        'sample.py': 'print(sys.argv)\n',
        'data/text/prepare.py': 'print(1)\n',
        'nanoloop/checks.py': '',
    }
    assert broken_wall_6({path: text, **others}) == [f'{path}:{line}' for line in broken]


def test_wall_6_only_scripts_print_and_read_argv():
    check_all(broken_wall_6)


def import_cycle(sources):
    """Returns the files of a cycle of imports, from one back to itself, and [] if there is none."""
    files = {module_of(path): path for path in sources}
    graph = {path: set() for path in sources}
    for path, text in sources.items():
        for _, name in imports(path, text):
            prefixes = [name.rsplit('.', i)[0] for i in range(name.count('.') + 1)]  # a.b.c, a.b, a
            graph[path].add(next((files[prefix] for prefix in prefixes if prefix in files), path))
    done = set()

    def search(path, chain):
        if path in chain:
            return [*chain[chain.index(path) :], path]
        if path in done:
            return []
        cycles = [search(other, [*chain, path]) for other in sorted(graph[path] - {path})]
        done.add(path)
        return next(filter(None, cycles), [])

    return next(filter(None, (search(path, []) for path in sources)), [])


def test_the_check_of_import_cycles():
    tree = {'a.py': 'import b\nimport nanoloop.c', 'b.py': 'from nanoloop.c import f', 'nanoloop/c.py': ''}
    assert import_cycle(tree) == []
    deferred = tree | {'nanoloop/c.py': 'def f():\n    from b import g'}
    assert import_cycle(deferred) == ['b.py', 'nanoloop/c.py', 'b.py']
    package = {'nanoloop/__init__.py': 'from . import d', 'nanoloop/d.py': 'from nanoloop import ROOT'}
    assert import_cycle(package) == ['nanoloop/__init__.py', 'nanoloop/d.py', 'nanoloop/__init__.py']


def test_wall_6_no_import_cycle():
    check_all(import_cycle)


# -----------------------------------------------------------------------------
# sizes, which are consequences of good cuts: comments, shapes and blank lines are never saved for them

LIMITS = {'model.py': 400, 'train.py': 450}  # the former counts lines of code
FILE_LIMIT, FUNCTION_LIMIT = 350, 50
NO_CODE = ('COMMENT', 'NL', 'NEWLINE', 'INDENT', 'DEDENT', 'ENDMARKER')
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def lines_of_code(text):
    """Returns the number of lines that hold more than comments and docstrings."""
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            code -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(code)


def too_long(sources):
    broken = []
    for path, text in sources.items():
        size = lines_of_code(text) if path == 'model.py' else len(text.splitlines())
        limit = LIMITS.get(path, FILE_LIMIT)
        if size > limit:
            broken.append(f'{path} has {size} lines, at most {limit}')
        for node in nodes_of(text):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > FUNCTION_LIMIT:
                    what = f'{node.name} has {size} lines, at most {FUNCTION_LIMIT}'
                    broken.append(f'{path}:{node.lineno} {what}')
    return broken


MANY_KINDS = '''"""A
docstring."""

# a comment
text = """no
docstring"""  # 2 lines


class A:
    """Doc."""

    def f(self):
        """Doc.

        More."""
        return (  # 3 lines of code, one of a comment
            # why
            1
        )
'''


def test_lines_of_code_are_more_than_comments_docstrings_and_blanks():
    assert lines_of_code(MANY_KINDS) == 2 + 1 + 1 + 3


@pytest.mark.parametrize(
    'path, text, broken',
    [
        ('model.py', 400 * 'x = 1\n' + 100 * '# why\n\n', []),
        ('model.py', 401 * 'x = 1\n', ['model.py has 401 lines, at most 400']),
        ('train.py', 450 * '\n', []),
        ('train.py', 451 * '# why\n', ['train.py has 451 lines, at most 450']),
        ('nanoloop/a.py', 350 * 'x = 1\n', []),
        ('nanoloop/a.py', 351 * '\n', ['nanoloop/a.py has 351 lines, at most 350']),
        ('a.py', 'def f():\n' + 49 * '    x = 1\n', []),
        ('a.py', 'def f():\n' + 49 * '    # why\n' + '    x = 1\n', ['a.py:1 f has 51 lines, at most 50']),
        (
            'a.py',
            'class A:\n    async def f(self):\n' + 50 * '        x = 1\n',
            ['a.py:2 f has 51 lines, at most 50'],
        ),
    ],
)
def test_the_check_of_sizes(path, text, broken):
    assert too_long({path: text}) == broken


def test_files_and_functions_are_short():
    check_all(too_long)


# -----------------------------------------------------------------------------
# what every script has in common, and every hint for a missing package


PIP = re.compile(r'pip install(?! -e (?:"\.\[\w+\]"|"\.\[{extra}\]"))')  # all but what missing_package says


def hints_for_packages(sources):
    """Returns [(where, extra, package)] of the calls missing_package(what, extra, package).

    package is None where it is computed.
    """
    return [
        (
            f'{path}:{node.lineno}',
            *(arg.value if isinstance(arg, ast.Constant) else None for arg in node.args[1:]),
        )
        for path, text in sources.items()
        for node in nodes_of(text)
        if calls(node, 'missing_package')
    ]


def test_the_check_of_hints():
    text = "missing_package(x, 'data', 'tiktoken')\nmissing_package(x, 'data', error[0])\n"
    assert hints_for_packages({'a.py': text}) == [('a.py:1', 'data', 'tiktoken'), ('a.py:2', 'data', None)]
    assert PIP.search('pip install wandb') and not PIP.search('pip install -e ".[plot]"')


def test_every_hint_for_a_missing_package_names_the_extra_that_has_it():
    project = (ROOT / 'pyproject.toml').read_text().split('optional-dependencies]')[1]
    extras = {
        name: re.findall('"([^"]*)"', packages)
        for name, packages in re.findall(r'^(\w+) = \[([^\]]*)\]', project, re.MULTILINE)
    }
    hints = hints_for_packages(SOURCES)
    assert len(hints) >= 8 and not [path for path, text in SOURCES.items() if PIP.search(text)]
    for where, extra, package in hints:
        assert extra in extras and (package is None or package in extras[extra]), where


def test_every_script_finds_the_program_before_other_packages_of_the_same_names():
    """python -P, or PYTHONSAFEPATH, leaves the script's folder out of sys.path."""
    ours = {module_of(path).split('.')[0] for path in SOURCES}
    scripts = [path for path, text in SOURCES.items() if "__name__ == '__main__'" in text]
    assert {'train.py', 'sample.py', 'bench.py', 'export.py', 'plot.py', 'data/text/prepare.py'} <= set(
        scripts
    )
    for path in scripts:
        first = min(line for line, name in imports(path, SOURCES[path]) if name.split('.')[0] in ours)
        up = '.parent)' if '/' not in path else f'.parents[{path.count("/")}])'
        insert = f'sys.path.insert(0, str(Path(__file__).resolve(){up})'
        lines = SOURCES[path].splitlines()
        assert insert in '\n'.join(lines[: first - 1]), path
        assert not any(is_in(name, 'data') for _, name in imports(path, SOURCES[path])), path
