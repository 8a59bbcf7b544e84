"""
The two processes of run_code.py. Of Python's own library alone, since its file is all that they import.

The candidate is a program that a model wrote, which defines a function. It runs in a process of its own, with
limits. The examiner is another process: it has the tests, and calls the function through a pipe. So tests and
verdict are not where the candidate could reach them by ordinary means: it can only answer with values. A
value is a pickle of built-in types, read without the right to name a class.
"""

import ctypes
import io
import json
import numbers
import os
import pickle
import resource
import sys

MOST_BYTES = 2**24  # of an answer
PASSED = 'passed'  # what the examiner writes


# -----------------------------------------------------------------------------
# values through a pipe: 8 bytes for the length, then a pickle


class Values(pickle.Unpickler):
    """Reads built-in types: a pickle that names anything else is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is no plain value')


class Channel:
    """The ends of two pipes, given by their descriptors, through which values go there and back."""

    def __init__(self, source, target):
        self.source, self.target = open(source, 'rb'), open(target, 'wb')

    def send(self, value):
        content = pickle.dumps(plain(value))
        self.target.write(len(content).to_bytes(8, 'little') + content)
        self.target.flush()

    def receive(self):
        """Returns the next value. Raises EOFError if the other process has ended."""
        head = self.source.read(8)
        size = int.from_bytes(head, 'little')
        if len(head) < 8 or size > MOST_BYTES:
            raise EOFError('no answer, or one that is too long')
        return Values(io.BytesIO(self.source.read(size))).load()


def plain(value):
    """Returns a value in built-in types: a Counter becomes a dict. Raises TypeError for another value."""
    if value is None or isinstance(value, bool | bytes):
        return value
    for kind, abstract in ((str, str), (int, numbers.Integral), (float, numbers.Real)):
        if isinstance(value, abstract):
            return kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f'{type(value).__name__} is no plain value')


# -----------------------------------------------------------------------------
# limits

# audit events of Python: names, or their beginnings, of what a candidate may not do
REFUSED = (
    *('socket.', 'subprocess.', 'shutil.', 'tempfile.', 'ctypes.dlsym', 'resource.', 'signal.pthread_kill'),
    *('os.fork', 'os.posix_spawn', 'os.spawn', 'os.exec', 'os.system', 'os.kill', 'pty.', 'fcntl.', 'mmap.'),
    *('os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.truncate', 'os.link', 'os.symlink', 'os.utime'),
    *('os.chmod', 'os.chown', 'os.chflags', 'os.lockf', 'os.setxattr', 'os.removexattr'),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refuse(event, args):
    """Raises PermissionError for an audit event of Python that a candidate may not cause."""
    if event == 'open':
        writes = isinstance(args[2], int) and args[2] & WRITES
    else:
        writes = event.startswith(REFUSED)
    if writes:
        raise PermissionError(f'{event} is not allowed here')


# numbers of system calls on Linux: AUDIT_ARCH, then fork vfork clone clone3 execve execveat kill tkill
# tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal socket socketpair ptrace process_vm_writev
# io_uring_setup setrlimit prlimit64 unshare setns
CALLS = {
    'x86_64': (
        0xC000003E,
        *(57, 58, 56, 435, 59, 322, 62, 200, 234, 129, 297, 424, 41, 53, 101, 311, 425, 160, 302, 272, 308),
    ),
    # it has neither fork nor vfork
    'aarch64': (
        0xC00000B7,
        *(220, 435, 221, 281, 129, 130, 131, 138, 240, 424, 198, 199, 117, 271, 425, 164, 261, 97, 268),
    ),
}
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of BPF
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050001  # the error is EPERM
FOREIGN = 0x40000000  # numbers from here on are of another interface to the same kernel
NO_NEW_PRIVS, SECCOMP, FILTER, PARENT_DEATH, SIGKILL = 38, 22, 2, 1, 9  # of prctl


def filter_calls():
    """Lets the kernel refuse the system calls of CALLS to this process. Returns whether it does.

    Above all no process, thread or connection can begin, and no signal be sent. Of Linux, and irrevocable.
    """
    if sys.platform != 'linux' or os.uname().machine not in CALLS:
        return False
    architecture, *calls = CALLS[os.uname().machine]
    n = len(calls)
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    program += [(AT_LEAST, n + 1, 0, FOREIGN)]  # a jump skips so many instructions
    program += [(EQUAL, n - i, 0, call) for i, call in enumerate(calls)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERROR)]

    class Instruction(ctypes.Structure):
        _fields_ = [
            ('code', ctypes.c_ushort),
            ('yes', ctypes.c_ubyte),
            ('no', ctypes.c_ubyte),
            ('k', ctypes.c_uint),
        ]

    class Program(ctypes.Structure):
        _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.POINTER(Instruction))]

    code = (Instruction * len(program))(*program)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    content = Program(len(program), code)
    return prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0 == prctl(SECCOMP, FILTER, ctypes.addressof(content), 0, 0)


def limit(seconds, memory):
    """Sets limits of this process that it cannot raise: seconds of computing, and bytes of memory.

    It can write to no file, and start no process unless it is root's.
    """
    limits = dict(CPU=seconds, AS=memory, FSIZE=0, NOFILE=64, CORE=0, NPROC=0)
    for name, value in limits.items():
        number = getattr(resource, f'RLIMIT_{name}')
        most = resource.getrlimit(number)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):  # macOS takes no limit of memory
            if sys.platform == 'linux':
                raise
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PARENT_DEATH, SIGKILL, 0, 0, 0)  # ends with the process that started it


# -----------------------------------------------------------------------------
# the two processes


def candidate(source, target, seconds, memory):
    """Runs a program, and answers calls of its function, until the examiner has ended."""
    channel = Channel(source, target)
    program, name = channel.receive()
    code = compile(program, 'candidate', 'exec')
    limit(seconds, memory)
    if not filter_calls() and os.getuid() == 0:
        raise RuntimeError('no limit of processes binds root, and this kernel takes no filter')
    sys.addaudithook(refuse)
    names = {'__name__': 'candidate'}
    exec(code, names)
    channel.send(True)
    while True:
        args, options = channel.receive()
        result = names[name](*args, **options)
        sys.stdout.flush()  # a program that has closed its output fails here,
        os.write(1, b'')  # or here
        channel.send(result)


def examine(source, target, seconds, memory):
    """Runs the tests of stdin on the candidate's function. Writes PASSED if all pass, and ends otherwise.

    stdin: JSON of program (the candidate's), reference (a program with the names that the tests use), test
    (it defines check(function)) and name, the function's.
    """
    job = json.load(sys.stdin)
    limit(seconds, memory)
    channel = Channel(source, target)
    channel.send((job['program'], job['name']))
    channel.receive()

    def call(*args, **options):
        channel.send((args, options))
        return channel.receive()

    names = {'__name__': 'tests'}
    exec(job['reference'], names)
    names[job['name']] = call  # tests call the function by its name, too
    exec(job['test'], names)
    names['check'](call)
    sys.stdout.write(PASSED)
