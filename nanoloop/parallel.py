"""
Several processes: what ranks agree on.
"""

import torch
import torch.distributed as dist


def largest_of_ranks(m, value, op=dist.ReduceOp.MAX):
    """The largest of all ranks' integers, agreed on between CPUs: no device is waited for."""
    if m.cpu_group is None:
        return value
    value = torch.tensor([value])
    dist.all_reduce(value, op=op, group=m.cpu_group)
    return int(value)


def sum_of_ranks(m, value):
    return largest_of_ranks(m, value, dist.ReduceOp.SUM)


def on_first_rank(m, work):
    """Calls work() on the first rank; if it fails, all ranks leave together."""
    failure = None
    if m.rank == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            failure = error
    if largest_of_ranks(m, int(failure is not None)):
        raise failure or SystemExit(1)


max_over_ranks, sum_over_ranks, rank0_first = largest_of_ranks, sum_of_ranks, on_first_rank


def reduce_sum(m, x):
    if m.cpu_group:
        dist.all_reduce(x, group=m.cpu_group)
    return x


def wrap(module, m):
    if m.world > 1:
        from torch.nn.parallel import DistributedDataParallel

        module = DistributedDataParallel(module)
        module.broadcast_buffers = False
    return module


def leave(m):
    if m.world > 1:
        dist.destroy_process_group()
