"""
Threads that share the CPU with other programs.

The threads of a matrix product wait for each other in a busy loop, for some milliseconds, before they sleep.
On a CPU of their own that is the fastest way. Beside another busy program it is the slowest: a thread that
waits so takes the core on which the one that it waits for could run.

libgomp, the OpenMP library of torch on Linux, waits far shorter as soon as a process has more
threads than it has cores. So share_cpu() watches how often the system takes a core away from this process.
While that is often, a second set of threads, which does nothing, makes the first one wait the short way.
Results do not change: the number of threads that compute does not.
"""

import functools
import os
import resource
import sys
import threading
import time

import torch

WATCH_S = 0.5  # seconds between two looks
MANY_PER_S = 100  # involuntary context switches per second: under 60 alone, over 150 beside a busy program
# variables with which the user has decided how OpenMP's threads wait
DECIDED = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')


@functools.cache  # once per process
def share_cpu():
    """Makes this process's threads wait in a way that suits the load of the machine, from now on.

    It does nothing where the user has decided, for a single thread, and without libgomp.
    """
    decided = any(os.environ.get(name) for name in DECIDED)
    if sys.platform == 'linux' and not decided and torch.get_num_threads() > 1:
        threading.Thread(target=watch, args=(ShortWaits(),), daemon=True).start()


def watch(short_waits, sleep=time.sleep, clock=time.monotonic, count=None):
    """Switches short waits on while cores are taken away often, and off again, for ever.

    count: returns the number of involuntary context switches so far; None = that of this process.
    """
    count = count or (lambda: resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
    n, began = count(), clock()
    while True:
        sleep(WATCH_S)
        n_before, n, before, began = n, count(), began, clock()
        short_waits.switch((n - n_before) / (began - before) > MANY_PER_S)


class ShortWaits:
    """A second set of OpenMP threads, which exists while short waits are switched on."""

    def __init__(self):
        self.end, self.thread = threading.Event(), None

    def switch(self, on):
        """Makes the threads wait the short way, or the usual way again. Returns when they do."""
        if on and self.thread is None:
            ready = threading.Event()
            self.end.clear()
            self.thread = threading.Thread(target=self.hold, args=(ready,), daemon=True)
            self.thread.start()
            ready.wait()
        elif not on and self.thread is not None:
            self.end.set()
            self.thread.join()
            self.thread = None

    def hold(self, ready):
        """Keeps a set of threads until the end: it belongs to the thread that has computed with it."""
        try:
            torch.zeros(2**20).add_(1)  # large enough to be divided among threads
        finally:
            ready.set()
        self.end.wait()


def hand_over_threads():
    """Makes torch compute with one CPU thread in this thread. Returns how many it had, for another thread.

    For a server, which computes in a thread of its own. Each thread that computes keeps a set of threads, and
    with more of them than cores they wait for each other slowly. So this comes before anything that computes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads
