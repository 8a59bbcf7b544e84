"""Signals that end a run: it saves first, once there is something to save."""

import os
import signal

import pytest
import torch
from helpers import script

import nanoloop.signals as signals_file
from nanoloop import parallel
from nanoloop.machine import Machine
from nanoloop.signals import NUMBERS, Signals


def cpu_machine(world=1):
    return Machine(0, world, torch.device('cpu'), 'cpu', torch.float32)


def saving(m, *options):
    """Signals of a run that has something to save."""
    signals = Signals(m, *options)
    signals.save_first()
    return signals


@pytest.fixture(autouse=True)
def handlers_stay():
    """Puts the handlers of this process back after a test."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number', NUMBERS)
def test_a_signal_ends_a_run_that_has_nothing_to_save_at_once(number):
    lines, before = [], signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, Signals(cpu_machine(), lines.append):
        os.kill(os.getpid(), number)
        pytest.fail('it goes on')
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert lines == [f'stopped by {number.name}, there is nothing new to save']


@pytest.mark.parametrize('number', NUMBERS)
def test_a_signal_is_noted_when_there_is_something_to_save_and_its_name_is_told(number):
    names = []
    with saving(cpu_machine(), None, names.append) as signals:
        os.kill(os.getpid(), number)
        assert signals.stopped() == number and names == [number.name]


def test_an_ignored_signal_stays_ignored():
    """As nohup ignores SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals(cpu_machine()) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.stopped()


@pytest.mark.parametrize('world, number', [(1, 0), (2, signal.SIGHUP)])
def test_of_several_processes_the_end_of_the_parent_counts_as_a_hangup(monkeypatch, world, number):
    monkeypatch.setattr(parallel, 'max_over_ranks', lambda m, value: value)
    signals = saving(cpu_machine(world))
    assert not signals.stopped()
    monkeypatch.setattr(signals_file.os, 'getppid', lambda: 1)
    assert signals.stopped() == number


def test_a_signal_has_a_name_and_a_status():
    assert (
        signals_file.signal_name(signal.SIGTERM) == 'SIGTERM'
        and signals_file.exit_status(signal.SIGINT) == 130
    )


@pytest.mark.parametrize('seconds, killed', [(0.5, False), (2.5, True)])
def test_a_second_interrupt_kills_only_after_two_seconds(monkeypatch, seconds, killed):
    now, raised = [100.0], []
    monkeypatch.setattr(signals_file.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(signals_file.signal, 'signal', lambda *args: raised.append(args))
    monkeypatch.setattr(signals_file.signal, 'raise_signal', raised.append)
    signals = saving(cpu_machine())
    signals.note(signal.SIGINT, None)
    now[0] += seconds
    signals.note(signal.SIGTERM, None)
    assert not raised and signals.stopped() == signal.SIGINT
    signals.note(signal.SIGINT, None)
    assert raised == ([(signal.SIGINT, signal.SIG_DFL), signal.SIGINT] if killed else [])


@pytest.mark.parametrize('world', [1, 2])
def test_after_a_signal_the_handlers_are_restored_or_silent(monkeypatch, world):
    monkeypatch.setattr(parallel, 'max_over_ranks', lambda m, value: value)
    before = signal.getsignal(signal.SIGTERM)
    with saving(cpu_machine(world=world)) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stopped() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == (before if world == 1 else signal.SIG_IGN)


def test_what_a_signal_broke_ends_with_its_status():
    lines = []
    with pytest.raises(SystemExit) as stop, saving(cpu_machine(), lines.append):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError('the other rank is gone')
    assert stop.value.code == 128 + signal.SIGTERM
    assert lines == ['stopped by SIGTERM (RuntimeError)']


@pytest.mark.parametrize(
    'number, error', [(0, RuntimeError), (signal.SIGTERM, OSError), (signal.SIGTERM, ValueError)]
)
def test_a_users_error_a_full_disk_and_what_no_signal_broke_stay(number, error):
    with pytest.raises(error), saving(cpu_machine()):
        if number:
            os.kill(os.getpid(), number)
        raise error('no')


def test_an_error_after_a_signal_only_ends_the_block_that_may_break():
    with saving(cpu_machine()) as signals:
        with pytest.raises(RuntimeError), signals.ignore_errors_after_signal():
            raise RuntimeError('the compiler is missing')
        with signals.ignore_errors_after_signal():
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError('the compiler got the signal, too')
        assert signals.stopped() == signal.SIGINT


def test_with_several_processes_an_error_is_raised_without_asking_the_others(monkeypatch):
    monkeypatch.setattr(parallel, 'max_over_ranks', lambda m, value: pytest.fail('it would wait for ever'))
    signals = saving(cpu_machine(world=2))
    signals.number = signal.SIGTERM
    with pytest.raises(RuntimeError), signals.ignore_errors_after_signal():
        raise RuntimeError


def test_sigterm_can_be_an_exception_as_an_interrupt_is():
    before, ended = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stop, signals_file.exit_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            ended.append('in order')
    assert stop.value.code == 143 and ended and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize('name', ['train.py', 'data/text/prepare.py'])
def test_an_interrupt_while_a_script_imports_ends_it_without_a_traceback(name, tmp_path):
    """The module argparse or torch of this folder stands for one that takes seconds."""
    module = 'torch' if name == 'train.py' else 'argparse'
    (tmp_path / f'{module}.py').write_text('import time\nprint("importing", flush=True)\ntime.sleep(60)\n')
    run = script(name, PYTHONPATH=str(tmp_path), RANK='1')
    assert run.stdout.readline() == 'importing\n'
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[0] == '' and run.returncode == 130


def test_main_gets_the_interrupt_as_an_exception_again():
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler  # importing the scripts, as tests do, leaves it
    signals_file.end_at_interrupt()
    assert signal.getsignal(signal.SIGINT) is signals_file.end_at_once
    signals_file.raise_at_interrupt()
    assert signal.getsignal(signal.SIGINT) is before
