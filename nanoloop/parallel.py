"""
The processes (ranks) of a run: process group, DDP, and reductions of numbers.

m: a Machine (machine.py), of which rank, world (the number of processes) and cpu_group (the process group
through which the CPUs of the ranks talk) are used. All ranks call these functions in the same order. Where
there is one process, they do nothing.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanoloop.checks import check


def choose_backend(backend, kind):
    """Returns the backend of torch.distributed for the key `backend` and a kind of device."""
    if backend == 'auto':
        return 'nccl' if kind == 'cuda' else 'gloo'
    check(backend in ('gloo', 'nccl'), 'backend', backend, 'auto, gloo or nccl')
    check(backend != 'nccl' or kind == 'cuda', 'backend', backend, f'gloo, nccl does not work on {kind}')
    return backend


def join(m, backend):
    """Joins the process group and sets m.cpu_group. Raises OSError if the processes do not meet."""
    if m.world == 1:
        return
    try:
        dist.init_process_group(backend)
        m.cpu_group = dist.new_group(backend='gloo')
    except (dist.DistError, ValueError) as error:
        place = ':'.join(os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
        reason = str(error).splitlines()[0]
        raise OSError(f'the {m.world} processes do not meet at {place}: {reason}') from None


def leave(m):
    """Leaves the process group."""
    if m.world > 1:
        dist.destroy_process_group()


def wrap(module, m):
    """Returns module, wrapped in DDP if there are several processes. DDP averages gradients over ranks."""
    if m.world == 1:
        return module
    wrapped = DistributedDataParallel(module)
    wrapped.broadcast_buffers = False  # every rank computes the same ones: tables of noise and positions
    return wrapped


# -----------------------------------------------------------------------------
# numbers and decisions, which go through the CPUs: no rank waits for a device


def reduce_sum(m, tensor):
    """Sums a CPU tensor over the ranks, in place, and returns it."""
    if m.cpu_group is not None:
        dist.all_reduce(tensor, group=m.cpu_group)
    return tensor


def max_over_ranks(m, value):
    """Returns the maximum of an integer over all ranks. It is also a barrier."""
    if m.cpu_group is None:
        return value
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=m.cpu_group)
    return int(tensor)


def sum_over_ranks(m, value):
    """Returns the sum of the ranks' integers."""
    return int(reduce_sum(m, torch.tensor([value])))


def gather(m, value):
    """Returns the list of the ranks' values, on every rank. They are pickled: plain values and arrays."""
    values = [value] * m.world
    if m.cpu_group is not None:
        dist.all_gather_object(values, value, group=m.cpu_group)
    return values


def on_rank0(m, work):
    """Calls work() on rank 0 only, while the others wait.

    If work() raises ValueError or OSError, rank 0 raises it, and the others raise SystemExit(1).
    """
    failure = None
    if m.rank == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            failure = error
    if max_over_ranks(m, int(failure is not None)):
        raise failure or SystemExit(1)
