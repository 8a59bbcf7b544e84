"""
Counts the memory of a micro-batch that its activations take, without allocating it.

The loss and its backward pass are computed on fake tensors, which have a shape and no memory. What autograd
saves, and the most that exists at any time, is summed as it comes. So the count holds for every entry of the
tables of model.py. On a CPU it equals, to the byte, what autograd saves of a real model (tests/test_plan.py).
"""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, upcast
from nanoloop.machine import MORE_LOGITS, autocast
from nanoloop.objective import OBJECTIVE, TrainingLoss, set_trained_parts


class Activations(NamedTuple):
    """Bytes of a micro-batch beside weights, gradients and optimizer states."""

    saved: int  # kept from the forward pass for the backward pass
    copies: int  # of them copies of weights in the low precision, one for every use of a weight
    peak: int  # the most at any time, in the forward or the backward pass


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of tensors that are made inside the block and still exist, every storage once.

    known: addresses of storages that are not counted, of which there can be views.
    """

    def __init__(self, known):
        super().__init__()
        self.known = known
        self.sizes, self.now, self.peak = {}, 0, 0  # sizes: {address of a storage: its bytes}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return result

    def add(self, storage):
        address = storage._cdata
        if address not in self.known and address not in self.sizes:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, address)

    def drop(self, address):
        self.now -= self.sizes.pop(address)


class FusedNorm(torch.autograd.Function):
    """RMSNorm as a GPU's kernel has it: it saves its input, and 1 / rms of every row.

    torch has no such kernel for a CPU, and there saves the normed input as well. Only shapes count here.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x[..., :1].clone(), weight)  # (..., C), (..., 1), (C,)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), grad.new_empty(grad.size(-1))


def save_as_a_gpu(model):
    """Makes a model on the CPU save what it saves on a GPU.

    Attention is computed without dropout: a GPU draws its random numbers again, a CPU saves them. And without
    windows: flex attention saves what causal attention saves, a CPU's dense masks take T x T more each. And
    more logits exist at once.
    """
    model.head_chunk *= MORE_LOGITS
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.weight is not None:
            norm = functools.partial(lambda x, weight: FusedNorm.apply(upcast(x), weight))
            module.forward = functools.partial(norm, weight=module.weight)
    for block in model.blocks():
        block.attn.dropout = 0.0
    model.window = model.config.block_size


def is_of_a_weight(x):
    """Returns whether a tensor was made of one parameter alone, by casting or transposing it."""
    function = x.grad_fn
    while function is not None and len(function.next_functions) == 1:
        function = function.next_functions[0][0]
    return function is not None and hasattr(function, 'variable')


def activations(config, c, dtype, n_loop, as_gpu=True):
    """Returns the Activations of a micro-batch of (batch_size, block_size) tokens with n_loop loops.

    config: a GPTConfig; c: the run's keys; dtype: of matrix products. as_gpu: as on a GPU, False = as on a
    CPU. Blocks are not compiled. Rows of up to 256 tokens have their attention in float32, as on a CPU.
    """
    with FakeTensorMode():
        model = GPT(config)
        set_trained_parts(model, OBJECTIVE[c.objective])
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # gradients are counted elsewhere
        if as_gpu:
            save_as_a_gpu(model)
        tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
        saved, copies = set(), set()  # addresses of storages

        def pack(x):
            storage = x.untyped_storage()
            for part in [saved, copies] if is_of_a_weight(x) else [saved]:
                part.add(storage._cdata)
                weakref.finalize(storage, part.discard, storage._cdata)  # another storage can get its address
            return x

        with LiveBytes({x.untyped_storage()._cdata for x in tensors}) as live:
            idx = torch.zeros(c.batch_size, c.block_size, dtype=torch.long)  # (B, T)
            with saved_tensors_hooks(pack, lambda x: x), autocast('cpu', dtype):
                loss = TrainingLoss(model, c)(idx, idx, n_loop)[0]
            kept, cast = (sum(live.sizes.get(address, 0) for address in part) for part in (saved, copies))
            loss.backward()
    return Activations(kept, cast, live.peak)
