"""
Atomic and durable writes: a file is complete or absent, even after a crash or a power cut.

    with replace_file(path) as file:
        file.write('all of it')
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

from nanoloop.checks import check

# how a file system says that it cannot do something at all
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF}
NOT_SUPPORTED |= {errno.EACCES, errno.EPERM, errno.EISDIR}


def cache_folder():
    """Returns the folder of what is downloaded once; it may not exist yet."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'nanoloop'


def sync(file):
    """Waits until everything written to an open file is on the disk. Returns the file."""
    file.flush()
    os.fsync(file.fileno())
    return file


def sync_folder(folder):
    """Waits until the names of a folder's files are on the disk: until then a crash can undo a rename.

    Returns None, or why the file system cannot do that for folders, as CIFS, sshfs and VirtualBox cannot.
    """
    try:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        return error.strerror


@contextlib.contextmanager
def replace_file(path, mode='w'):
    """Opens PATH.tmp for writing; at the end of the block it is synced and renamed to `path`.

    Readers see the old file or the whole new one. If the block raises, the old file stays and PATH.tmp goes.
    """
    path = Path(path)
    new = path.with_name(path.name + '.tmp')
    try:
        with open(new, mode) as file:
            yield file
            sync(file)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path, value, indent=None):
    """Replaces a file by the JSON text of a value."""
    with replace_file(path) as file:
        json.dump(value, file, indent=indent)


def check_writable(path, key):
    """Raises UserError if a file cannot be written, or made. key: the one that has its path."""
    place = path if path.exists() else path.parent
    check(os.access(place, os.W_OK), key, str(path), f'a file that can be written: {place} cannot')


def reason_of(error):
    """Returns why a file was not written: an OSError that led to the error says more than torch's own."""
    cause = error
    while cause is not None and not getattr(cause, 'strerror', None):
        cause = cause.__context__
    return cause.strerror if cause else (str(error) or type(error).__name__).splitlines()[0]


def is_utf8(path):
    """Returns whether a path has a form in UTF-8, which C++ wants.

    In a locale without UTF-8 Python keeps the other bytes of a path as surrogates, which have none.
    """
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def sha256(file):
    """Returns the SHA-256 of a file, given as a path or a descriptor, as a hexadecimal string."""
    digest = hashlib.sha256()
    with open(file, 'rb', closefd=not isinstance(file, int)) as file:
        file.seek(0)  # a descriptor may be anywhere
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value):
    """Returns the SHA-256 of a JSON value as a hexadecimal string."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def lock_folder(folder, against, say=None, wait=False, name='.lock'):
    """Locks a folder against a second process that calls this. Raises BlockingIOError if it is locked.

    wait: wait until it is not. Returns the lock: it ends when it is closed, and with the process, however
    that ends. Returns None if the file system has no locks; say is then called with a line that says against
    what the folder is not locked. name: of the file that is locked.
    """
    try:
        lock = open(Path(folder) / name, 'w')
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return lock
    except BlockingIOError:
        raise
    except OSError as error:
        if say:
            say(f'{folder} cannot be locked against {against}: {error.strerror}')
        return None


def wait_for_file(file):
    """Waits until no other process has called this for the same file; others then wait until it is closed.

    Does nothing if the file system has no locks.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
