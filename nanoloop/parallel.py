"""
The processes (ranks) of a run: process group, DDP or FSDP2, and reductions of numbers.

m: a Machine (machine.py), of which rank, world (the number of processes), shard (whether the weights are
sharded) and cpu_group (the process group through which the CPUs of the ranks talk) are used. All ranks call
these functions in the same order. Where there is one process, they do nothing.

With m.shard every rank keeps 1 / world of each weight, of its gradient and of the optimizer's state, as
DTensors. A weight that is used in every loop is gathered once per step: see whole_weights.
"""

import contextlib
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from nanoloop.checks import check

LEAVE_S = 0.2  # seconds that a process waits at its end


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
        store, rank, world = next(rendezvous('env://', timeout=default_pg_timeout))
        # torchrun keeps its store when it starts all processes anew: without a name of its own for each
        # attempt they would find the addresses of those that have ended
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        m.cpu_group = dist.new_group(backend='gloo')
    except (dist.DistError, ValueError) as error:
        place = ':'.join(os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
        reason = str(error).splitlines()[0]
        raise OSError(f'the {m.world} processes do not meet at {place}: {reason}') from None


def leave(m):
    """Leaves the process group.

    Then it waits for gloo's threads. They let go of a tensor a little after they have said that its sum is
    done. If Python ends in between, the process can abort: that is how torch's source reads, and two of
    some 200 runs on busy cores ended so.
    """
    if m.world > 1:
        dist.destroy_process_group()
        time.sleep(LEAVE_S)


def wrap(training_loss, m):
    """Returns a TrainingLoss that averages gradients over the ranks. With m.shard it shards the model.

    The sharded weights are new parameters: optimizers are made afterwards.
    """
    if m.world == 1:
        return training_loss
    if m.shard:
        shard(training_loss, m)
        return training_loss
    wrapped = DistributedDataParallel(training_loss)
    wrapped.broadcast_buffers = False  # every rank computes the same ones: tables of noise and positions
    return wrapped


def sync_gradients(training_loss, due):
    """Says whether the next backward pass averages the gradients over the ranks, or only adds to them."""
    training_loss.require_backward_grad_sync = due  # for DDP
    root = next(sharded_parts(training_loss), None)
    if root is not None:
        root.set_requires_gradient_sync(due)
        root.set_is_last_backward(due)


# -----------------------------------------------------------------------------
# sharded weights (FSDP2). DTensor is imported only where there are some, since that takes 0.6 s


def shard(training_loss, m):
    """Shards the weights of a GPT: each block is a unit, and what is left is one, tied weights with it.

    training_loss: the TrainingLoss of the model, whose forward pass is that of the last unit, the root.

    A unit's weights are gathered together, and so are its gradients reduced. Weights are gathered and
    resharded by whole_weights alone: by itself FSDP2 would gather a block anew in every loop.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = training_loss.model
    options = dict(mesh=init_device_mesh(m.kind, (m.world,)), reshard_after_forward=False)
    for block in model.blocks():
        fully_shard(block, **options)
    fully_shard(model, **options).set_reshard_after_backward(False)
    root = model._get_fsdp_state()
    root._lazy_init()  # else the unit that runs first, such as a block, becomes the root
    training_loss.register_forward_pre_hook(
        lambda _, args, kwargs: root._pre_forward(model, args, kwargs), with_kwargs=True
    )
    training_loss.register_forward_hook(lambda _, args, result: root._post_forward(model, args, result))


def sharded_parts(module):
    """Yields the modules inside a module that FSDP2 shards; the root comes first."""
    return (part for part in module.modules() if hasattr(type(part), 'unshard'))


def is_sharded(tensor):
    """Returns whether a tensor is a DTensor, of which this rank has a part."""
    return hasattr(tensor, 'to_local')


@contextlib.contextmanager
def whole_weights(module):
    """Gathers the sharded weights of a module inside the block. Optimizers change them outside of it only.

    The ranks do not wait for the weights of a block here, but where it first runs.
    """
    handles = [part.unshard(async_op=True) for part in sharded_parts(module)]
    for handle in handles[:1]:  # the root's weights are also used without its forward method
        handle.wait()
    try:
        yield
    finally:
        for handle, part in zip(handles, sharded_parts(module), strict=True):
            handle.wait()  # a rank without a row to evaluate has run no block
            part.reshard()


def total_norm(tensors):
    """Returns the L2 norm of a list of tensors, all or none of them sharded, taken together."""
    if not any(map(is_sharded, tensors)):
        return nn.utils.get_total_norm(tensors)
    squared = nn.utils.get_total_norm([tensor.to_local() for tensor in tensors]).square()
    dist.all_reduce(squared)
    return squared.sqrt()


@torch.no_grad()
def whole_state(m, part):
    """Returns state_dict() of a module or an optimizer, with whole tensors on the CPU of rank 0 if sharded.

    The other ranks get None in their place. One tensor is gathered after the other.
    """
    if not m.shard:
        return part.state_dict()
    whole = {}  # id of a sharded tensor: the whole one, so that tied weights stay one tensor

    def gather_values(value):
        if isinstance(value, dict):
            return {name: gather_values(x) for name, x in value.items()}
        if not is_sharded(value):
            return value
        if id(value) not in whole:
            tensor = value.detach().full_tensor()
            whole[id(value)] = tensor.cpu() if m.rank == 0 else None
        return whole[id(value)]

    # with keep_vars the values are the parameters, else new tensors for each name of a tied weight
    return gather_values(
        part.state_dict(keep_vars=True) if isinstance(part, nn.Module) else part.state_dict()
    )


def local_parts(tensors):
    """Returns the plain tensors of a list: this rank's parts of sharded ones, the others as they are."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def part_like(value, p):
    """Returns a saved tensor as that of p: this rank's part of it as a DTensor, if p is sharded.

    Of the embeddings of more positions than p has, it is the first ones. Other values, such as an optimizer's
    number of steps, are returned as they are.
    """
    if not isinstance(value, torch.Tensor) or value.dim() != p.dim() or not p.dim():
        return value
    value = value if len(value) == len(p) else value[: len(p)].clone()  # a view would keep all of it
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def shard_state(optimizer, state):
    """Returns an optimizer's state dict of whole tensors, with this rank's parts of them if it is sharded."""
    params = [p for group in optimizer.param_groups for p in group['params']]
    values = {}
    for i, kept in state['state'].items():
        values[i] = {name: part_like(value, params[i]) for name, value in kept.items()}
    return dict(state, state=values)


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
