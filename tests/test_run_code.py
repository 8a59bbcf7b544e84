"""Programs that do what they should not: each fails, and nothing else is harmed."""

import json
import os
import subprocess
import sys
import tempfile
import time

import pytest
from helpers import ROOT

from nanoloop.checks import UserError
from nanoloop.tasks import make_task, run_code, sandbox
from nanoloop.tasks.run_code import passes

REFERENCE = 'import math\ndef double(x):\n    return 2 * x\n\ndef add(x, y):\n    return x + y\n'
TEST = """
def check(candidate):
    assert candidate(4) == 8 and candidate(x=[1]) == [1, 1]
    assert double('a') == add('a', 'a') and math.isinf(candidate(math.inf))
"""
RIGHT = 'def double(x):\n    return 2 * x\n'


def judge(program, **options):
    return passes(program, REFERENCE, TEST, 'double', memory=2**28, **options)


@pytest.mark.parametrize(
    'program',
    [
        RIGHT,
        f"print('x' * 10**6)\n{RIGHT}",
        f'import os\nassert not os.listdir()\n{RIGHT}',
        'from collections import UserList, Counter, namedtuple\n'
        'class L(list): pass\nclass I(int): pass\n'
        'def double(x):\n    return L(2 * x) if isinstance(x, list) else I(8) if x == 4 else 2 * x\n',
        f'raise_later = 1\n{RIGHT}\ndef check(f):\n    raise RuntimeError\n',
        "import sys\nsys.setrecursionlimit(500)\nopen('/dev/null').read()\n" + RIGHT,
    ],
)
def test_a_right_function_passes(program):
    assert judge(program) is True


WRONG = {
    'a wrong value for a call by name': "def double(x):\n    return '' if x == 'a' else 2 * x\n",
    'twice the memory': f'x = bytearray(2**29)\n{RIGHT}',
    'a wrong value': 'def double(x):\n    return x\n',
    'no value': 'def double(x):\n    pass\n',
    'an error': 'def double(x):\n    raise ValueError\n',
    'no program': 'def double(x:\n',
    'a NUL': '\0',
    'half of a surrogate pair': '"\ud800"\n' + RIGHT,
    'no function': 'x = 1\n',
    'another kind of value': 'def double(x):\n    return (i for i in [x, x])\n',
    'a value that equals all': 'class A:\n    __eq__ = lambda *a: True\n    __lt__ = __eq__\n'
    'def double(x):\n    return A()\n',
    'a number that equals all': 'class A(int):\n    __eq__ = lambda *a: True\n    __hash__ = int.__hash__\n'
    'def double(x):\n    return A()\n',
    'a list without end': 'def double(x):\n    a = []\n    a.append(a)\n    return a\n',
    'exit with 0': 'import sys\nsys.exit(0)\n',
    'exit with 0 in the function': 'def double(x):\n    raise SystemExit(0)\n',
    'exit at once': 'import os\nos._exit(0)\n',
    'exit at once in the function': 'import os\ndef double(x):\n    os._exit(0)\n',
    'exit at the end': 'import atexit, os\natexit.register(os._exit, 0)\ndef double(x):\n    return x\n',
    'a result on stdout': f'print({sandbox.PASSED!r}, flush=True)\nraise SystemExit(0)\n',
    'a result on every descriptor': 'import os, pickle\ntext = pickle.dumps(True)\n'
    'text = len(text).to_bytes(8, "little") + text\nfor fd in range(64):\n    for _ in range(9):\n'
    f'        for content in (text, {sandbox.PASSED!r}.encode()):\n            try:\n'
    '                os.write(fd, content)\n            except OSError:\n                pass\nos._exit(0)\n',
    'a changed check': 'import builtins, sys\nbuiltins.AssertionError = BaseException\n'
    'def check(f):\n    pass\ndef double(x):\n    return x\n',
    'a class in the pipe': 'class A:\n    def __reduce__(self):\n        return eval, ("1",)\n'
    'import pickle, sys\npickle.dumps = lambda v, dumps=pickle.dumps: dumps(A())\n' + RIGHT,
    'a closed stdout': f'import sys\nsys.stdout.close()\n{RIGHT}',
    'a closed descriptor of stdout': f'import os\nos.close(1)\n{RIGHT}',
    'all descriptors closed': f'import os\nos.closerange(0, 64)\n{RIGHT}',
    '10 GB': f'x = bytearray(10 * 2**30)\n{RIGHT}',
    '10 GB in pieces': f'x = []\nfor _ in range(10 * 2**10):\n    x.append(bytearray(2**20))\n{RIGHT}',
    'an answer of 100 MB': "def double(x):\n    return 'x' * 10**8\n",
    'recursion': 'def double(x):\n    return double(x)\n',
    'a process': f'import subprocess\nsubprocess.run(["true"])\n{RIGHT}',
    'a written file': f"open('here', 'w').write('x')\n{RIGHT}",
    'a shell': f'import os\nif os.system("true"):\n    raise OSError\n{RIGHT}',
    'another program': 'import os, sys\nos.execv(sys.executable, [sys.executable, "-c", ""])\n',
    'the signal of its parent': f'import os\nos.kill(os.getppid(), 15)\n{RIGHT}',
    'a connection': f'import socket\nsocket.socket()\n{RIGHT}',
    'a download': 'import urllib.request\nurllib.request.urlopen("http://127.0.0.1:9")\n',
    'a call of C': f'import ctypes\nctypes.CDLL(None).getpid()\n{RIGHT}',
    'more memory': f'import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n{RIGHT}',
    'a thread': f'import threading\nthreading.Thread(target=print).start()\n{RIGHT}',
}
if sys.platform != 'linux' or os.uname().machine not in sandbox.CALLS:
    WRONG.pop('a thread')


