"""
The machine that a script runs on: device, precision, compilation, peak FLOP/s and memory.
"""

import functools
import math
import mmap
import os
import re
import resource
import sys
from dataclasses import dataclass
from typing import Annotated

import torch

from model import WINDOWS
from nanoloop import LOCAL_RANK, PLACE, RANK, WORLD
from nanoloop.checks import OneOf, check
from nanoloop.parallel import choose_backend, join
from nanoloop.shared_cpu import share_cpu
from nanoloop.windows import flex_windows

KINDS = ('cuda', 'mps', 'cpu')  # of devices; device=auto takes the first one that the machine has
CompileMode = Annotated[bool | str, OneOf((True, False, 'auto'))]
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# -----------------------------------------------------------------------------
# choices that a key can leave to the program: each function returns (the choice, why)


def choose_device(device):
    """Returns (torch.device, why) for the key `device`. Raises UserError if this machine does not have it."""
    why = 'asked for'
    if device == 'auto':
        device, why = next(kind for kind in KINDS if is_available(kind)), 'auto'
    kind = kind_of(device)
    check(kind in KINDS, 'device', device, 'auto, cpu, cuda, cuda:N or mps')
    check(is_available(kind), 'device', device, f'a device of this machine, it has no {kind}')
    check(WORLD == 1 or device in ('cuda', 'cpu'), 'device', device, 'cuda or cpu for several processes')
    return choose_gpu(device) if kind == 'cuda' else torch.device(device), why


def kind_of(device):
    """Returns cuda for 'cuda:1', and None for a name that torch does not know."""
    try:
        return torch.device(device).type
    except RuntimeError:
        return None


def is_available(kind):
    return kind == 'cpu' or getattr(torch, kind).is_available()


def choose_gpu(device):
    """Returns the torch.device of a GPU: of this process for 'cuda', the given one for 'cuda:N'."""
    gpus = torch.cuda.device_count()
    processes = int(os.environ.get('LOCAL_WORLD_SIZE') or 1) if WORLD > 1 else 1
    check(processes == 1 or processes <= gpus, 'nproc_per_node', processes, f'at most the {gpus} GPUs')
    if device == 'cuda':
        device = f'cuda:{LOCAL_RANK}'
    gpu = torch.device(device)
    check((gpu.index or 0) < gpus, 'device', device, f'below cuda:{gpus}')
    return gpu


def choose_dtype(dtype, kind):
    """Returns (dtype of matrix products, why). auto: bfloat16 where it is native, else float16 on a GPU."""
    check(dtype in ('auto', *DTYPES), 'dtype', dtype, f'one of auto, {", ".join(DTYPES)}')
    if dtype != 'auto':
        return DTYPES[dtype], 'asked for'
    if kind == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, 'the GPU has it') if native else (torch.float16, 'the GPU has no bfloat16')
    if kind == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, 'the CPU has it'
    return torch.float32, f'no fast bfloat16 on this {kind}'


def choose_compile(compile, kind, work):
    """Returns (whether to compile, why): with auto, where a compiler works and the run is long enough to pay.

    work: the numbers that will pass through the layers, tokens * layers * n_embd.
    """
    if compile == 'auto' and kind == 'mps':
        return False, 'not tried on mps'
    if compile == 'auto' and kind == 'cpu' and work < 5e8:  # 2 cores gain 20 to 30 ns per number
        return False, 'so short a run does not pay for it'
    if not compile:
        return False, 'asked for'
    fault = compiler_fault(kind)
    check(compile == 'auto' or not fault, 'compile', True, f'False: {fault}')
    return not fault, fault or 'torch.compile works here'


def compiler_fault(kind):
    """Returns why torch.compile does not work on a kind of device, None if it works."""
    from torch._inductor import config as inductor  # half a second, which only compiling needs

    # Probing whether the C++ compiler supports this CPU's vector instructions takes 6 s. So assume first that
    # it does (True). If compiling then fails, let inductor probe (None).
    for vector_instructions in (True, None):
        inductor.cpp.vec_isa_ok = vector_instructions
        try:
            torch.compile(torch.relu)(torch.ones(8, device=kind))
            return None
        except Exception as error:  # no C++ compiler, no Python headers, no triton: torch raises many types
            fault = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
    return fault


@functools.cache
def can_compile(kind):
    """Returns whether torch.compile works on a kind of device. It is tried once."""
    return compiler_fault(kind) is None


