"""Threads beside other programs: how they wait changes, what they compute does not."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from nanoloop import shared_cpu
from nanoloop.machine import lazy_zeros
from nanoloop.shared_cpu import hand_over_threads


def test_short_waits_follow_the_switches():
    """Switches on above MANY_PER_S, off below it, whatever the seconds between two looks were."""
    looks = [0, 20, 220, 420, 421]  # involuntary switches so far, at second 0, 1, 2, 4 and 5
    times, counts, seen = iter([0, 1, 2, 4, 5]), iter(looks), []

    class Recorder:
        def switch(self, on):
            seen.append(on)
            if len(seen) == 4:
                raise StopIteration

    with pytest.raises(StopIteration):
        shared_cpu.watch(
            Recorder(), sleep=lambda s: None, clock=lambda: next(times), count=lambda: next(counts)
        )
    assert seen == [False, True, False, False]  # 20, 200, 100 and 1 per second


@pytest.mark.parametrize(
    'environment, threads, started',
    [({}, 2, 1), ({}, 1, 0), ({'GOMP_SPINCOUNT': '5'}, 2, 0), ({'OMP_WAIT_POLICY': 'PASSIVE'}, 2, 0)],
)
def test_the_user_decides_first(monkeypatch, environment, threads, started):
    monkeypatch.setattr(sys, 'platform', 'linux')
    for name in shared_cpu.DECIDED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(shared_cpu, 'watch', calls.append)
    shared_cpu.share_cpu.__wrapped__()
    assert len(calls) == started


SCRIPT = """
import os, time, torch
from nanoloop.shared_cpu import ShortWaits
torch.set_num_threads(2)
a = torch.randn(300, 500, generator=torch.Generator().manual_seed(1))
def threads(): return len(os.listdir('/proc/self/task'))
def result(): return a @ a.T, a.exp().sum()
before, n, waits, found = result(), threads(), ShortWaits(), []
for on in (True, True, False, False, True, False):
    waits.switch(on)
    for _ in range(100):  # threads that have ended are still listed for a moment
        if threads() == n + 2 * on:
            break
        time.sleep(0.02)
    found.append(threads() - n)
    assert all(map(torch.equal, before, result()))
print(found)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='libgomp')
def test_a_second_set_of_threads_comes_and_goes_and_results_stay():
    env = dict(os.environ, OMP_NUM_THREADS='2')
    done = subprocess.run([sys.executable, '-c', SCRIPT], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[2, 2, 0, 0, 2, 0]', done.stderr


def test_threads_are_handed_over():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert hand_over_threads() == 3 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_lazy_zeros_are_zeros_and_take_memory_where_they_are_written(dtype):
    def pages():
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1])

    before = pages() if sys.platform == 'linux' else 0
    x = lazy_zeros((64, 2**20), dtype, torch.device('cpu'))
    x[3, :5] = 1
    if sys.platform == 'linux':
        assert (pages() - before) * os.sysconf('SC_PAGE_SIZE') < 2**22
    assert x.dtype == dtype and x[3, :6].tolist() == [1] * 5 + [0] and not x[:3, :99].any()