@pytest.mark.parametrize('what', WRONG)
def test_nothing_but_right_values_passes(what):
    assert judge(WRONG[what]) is False


ACTS = """
open({path!r}, 'w')
open({path!r}, 'a')
open({old!r}, 'r+')
os.open({old!r}, os.O_RDONLY | os.O_TRUNC)
open('here', 'w')
pathlib.Path({path!r}).touch()
os.mkdir({path!r})
os.remove({old!r})
os.rename({old!r}, {path!r})
os.symlink({old!r}, {path!r})
os.truncate({old!r}, 0)
os.chmod({old!r}, 0)
shutil.rmtree({folder!r})
tempfile.mkdtemp(dir={folder!r})
"""


def test_no_file_is_changed(tmp_path):
    old, path = tmp_path / 'old', tmp_path / 'new'
    old.write_text('kept')
    acts = ACTS.format(path=str(path), old=str(old), folder=str(tmp_path)).split('\n')[1:-1]
    tries = ''.join(f'try:\n    {act}\nexcept PermissionError:\n    n += 1\n' for act in acts)
    program = f'import os, pathlib, shutil, tempfile\nn = 0\n{tries}assert n == {len(acts)}\n{RIGHT}'
    assert judge(program) is True
    assert [file.name for file in tmp_path.iterdir()] == ['old'] and old.read_text() == 'kept'


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr(run_code, 'PATIENCE', 60)  # it is the limit of computing that ends it
    start = time.monotonic()
    assert judge('def double(x):\n    while True:\n        pass\n', seconds=1) is False
    assert time.monotonic() - start < 30
    monkeypatch.setattr(run_code, 'PATIENCE', 1)
    start = time.monotonic()
    assert judge('import time\ntime.sleep(100)\n', seconds=1) is False
    assert time.monotonic() - start < 30