WINDOWS['cuda'] = functools.partial(flex_windows, works=functools.partial(can_compile, 'cuda'))


# times as many logits are computed at once on a GPU: else reading the head's matrix, and adding to its
# gradient, takes longer for every chunk than the products
MORE_LOGITS = 4


def prepare_training(model, m):
    """Prepares a model that is on the device of m for training: its blocks are compiled if m says so.

    On a GPU also the loss of a chunk of logits is compiled, whose steps would each read and write all logits.
    """
    gpu = m.kind == 'cuda'
    if gpu:
        model.head_chunk *= MORE_LOGITS
    if m.compile:
        for block in model.blocks():
            block.compile()
        if gpu:
            model.nll = torch.compile(model.nll)


def autocast(kind, dtype):
    """Returns the context in which matrix products run in dtype.

    It goes without torch's cache of cast weights. With it the gradient of a head computed in chunks would be
    summed in the low precision, and weights that were cast where no graph is recorded, in the loops before
    the last bptt_k, would be used again where one is.
    """
    low = dtype != torch.float32
    return torch.autocast(kind, dtype=dtype if low else torch.bfloat16, enabled=low, cache_enabled=False)


def lazy_zeros(shape, dtype, device):
    """Returns zeros of a shape. On a CPU a part of them takes memory, and time, when it is first written."""
    if device.type != 'cpu':
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def to_device(tensor, device):
    """Returns a CPU tensor's copy on the device. On a GPU the host does not wait for it."""
    if torch.device(device).type == 'cuda':
        # contiguous: pin_memory refuses an expanded tensor
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    if torch.device(device).type == 'mps' and tensor.dtype == torch.float64:
        tensor = tensor.float()  # all that MPS has
    return tensor.to(device)


def compile_step(function, device):
    """Returns the function compiled: one that is called for every token, and returns a tensor or a tuple.

    On a GPU it runs as a CUDA graph: the host launches the whole step at once, and not its hundreds of small
    kernels one by one. A graph is recorded for every new shape of the arguments, in the second call with it.
    The arguments are copied to where they were in the recorded call. So what the function changes must keep
    its address, and torch must be told by keep_address: else it warns, and goes on without graphs.
    """
    if device.type != 'cuda':
        return torch.compile(function, options={'cpp_wrapper': device.type == 'cpu'})
    compiled = torch.compile(function, mode='reduce-overhead')  # torch's name of CUDA graphs

    def copy(x):  # the next call overwrites a graph's results
        return x.clone() if torch.is_tensor(x) else x

    def step(*args):
        torch.compiler.cudagraph_mark_step_begin()  # the results of the call before are not needed any more
        x = compiled(*args)
        return tuple(map(copy, x)) if isinstance(x, tuple) else copy(x)

    return step


def keep_address(tensor):
    """Tells torch.compile that a tensor stays where it is: a CUDA graph can change it in place.

    A call with a tensor elsewhere is not compiled anew; on a GPU a graph is recorded for it.
    """
    torch._dynamo.mark_static_address(tensor, guard=False)


# -----------------------------------------------------------------------------
# what a machine can do

# dense bfloat16 FLOP/s by a part of the device's name, the more special name first; from the data sheets
# fmt: off
PEAK_FLOPS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 835e12, 'H200': 989e12,
    'H100 NVL': 835e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'V100': 125e12,
    'L40S': 362e12, 'L4': 121e12, 'A10G': 70e12, 'T4': 65e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
}
# fmt: on


def device_name(m):
    """Returns the name of a GPU, such as NVIDIA H100 80GB HBM3, and what else a device is: cpu, mps."""
    return torch.cuda.get_device_name(m.device) if m.kind == 'cuda' else m.kind


def peak_flops(m):
    """Returns the FLOP/s of matrix products in m.dtype, None if unknown, and in float32."""
    if m.kind != 'cuda' or m.dtype == torch.float32:
        return None
    name = device_name(m)
    if re.search(r'\b(MIG|Laptop|Ti|SUPER|D)\b', name):  # a part or a relative of a card in the table
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf'\b{part}\b', name)), None)


def forget_peak(m):
    """Makes peak_memory count from now on, on a GPU. Returns the bytes that are in use there, elsewhere 0."""
    if m.kind != 'cuda':
        return 0
    torch.cuda.reset_peak_memory_stats(m.device)
    return torch.cuda.memory_allocated(m.device)


