"""
Measures what a device can do: matrix products and reading from memory.
"""

import time

import torch


def matmul_rate(m, size=2048):
    """Returns the FLOP/s of square matrix products on a CPU, the best of several."""
    a = torch.randn(size, size, device=m.device, dtype=m.dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def read_rate(m):
    """Returns the bytes per second that this device reads from memory: a sum over a tensor, the best of 8."""
    size = 2**28 if m.kind == 'cpu' else 2**31  # bytes: on a GPU starting and waiting must take a small part
    x = torch.ones(size // 4, device=m.device)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        x.sum().item()  # the host waits for the device
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)