def descendants(folder):
    """The processes whose environment says that they were started with a temporary directory in folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/environ', 'rb') as file:
                if f'HOME={folder}'.encode() in file.read():
                    found.append(pid)
        except OSError:
            pass
    return found


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_fork_bomb_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))  # other tests start such processes, too
    forks = 'for _ in range(6):\n    try:\n        os.fork()\n    except OSError:\n        pass\n'
    assert judge(f'import os\n{forks}{RIGHT}') is True  # as it starts nothing, it is right
    assert judge(f'import os\nwhile True:\n    os.fork()\n{RIGHT}') is False
    assert descendants(tmp_path) == []
    with subprocess.Popen(['sleep', '60'], env=dict(HOME=f'{tmp_path}/a')) as seen:
        while seen.poll() is None and descendants(tmp_path) != [str(seen.pid)]:
            time.sleep(0.01)
        seen.kill()
    assert seen.returncode == -9  # not of its own: it was found


KERNEL = """
import json, os, signal, socket, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
from nanoloop.tasks import sandbox
if not sandbox.filter_calls():
    print('none')
    raise SystemExit
def try_all():
    for act in (os.fork, lambda: subprocess.run(['true']), socket.socket, socket.socketpair,
                lambda: os.posix_spawn('/bin/true', ['true'], {}), lambda: os.execv('/bin/true', ['true']),
                lambda: os.kill(os.getpid(), 0), lambda: signal.pthread_kill(threading.get_ident(), 0),
                lambda: threading.Thread(target=print).start()):
        try:
            act()
            yield 'done'
        except (OSError, RuntimeError) as error:
            yield getattr(error, 'errno', None) or 'refused'
print(json.dumps(list(try_all())), len(open('/proc/self/stat').read()) > 0)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='a filter of Linux')
def test_the_kernel_refuses_processes_signals_and_connections():
    run = subprocess.run([sys.executable, '-c', KERNEL, str(ROOT)], capture_output=True, text=True)
    if run.stdout == 'none\n':
        pytest.skip('this kernel takes no filter')
    codes, readable = run.stdout.rsplit(' ', 1)
    assert json.loads(codes) == [1] * 8 + ['refused'] and readable == 'True\n', run.stderr


def test_values_are_built_in_types_when_they_arrive():
    import collections
    import pickle

    import numpy as np

    for value, expected in (
        (collections.Counter('aab'), dict(a=2, b=1)),
        (collections.namedtuple('P', 'x y')(1, 2.5), (1, 2.5)),
        ([np.float64(0.5), np.int64(3), True, None], [0.5, 3, True, None]),
        ({(1, 'a'): [{2}, frozenset({3}), b'x']}, {(1, 'a'): [{2}, frozenset({3}), b'x']}),
    ):
        made = sandbox.plain(value)
        assert made == expected and type(made) is type(expected) and str(made) == str(expected)
        assert sandbox.Values(__import__('io').BytesIO(pickle.dumps(made))).load() == expected
    source, target = os.pipe()
    os.write(target, (2**40).to_bytes(8, 'little'))
    with pytest.raises(EOFError):  # before it makes room for it
        sandbox.Channel(source, target).receive()
    for value in (iter([]), range(3), object(), print, 1j, [object()]):
        with pytest.raises(TypeError):
            sandbox.plain(value)


def test_a_machine_that_cannot_run_programs_is_told(monkeypatch):
    run_code.check_machine()
    monkeypatch.setattr(run_code, 'passes', lambda *args: False)
    with pytest.raises(UserError, match='programs cannot be run with limits on this machine'):
        run_code.check_machine()


def test_humaneval_is_judged_by_its_tests(tmp_path):
    prompt = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef root(x):\n    """ The root of x. """\n'
    row = dict(prompt=prompt, canonical_solution='    return math.sqrt(helper(x))\n', entry_point='root')
    row['test'] = 'def check(candidate):\n    assert candidate(9) == root(9) == helper(3)\n'
    (tmp_path / 'a.jsonl').write_text(json.dumps(row))
    task = make_task('humaneval', dict(humaneval=str(tmp_path / 'a.jsonl'), run_code=True))
    for answer, right in (
        (task[0]['messages'][1]['content'], True),
        ('```python\ndef root(x):\n    return math.sqrt(helper(x))\n```', True),
        ('def root(x):\n    return x\n', False),
    ):
        assert task.judge(task[0], answer) is right
