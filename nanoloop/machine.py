"""
The machine a script runs on: device, precision, compilation, ranks, peak FLOP/s and memory.
"""

import contextlib
import functools
import math
import os
import re
import resource
import signal
import sys
import time
import types

import torch
import torch.distributed as dist

from nanoloop import LOCAL_RANK, RANK, WORLD
from nanoloop.checks import check
from nanoloop.parallel import largest_of_ranks

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def choose_device(device):
    """The torch.device for a key's value, and why. Raises ValueError for one that is not there."""
    if device == 'auto':
        found = [kind for kind in ('cuda', 'mps') if getattr(torch, kind).is_available()]
        device, why = (found or ['cpu'])[0], 'auto'
    else:
        why = 'asked for'
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    check(kind in ('cuda', 'mps', 'cpu'), 'device', device, 'auto, cpu, cuda, cuda:N or mps')
    check(
        kind == 'cpu' or getattr(torch, kind).is_available(),
        'device',
        device,
        f'a device of this machine, it has no {kind}',
    )
    check(WORLD == 1 or device in ('cuda', 'cpu'), 'device', device, 'cuda or cpu for several processes')
    local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    gpus = torch.cuda.device_count()
    check(kind == 'cpu' or local == 1 or local <= gpus, 'nproc_per_node', local, f'at most the {gpus} GPUs')
    if device == 'cuda':
        device = f'cuda:{LOCAL_RANK}'
    found = torch.device(device)
    check(
        kind != 'cuda' or (found.index or 0) < torch.cuda.device_count(),
        'device',
        device,
        f'below cuda:{torch.cuda.device_count()}',
    )
    return found, why


def choose_dtype(dtype, kind):
    """The dtype of matrix products, and why: bfloat16 where the hardware has it, also on CPUs."""
    check(dtype in ('auto', *DTYPES), 'dtype', dtype, f'one of auto, {", ".join(DTYPES)}')
    if dtype != 'auto':
        return DTYPES[dtype], 'asked for'
    if kind == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, 'the GPU has it') if native else (torch.float16, 'the GPU has no bfloat16')
    if kind == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, 'the CPU has it'
    return torch.float32, f'no fast bfloat16 on this {kind}'


def autocast(kind, dtype):
    """The context in which matrix products run in dtype.

    Without torch's cache of cast weights: it would sum the gradient of a head in chunks in the low precision,
    and reuse what was cast without a graph in the iterations before the last bptt_k.
    """
    low = dtype != torch.float32
    return torch.autocast(kind, dtype=dtype if low else torch.bfloat16, enabled=low, cache_enabled=False)


def compiler_fault(kind):
    """Why torch.compile does not work here, None if it does."""
    from torch._inductor import config as inductor  # half a second that only compiling needs

    for trust in (True, None):  # that the C++ compiler knows the CPU's instructions: trying takes 6 s
        try:
            inductor.cpp.vec_isa_ok = trust
            torch.compile(torch.relu)(torch.ones(8, device=kind))
            return None
        except Exception as error:  # no C++ compiler, no Python headers, no triton, ...: many types
            fault = str(error).strip().splitlines()[0][:100]
    return fault


def choose_compile(compile, kind, work):
    """Whether to compile the blocks, and why: where a compiler works and the run is long enough to pay."""
    check(compile in ('auto', True, False), 'compile', compile, 'True, False or auto')
    short = kind == 'cpu' and work < 5e8  # 2 cores win 20 to 30 ns per element
    if compile == 'auto' and (kind == 'mps' or short):
        return False, 'not tried on mps' if kind == 'mps' else 'so short a run does not pay for it'
    fault = compiler_fault(kind) if compile else 'asked for'
    check(compile != True or not fault, 'compile', True, f'False: {fault}')  # noqa: E712, auto is no True
    return not fault, fault or 'torch.compile works here'


def compile_step(function, device):
    """Returns the compiled function, for one that is called once per generated token."""
    return torch.compile(function, options={'cpp_wrapper': device.type == 'cpu'})


ONEDNN_MIN_TOKENS = 3