def peak_memory(m):
    """Returns the most bytes used so far: on a GPU by torch's allocator, elsewhere by the process."""
    if m.kind == 'cuda':
        return torch.cuda.max_memory_allocated(m.device)
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(m):
    """Returns the bytes of memory that a device has: on a CPU, and with MPS, those of the computer."""
    if m.kind == 'cuda':
        return torch.cuda.get_device_properties(m.device).total_memory
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


# -----------------------------------------------------------------------------
# the machine of a run


@dataclass
class Machine:
    """Where and how a run computes, as setup has decided."""

    rank: int  # this process's number, 0 for the one that prints and saves
    world: int  # number of processes
    device: torch.device
    kind: str  # kind of the device: cuda, mps or cpu
    dtype: torch.dtype  # of matrix products
    cpu_group: object = None  # process group through which the ranks' CPUs talk, None for one process
    shard: bool = False  # whether each process keeps a share of the weights only, see parallel.py
    compile: bool = False  # whether to compile the blocks
    peak: float | None = None  # FLOP/s of matrix products, None if unknown
    line: str = ''  # text: the choices and their reasons

    def autocast(self):
        """Returns the context in which matrix products run in self.dtype."""
        return autocast(self.kind, self.dtype)

    def fingerprint(self):
        """Returns what must be the same for a resumed run to be bit-exact."""
        cpu = dict(cpu=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads())
        return dict(
            device=self.kind,
            dtype=str(self.dtype),
            compile=self.compile,
            processes=self.world,
            torch=str(torch.__version__),
            **(cpu if self.kind == 'cpu' else {}),
        )

    @property
    def copies_in_threads(self):
        """Whether a thread may copy to the device while another one computes. On MPS it was not tried."""
        return self.kind != 'mps'

    def to_device(self, tensor):
        """See the function to_device."""
        return to_device(tensor, self.device)

    def scaler(self):
        """Returns a GradScaler, which float16 needs. With another dtype it changes nothing."""
        return torch.amp.GradScaler(self.kind, enabled=self.dtype == torch.float16)


def setup(config, work=math.inf):
    """Decides where and how to compute, seeds torch, joins the process group. Returns the Machine.

    config: has the keys of train.py's section `machine`. work: see choose_compile. Raises UserError for what
    this machine cannot do.
    """
    device, why_device = choose_device(config.device)
    dtype, why_dtype = choose_dtype(config.dtype, device.type)
    m = Machine(RANK, WORLD, device, device.type, dtype, shard=config.shard and WORLD > 1)
    refused = m.shard and config.compile is True
    check(not refused, 'compile', True, 'False or auto with shard=True and several processes')
    backend = choose_backend(config.backend, m.kind)
    if m.kind == 'cpu':
        share_cpu()
    if m.kind == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TensorFloat-32, as in nanoGPT
    if config.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    join(m, backend)
    m.peak = config.peak_flops or peak_flops(m)
    m.compile, why_compile = choose_compile(config.compile, m.kind, work)
    if m.shard:  # not tried: FSDP2 calls hooks around each block
        m.compile, why_compile = False, 'not with sharded weights'
    if m.compile or m.kind == 'cuda':
        # all blocks share one limit of recompilations, and so do the windows of flex attention
        torch._dynamo.config.recompile_limit = 64
    if m.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # dynamo would silently stop compiling
        torch._dynamo.config.optimize_ddp = False  # it would cut a block in two where a bucket of DDP ends
    torch.manual_seed(config.seed)
    name = f' {device_name(m)}' if m.kind == 'cuda' else ''
    through = f' ({backend}{", weights are sharded" if m.shard else ""})' if WORLD > 1 else ''
    if WORLD == 1 and (os.environ.get('RANK') or '0', os.environ.get('WORLD_SIZE') or '1') != ('0', '1'):
        missing = [name for name in PLACE if not os.environ.get(name)]
        fault = f'without {", ".join(missing)}' if missing else 'they contradict each other'
        through = f' (RANK and WORLD_SIZE in the environment are ignored: {fault})'
    if config.shard and not m.shard:
        through += ', not sharded: one process'
    m.line = (
        f'device: {device}{name} ({why_device}), dtype: {str(dtype)[6:]} ({why_dtype}), '
        f'compile: {m.compile} ({why_compile}), processes: {WORLD}{through}'
    )
    return m
