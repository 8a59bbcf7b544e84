"""
Keys from the command line, and the machine a script runs on.

    python train.py config/a.py config/b.py --key=value   files are executed in order, then flags are applied

A script's keys are the fields of its dataclasses: name, type, default, and the comment that --help prints.
A config file is Python that assigns some of them; it sees all values so far, but no flag: those come last.
include('other.py') in it takes over the keys of a file beside it.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import math
import os
import re
import resource
import signal
import sys
import types
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed as dist

from checks import Mistake, check, typed

ROOT = Path(__file__).resolve().parent
RENAMED = {'n_layer': ('n_prelude', 'n_block', 'n_coda')}  # nanoGPT's keys that are others here


class Config(dict):
    """The value of every key, also as attributes; given: the keys that were set by a file or a flag."""

    given = frozenset()
    __getattr__ = dict.__getitem__

    def build(self, cls):
        """cls(**its keys), the values it settled on written back. Raises ValueError if cls refuses them."""
        built = cls(**{key: self[key] for key in get_type_hints(cls)})
        for key in (
            self.given & get_type_hints(cls).keys()
        ):  # not replaced without a word, but that name for two
            settled = getattr(built, key)
            check(self[key] in (settled, 'inject_random'), key, self[key], f'{settled!r} with the other keys')
        self.update(vars(built))
        return built


def configure(defaults, argv, out=None):
    """The Config of a script: defaults (dataclasses), changed by the files and flags in argv.

    Raises ValueError for a name that is no key, a value of another type, and a file that does not run. Prints
    what was changed to out (None: stdout).
    """
    out = out if RANK == 0 else open(os.devnull, 'w')
    hints = {key: hint for cls in defaults for key, hint in get_type_hints(cls).items()}
    config = Config((key, getattr(cls, key)) for cls in defaults for key in get_type_hints(cls))
    if {'--help', '-h'} & set(argv):
        print(help_text(defaults))
        sys.exit(0)
    given = set()
    for arg in argv:
        if not arg.startswith('-'):
            path = find_file(arg)
            print(f'Overriding config with {arg}:', file=out)
            for key, value in run_file(path, config, hints).items():
                config[key] = typed(f'{arg}: {key}', value, hints[key])
                given.add(key)
                print(f'    {key} = {config[key]!r}', file=out)
        else:
            key, equals, text = arg.removeprefix('--').partition('=')
            wanted = f'--{key if key in hints else "key"}=value (with the equals sign) or a config file'
            check(equals and arg.startswith('--'), 'argument', arg, wanted)
            check_key(key, hints, '')
            config[key] = parse(key, text, hints[key])
            given.add(key)
            print(f'Overriding: {key} = {config[key]!r}', file=out)
    config.given = frozenset(given)
    return config


def find_file(name):
    """A config file, looked up from the working directory, then from the repository."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    meant = next((path for path in (f'{name}.py', f'config/{name}.py') if (ROOT / path).is_file()), None)
    hint = f'did you mean {meant}?' if meant else 'flags look like --key=value'
    raise Mistake(f'there is no config file {name} ({hint})')


class Assigned(dict):
    """The locals of a config file: note what is assigned, and pass it on to the globals."""

    def __init__(self, names):
        self.names = names

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.names[key] = value


def run_file(path, config, hints):
    """The keys that a config file assigns. It is executed with every key's value so far as its globals."""
    names = dict(config, __file__=str(path))
    assigned = Assigned(names)

    def include(name):
        exec(compile((path.parent / name).read_text(), path.parent / name, 'exec'), names, assigned)

    names['include'] = include
    try:
        exec(compile(path.read_text(), path, 'exec'), names, assigned)
    except Exception as error:
        frames = inspect.getinnerframes(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, 'lineno', '?')
        raise Mistake(f'{path}, line {line}: {type(error).__name__}: {error}') from None
    helpers = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
    found = {key: names[key] for key in assigned if key[:1] != '_' and not isinstance(names[key], helpers)}
    for key in found:
        check_key(key, hints, f'{path}: ')
    return found


def check_key(key, hints, where):
    if key not in hints:
        close = RENAMED.get(key) or difflib.get_close_matches(key, hints, n=1)
        hint = f', did you mean {" or ".join(map(repr, close))}?' if close else ', see --help'
        raise Mistake(f'{where}unknown key {key!r}{hint}')


def parse(key, text, hint):
    """A flag's value: a Python literal of the key's type, or where str is accepted the text itself."""
    if hint is not str:
        literal = {'true': 'True', 'false': 'False'}.get(text, text).strip()
        with contextlib.suppress(ValueError, SyntaxError):
            return typed(key, ast.literal_eval(literal), hint)
    return typed(key, text, hint)


def help_text(defaults):
    """Every key with its default and comment, in the order and sections of the source."""
    lines = [inspect.getmodule(defaults[0]).__doc__]
    for cls in defaults:
        for line in inspect.getsource(cls).splitlines():
            field = re.match(r'    (\w+): [^=]+ = (.+?)(?:  # (.*))?$', line)
            if field and field[1] in get_type_hints(cls):
                lines.append(f'  --{field[1]}={field[2]}'.ljust(40) + f'  {field[3] or ""}')
            elif line.startswith('    # '):
                lines.append(line[6:])
    return '\n'.join(lines)


def command(main):
    """Makes main(argv) exit with 0, 1 if the machine failed, or 2 for a user's mistake, told in one line."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else list(argv))
        except Mistake as error:
            failure, status, told = error, 2, RANK == 0 or not error.alike
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # python sample.py | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + signal.SIGPIPE)
        except (OSError, RuntimeError, MemoryError) as error:  # torch's CPU out of memory has no class
            memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if isinstance(error, RuntimeError) and not memory:
                raise
            failure, status, told = error, 1, True
        if told:
            script = Path(inspect.getfile(main)).name
            print(
                f'{script}: {" ".join(str(failure).split()) or "out of memory"}', file=sys.stderr, flush=True
            )
        sys.exit(status)

    return wrapped


def tell(text):
    """Prints, and goes on without stdout when its reader is gone, as tee is after a Ctrl-C."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# -----------------------------------------------------------------------------
# the machine: device, precision, compilation, ranks

RANK, WORLD, LOCAL_RANK = (
    int(os.environ.get(name, n)) for name, n in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0))
)
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