@contextlib.contextmanager
def onednn_for(n_tokens):
    """Switches oneDNN off for fewer than ONEDNN_MIN_TOKENS tokens.

    On CPUs matrix products of a single bfloat16 token are then 1.5 times as fast.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and n_tokens >= ONEDNN_MIN_TOKENS
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


# dense bfloat16 FLOP/s by a part of the device's name, the more special first; from the makers' data sheets
PEAK_FLOPS = {
    'B200': 2250e12,
    'GH200': 989e12,
    'H200 NVL': 835e12,
    'H200': 989e12,
    'H100 NVL': 835e12,
    'H100 PCIe': 756e12,
    'H100': 989e12,
    'A100': 312e12,
    'L40S': 362e12,
    'L4': 121e12,
    'A10G': 70e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
    'V100': 125e12,
    'T4': 65e12,
}


def peak_flops(m):
    """FLOP/s of matrix products at the dtype of the run, None where the table does not know."""
    if m.kind != 'cuda' or m.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(m.device)
    if re.search(r'\b(MIG|Laptop|Ti|SUPER|D)\b', name):  # parts and relatives of the cards below
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf'\b{part}\b', name)), None)


def peak_memory(m):
    """Bytes: of the device's allocator on CUDA, else of the process."""
    if m.kind == 'cuda':
        return torch.cuda.max_memory_allocated(m.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def setup(config, work=math.inf):
    """Joins the process group and settles where and how to compute; config: TrainConfig's part `machine`.

    work: elements that will pass through the layers, which decides whether compiling pays. Returns a
    namespace: device, kind, dtype, compile, peak (FLOP/s or None), autocast (a context), rank, world,
    cpu_group (where ranks agree), and line (what was chosen, and why).
    """
    m = types.SimpleNamespace(rank=RANK, world=WORLD, cpu_group=None)
    m.device, why_device = choose_device(config.device)
    m.kind = m.device.type
    m.dtype, why_dtype = choose_dtype(config.dtype, m.kind)
    backend = {'cuda': 'nccl'}.get(m.kind, 'gloo') if config.backend == 'auto' else config.backend
    check(backend in ('gloo', 'nccl'), 'backend', backend, 'auto, gloo or nccl')
    check(backend != 'nccl' or m.kind == 'cuda', 'backend', backend, f'gloo, nccl does not work on {m.kind}')
    if m.kind == 'cuda':
        torch.cuda.set_device(m.device)
        torch.set_float32_matmul_precision('high')  # TensorFloat-32, as in nanoGPT
    if config.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if WORLD > 1:
        dist.init_process_group(backend)
        m.cpu_group = dist.new_group(backend='gloo')
    m.peak = config.peak_flops or peak_flops(m)
    m.compile, why_compile = choose_compile(config.compile, m.kind, work)
    if m.compile:  # all blocks count against one limit, and beyond it dynamo would run eagerly without a word
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(config.seed)
    m.autocast = functools.partial(autocast, m.kind, m.dtype)
    name = f' {torch.cuda.get_device_name(m.device)}' if m.kind == 'cuda' else ''
    m.line = (
        f'device: {m.device}{name} ({why_device}), dtype: {str(m.dtype)[6:]} ({why_dtype}), '
        f'compile: {m.compile} ({why_compile}), processes: {WORLD}' + (f' ({backend})' if WORLD > 1 else '')
    )
    return m


class Signals:
    """SIGTERM and SIGINT raise a flag, read where the run can be saved. Repeats are ignored, since torchrun
    sends each several times to its workers; a Ctrl-C more than 2 s after the first signal kills."""

    def __init__(self, m):
        self.m, self.number, self.agreed, self.first = m, 0, 0, 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():  # torchrun goes on sending until all workers have left
            signal.signal(number, signal.SIG_IGN if self.agreed and self.m.world > 1 else handler)
        if self.number and isinstance(error, Exception) and not isinstance(error, ValueError | OSError):
            # the signal has reached a process that this one needs: a compiler, another rank
            print(f'stopped by {signal.Signals(self.number).name} ({kind.__name__})', file=sys.stderr)
            sys.exit(128 + self.number)

    def note(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.first > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self.first = number, time.monotonic()

    def stopped(self):
        """The signal that some rank got, 0 if none did. All ranks call this at the same places."""
        self.agreed = largest_of_ranks(self.m, self.number)
        return self.agreed
