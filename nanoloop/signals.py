"""
Signals that end a process: a run saves first, a script prints first what it has.
"""

import contextlib
import os
import signal
import sys
import time

# SIGHUP: the terminal has gone; SIGUSR1, SIGUSR2: `sbatch --signal` of SLURM
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def signal_name(number):
    """Returns the name of a signal number: SIGTERM for 15."""
    return signal.Signals(number).name


def exit_status(number):
    """Returns the exit status of a process ended by this signal: 128 + number, as in a shell."""
    return 128 + number


def end_at_interrupt():
    """Makes Ctrl-C end the process at once and without a traceback, while a script imports its modules.

    Raising an exception there can fail: libraries turn it into others, or lose it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def raise_at_interrupt():
    """Makes Ctrl-C raise KeyboardInterrupt again, after end_at_interrupt()."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once(number, frame):
    """Handles a signal by ending the process."""
    os._exit(exit_status(number))


@contextlib.contextmanager
def exit_on_sigterm():
    """Makes SIGTERM raise SystemExit inside the block, as Ctrl-C raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(exit_status(number)))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_now(number):
    """Ends the process as the signal would, without waiting for its threads."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_status(number))


@contextlib.contextmanager
def note_interrupts():
    """Notes Ctrl-C inside the block in a list, which it returns, instead of raising KeyboardInterrupt.

    The second one raises it.
    """
    interrupts = []

    def note(number, frame):
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(signal_name(number))

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


class Signals:
    """Notes NUMBERS while it is entered, so that a run can save before it ends: see stopped().

    Until save_first() is called there is nothing to save, and a signal ends the process at once. A signal
    that was ignored, as nohup ignores SIGHUP, stays ignored. Of several processes, the end of the parent
    counts as SIGHUP: SIGUSR1 ends torchrun, but not its workers.

    Further signals are ignored, because torchrun sends each several times to its workers. But a Ctrl-C more
    than PATIENCE_S after the first signal ends the process at once.

    say: called with a line when a signal ends the process without a checkpoint. noted: called with the name
    of the first signal, from its handler: it must not print.
    """

    PATIENCE_S = 2.0

    def __init__(self, m, say=None, noted=None):
        self.m, self.say, self.noted = m, say or (lambda text: None), noted or (lambda name: None)
        self.number = 0  # the first signal that this process got
        self.agreed = 0  # the signal that some rank had got when stopped() was last called
        self.since = 0.0  # when the first signal came, in seconds
        self.saves_first = False
        self.parent = os.getppid()

    def __enter__(self):
        heard = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self.note) for number in heard}
        return self

    def save_first(self):
        """From now on a signal is noted, since the run has something to save."""
        self.saves_first = True

    def note(self, number, frame):
        """Handles a signal."""
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if not self.saves_first:
                sys.exit(exit_status(number))
            self.noted(signal_name(number))
        elif number == signal.SIGINT and time.monotonic() - self.since > self.PATIENCE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def stopped(self):
        """Returns the signal that some rank has got, 0 if none has. All ranks call it at the same places."""
        from nanoloop.parallel import max_over_ranks  # it imports torch: see end_at_interrupt()

        if self.m.world > 1 and os.getppid() != self.parent:
            self.note(signal.SIGHUP, None)
        self.agreed = max_over_ranks(self.m, self.number)
        return self.agreed

    @contextlib.contextmanager
    def ignore_errors_after_signal(self):
        """Ignores an error inside the block if a signal came before it: see stopped().

        A Ctrl-C reaches all processes of a terminal, also a compiler that this one waits for. Compiling then
        fails for no other reason than that the run is to stop. With several processes the error is raised,
        because the other ranks are elsewhere in the program.
        """
        try:
            yield
        except Exception:
            if self.m.world > 1 or not self.stopped():
                raise

    def __exit__(self, kind, error, trace):
        silent = self.agreed and self.m.world > 1  # torchrun repeats the signal until all workers have left
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if silent else handler)
        if not self.number:
            return
        if not self.saves_first and isinstance(error, SystemExit):
            self.say(f'stopped by {signal_name(self.number)}, there is nothing new to save')
        elif isinstance(error, Exception) and not isinstance(error, ValueError | OSError):
            # the same signal has ended a process that this one needs: a compiler or another rank
            self.say(f'stopped by {signal_name(self.number)} ({kind.__name__})')
            sys.exit(exit_status(self.number))
