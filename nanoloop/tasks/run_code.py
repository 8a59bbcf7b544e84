"""
Runs programs that a model wrote, and judges them by tests. Needs no torch.

This is no security boundary. It keeps mistakes of a program from harming anything but its own verdict; a
program that is written to break out may do so. It runs as the user who runs it, can read what the user can
read, and shares the kernel. For programs that are not trusted, run everything in a container or on a machine
of its own.

What a program cannot do, see sandbox.py:

    compute for more than SECONDS, or take more than PATIENCE * SECONDS in all
    have more than MEMORY bytes
    start a process or a thread, send a signal, open a connection: refused by the kernel on Linux (a seccomp
        filter, on x86-64 and 64-bit ARM), by Python elsewhere
    write, remove or rename a file: refused by Python, and by a limit of 0 bytes for a file
    pass by printing, by ending early, or by any other means than right values: the tests run in another
        process
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nanoloop.checks import UserError
from nanoloop.tasks import sandbox

SECONDS, PATIENCE, MEMORY = 5, 3, 2**30


def passes(program, reference, test, name, seconds=SECONDS, memory=MEMORY):
    """Returns whether a function passes its tests.

    program: defines the function. reference: a right program, whose other names the tests may use. test: a
    program that defines check(function), which raises if the function is wrong. name: the function's.
    """
    job = json.dumps(dict(program=program, reference=reference, test=test, name=name)).encode()
    to_candidate, to_examiner = os.pipe(), os.pipe()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with contextlib.ExitStack() as ends:  # ours, closed as soon as the processes have theirs
            for end in (*to_candidate, *to_examiner):
                ends.callback(os.close, end)
            started = []
            for role, ends_of_role in (
                ('candidate', (to_candidate[0], to_examiner[1])),
                ('examine', (to_examiner[0], to_candidate[1])),
            ):
                process = start(role, ends_of_role, seconds, memory, folder)
                stack.callback(end_process, process)
                started.append(process)
        try:
            output, _ = started[1].communicate(job, timeout=PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            return False
        return started[1].returncode == 0 and output == sandbox.PASSED.encode()


def start(role, ends, seconds, memory, folder):
    """Starts a function of sandbox.py with ends of pipes. Returns the process."""
    path = str(Path(sandbox.__file__).resolve().parent)
    call = f'import sys; sys.path[0] = {path!r}; import sandbox; sys.path[0] = ""; sandbox.{role}'
    # hashes are the same in every run, and so is the order of a set
    env = dict(PYTHONHASHSEED='0', PYTHONUTF8='1', OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', HOME=folder)
    env |= {key: os.environ[key] for key in ('LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH') if key in os.environ}
    examiner = subprocess.PIPE if role == 'examine' else subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, '-s', '-B', '-c', f'{call}{*ends, seconds, memory}'],
        **dict(stdin=examiner, stdout=examiner, stderr=subprocess.DEVNULL),
        **dict(pass_fds=ends, cwd=folder, env=env, start_new_session=True),
    )


def end_process(process):
    """Ends a process that was started with start, and its group."""
    if process.returncode is None:  # else its number may be that of another one
        os.killpg(process.pid, 9)
        process.communicate()


def check_machine():
    """Raises UserError if this machine cannot run programs as it should: a right one does not pass."""
    program = 'def one():\n    return 1\n'
    if not passes(program, program, 'def check(one):\n    assert one() == 1\n', 'one'):
        raise UserError('run_code=True, expected False: programs cannot be run with limits on this machine')
