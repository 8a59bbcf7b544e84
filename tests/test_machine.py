"""The machine: what a key leaves to the program is chosen well, signals end a run in order, ranks agree."""

import os
import socket
import types

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import nanoloop
from nanoloop import machine, parallel, report
from nanoloop.machine import Machine
from train import TrainConfig

BF16 = torch.bfloat16
CPU = torch.device('cpu')


def cpu_machine(rank=0, world=1, dtype=torch.float32):
    return Machine(rank, world, CPU, 'cpu', dtype)


# -----------------------------------------------------------------------------
# device, precision, compilation


def pretend(monkeypatch, gpus, world=1, local=0):
    """Makes the machine look as if it had so many GPUs, and this process like one of `world` on it."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.mps, 'is_available', lambda: False)
    monkeypatch.setattr(machine, 'WORLD', world)
    monkeypatch.setattr(machine, 'LOCAL_RANK', local)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(world))


@pytest.mark.parametrize(
    'device, gpus, world, local, chosen',
    [
        ('auto', 0, 1, 0, ('cpu', 'auto')),
        ('auto', 2, 1, 0, ('cuda:0', 'auto')),
        ('auto', 2, 2, 1, ('cuda:1', 'auto')),
        ('cuda', 2, 2, 1, ('cuda:1', 'asked for')),
        ('cuda:1', 2, 1, 0, ('cuda:1', 'asked for')),
        ('cpu', 2, 1, 0, ('cpu', 'asked for')),
        ('cpu', 1, 4, 3, ('cpu', 'asked for')),
    ],
)
def test_every_process_gets_its_own_device(monkeypatch, device, gpus, world, local, chosen):
    pretend(monkeypatch, gpus, world, local)
    name, why = chosen
    assert machine.choose_device(device) == (torch.device(name), why)


@pytest.mark.parametrize(
    'device, gpus, world, message',
    [
        ('tpu', 1, 1, "device='tpu', expected auto, cpu, cuda, cuda:N or mps"),
        ('meta', 1, 1, "device='meta', expected auto, cpu, cuda, cuda:N or mps"),
        ('cuda', 0, 1, "device='cuda', expected a device of this machine, it has no cuda"),
        ('mps', 1, 1, "device='mps', expected a device of this machine, it has no mps"),
        ('cuda:1', 1, 1, "device='cuda:1', expected below cuda:1"),
        ('cuda:1', 4, 2, "device='cuda:1', expected cuda or cpu for several processes"),
        ('auto', 1, 2, 'nproc_per_node=2, expected at most the 1 GPUs'),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, gpus, world, message):
    pretend(monkeypatch, gpus, world)
    with pytest.raises(ValueError) as error:
        machine.choose_device(device)
    assert str(error.value) == message


@pytest.mark.parametrize('has, dtype', [(True, BF16), (False, torch.float32)])
def test_bfloat16_is_chosen_where_the_cpu_has_it(monkeypatch, has, dtype):
    for feature in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
        monkeypatch.setattr(torch.cpu, feature, lambda: has)
    assert machine.choose_dtype('auto', 'cpu')[0] == dtype


@pytest.mark.parametrize('native, dtype', [(True, BF16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: native)
    assert machine.choose_dtype('auto', 'cuda')[0] == dtype
    assert machine.choose_dtype('float32', 'cuda') == (torch.float32, 'asked for')


@pytest.mark.parametrize(
    'compile, kind, work, fault, chosen',
    [
        ('auto', 'cpu', 1e8, None, False),
        ('auto', 'cpu', 1e10, None, True),
        ('auto', 'cpu', 1e10, 'no compiler', False),
        ('auto', 'cuda', 1, None, True),
        ('auto', 'mps', 1e10, None, False),
        (True, 'cpu', 1, None, True),
        (False, 'cuda', 1e10, None, False),
    ],
)
def test_blocks_are_compiled_where_it_works_and_pays(monkeypatch, compile, kind, work, fault, chosen):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: fault)
    assert machine.choose_compile(compile, kind, work)[0] is chosen


def test_asking_for_what_cannot_compile_is_refused(monkeypatch):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: 'no compiler')
    with pytest.raises(ValueError, match='compile=True, expected False: no compiler'):
        machine.choose_compile(True, 'cpu', 1e10)


@pytest.mark.parametrize('failures, fault', [(0, None), (1, None), (2, 'no compiler')])
def test_a_fault_of_the_compiler_counts_after_probing_the_cpu(monkeypatch, failures, fault):
    from torch._inductor import config as inductor

    assumed = []

    def compile(function):
        assumed.append(inductor.cpp.vec_isa_ok)
        if len(assumed) <= failures:
            raise RuntimeError('no compiler\nin detail')
        return function

    monkeypatch.setattr(torch, 'compile', compile)
    with inductor.patch({'cpp.vec_isa_ok': None}):
        assert machine.compiler_fault('cpu') == fault
    assert assumed == [True, None][: failures + 1]


def test_autocast_keeps_no_copies_of_weights():
    with machine.autocast('cpu', BF16):
        assert torch.is_autocast_enabled('cpu') and not torch.is_autocast_cache_enabled()
    with machine.autocast('cpu', torch.float32):
        assert not torch.is_autocast_enabled('cpu')


# -----------------------------------------------------------------------------
# peaks


@pytest.mark.parametrize(
    'name, peak',
    [
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H100 NVL', 835e12),
        ('NVIDIA H200', 989e12),
        ('NVIDIA H200 NVL', 835e12),
        ('NVIDIA GH200 480GB', 989e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None),
        ('NVIDIA L4', 121e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA L40', None),
        ('NVIDIA GeForce RTX 4090', 165e12),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
        ('NVIDIA GeForce RTX 3090 Ti', None),
        ('NVIDIA GeForce RTX 4090 D', None),
        ('Tesla T4', 65e12),
        ('NVIDIA T400', None),
    ],
)
def test_a_device_has_its_own_peak_or_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    m = types.SimpleNamespace(kind='cuda', device='cuda:0', dtype=BF16)
    assert machine.peak_flops(m) == peak
    m.dtype = torch.float32
    assert machine.peak_flops(m) is None


def test_memory_is_in_bytes():
    used = machine.peak_memory(cpu_machine())
    assert 2**26 < used < machine.total_memory(cpu_machine()) < 2**44  # torch alone takes more than 64 MiB


# -----------------------------------------------------------------------------
# the machine of a run


def test_setting_up_guards_against_silent_recompilation_and_turns_on_determinism(monkeypatch):
    monkeypatch.setattr(machine, 'compiler_fault', lambda kind: None)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, optimize_ddp=True):
        m = machine.setup(TrainConfig(device='cpu', compile=True, deterministic=True))
        assert torch._dynamo.config.recompile_limit == 64 and torch._dynamo.config.fail_on_recompile_limit_hit
        assert not torch._dynamo.config.optimize_ddp
    assert m.compile and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_setting_up_seeds_torch_and_says_what_was_chosen():
    config = TrainConfig(device='cpu', dtype='bfloat16', compile=False, seed=5, peak_flops=1e9)
    m = machine.setup(config)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert (m.rank, m.world, m.cpu_group, m.device, m.kind) == (0, 1, None, CPU, 'cpu')
    assert (m.dtype, m.compile, m.peak) == (BF16, False, 1e9)
    expected = (
        'device: cpu (asked for), dtype: bfloat16 (asked for), compile: False (asked for), processes: 1'
    )
    assert m.line == expected


def test_what_bit_exactness_needs_is_in_the_fingerprint(monkeypatch):
    m = cpu_machine()
    before = m.fingerprint()
    monkeypatch.setattr(torch, 'get_num_threads', lambda: before['threads'] + 1)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'another')
    config, state = dict(seed=1), dict(config=dict(seed=1), machine=before)
    lines = [*report.differences(config, m.fingerprint(), state)]
    n = before['threads']
    assert f'not bit-exact: threads was {n}, is {n + 1}' in lines and len(lines) == 2
    older = dict(state, machine={'device': 'cpu'})  # a checkpoint that says nothing of threads
    assert not [*report.differences(config, m.fingerprint(), older)]


@pytest.mark.parametrize(
    'environ, place',
    [
        ({}, (0, 1, 0)),
        (dict(RANK='1'), (0, 1, 0)),
        (dict(RANK='', WORLD_SIZE=''), (0, 1, 0)),
        (dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1'), (0, 1, 0)),  # nobody to talk to
        (dict(RANK='x', WORLD_SIZE='2', LOCAL_RANK='1', MASTER_ADDR='a', MASTER_PORT='1'), (0, 1, 0)),
        (dict(RANK='5', WORLD_SIZE='4', LOCAL_RANK='1', MASTER_ADDR='a', MASTER_PORT='1'), (0, 1, 0)),
        (dict(RANK='3', WORLD_SIZE='4', LOCAL_RANK='1', MASTER_ADDR='a', MASTER_PORT='1'), (3, 4, 1)),
    ],
)
def test_a_place_is_what_torchrun_says_or_none(environ, place):
    assert nanoloop.read_place(environ) == place


def test_a_place_that_is_ignored_is_told(monkeypatch):
    assert 'are ignored' not in machine.setup(TrainConfig(device='cpu', compile=False)).line
    monkeypatch.setenv('RANK', '1')
    assert (
        'are ignored: without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)'
        in machine.setup(TrainConfig(device='cpu')).line
    )


def test_processes_that_another_program_left_in_the_environment_are_not_counted(monkeypatch):
    pretend(monkeypatch, gpus=1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    assert machine.choose_device('cuda') == (torch.device('cuda:0'), 'asked for')


def test_a_machine_casts_products_copies_tensors_and_scales_float16():
    m = cpu_machine(dtype=BF16)
    with m.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16
    assert m.to_device(torch.ones(2)).device == CPU
    assert not m.scaler().is_enabled() and cpu_machine(dtype=torch.float16).scaler().is_enabled()


def test_a_gpu_gets_tensors_from_pinned_memory_without_waiting():
    calls = []
    whole = types.SimpleNamespace(
        pin_memory=lambda: types.SimpleNamespace(to=lambda *args, **keys: calls.append((args, keys)))
    )
    tensor = types.SimpleNamespace(contiguous=lambda: whole)  # an expanded tensor has no pinned copy
    Machine(0, 1, 'cuda:0', 'cuda', BF16).to_device(tensor)
    assert calls == [(('cuda:0',), dict(non_blocking=True))]


def test_mps_gets_no_float64():
    low = types.SimpleNamespace(to=lambda device: 'copied')
    tensor = types.SimpleNamespace(dtype=torch.float64, float=lambda: low)
    assert Machine(0, 1, 'mps', 'mps', torch.float32).to_device(tensor) == 'copied'


def test_a_compiled_step_of_a_gpu_is_a_graph_whose_results_are_copied(monkeypatch):
    options, graph = [], (torch.ones(2), torch.zeros(3))
    monkeypatch.setattr(torch, 'compile', lambda function, **keys: options.append(keys) or function)
    step = machine.compile_step(lambda result: result, torch.device('cuda'))
    assert options == [dict(mode='reduce-overhead')]
    for copy, x in zip((*step(graph), step(graph[0])), (*graph, graph[0]), strict=True):
        assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    assert step((graph[0], None))[1] is None


# -----------------------------------------------------------------------------
# ranks


@pytest.mark.parametrize(
    'backend, kind, chosen', [('auto', 'cuda', 'nccl'), ('auto', 'cpu', 'gloo'), ('gloo', 'cuda', 'gloo')]
)
def test_gradients_travel_by_the_backend_of_their_device(backend, kind, chosen):
    assert parallel.choose_backend(backend, kind) == chosen


@pytest.mark.parametrize('backend, message', [('mpi', 'auto, gloo or nccl'), ('nccl', 'nccl does not work')])
def test_a_backend_that_does_not_work_is_refused(backend, message):
    with pytest.raises(ValueError, match=f"backend='{backend}', expected .*{message}"):
        parallel.choose_backend(backend, 'cpu')


def test_one_process_agrees_with_itself():
    m, module, tensor = cpu_machine(), torch.nn.Linear(2, 2), torch.ones(2)
    parallel.join(m, 'gloo')
    assert parallel.reduce_sum(m, tensor).tolist() == [1, 1] and m.cpu_group is None
    assert (parallel.max_over_ranks(m, -3), parallel.sum_over_ranks(m, 7)) == (-3, 7)
    assert parallel.wrap(module, m) is module
    parallel.leave(m)


def check_agreement(rank, port):
    """Runs in each of two processes."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    m = cpu_machine(rank, 2)
    parallel.join(m, 'gloo')
    tensor = torch.tensor([1.0, rank])
    assert parallel.reduce_sum(m, tensor) is tensor and tensor.tolist() == [2, 1]
    assert parallel.max_over_ranks(m, 10 - rank) == 10 and parallel.sum_over_ranks(m, 3 + rank) == 7
    wrapped = parallel.wrap(torch.nn.Linear(1, 1), m)
    assert isinstance(wrapped, DistributedDataParallel) and not wrapped.broadcast_buffers
    parallel.leave(m)
    assert not torch.distributed.is_initialized()


def test_two_processes_agree():
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(check_agreement, (port,), nprocs=2, start_method='fork')


def test_processes_that_do_not_meet_are_told(monkeypatch):
    def fail(*args, **options):
        raise torch.distributed.DistNetworkError('no route\ntrace of C++')

    monkeypatch.setenv('MASTER_ADDR', 'far')
    monkeypatch.setenv('MASTER_PORT', '7')
    monkeypatch.setattr(parallel, 'rendezvous', fail)
    with pytest.raises(OSError, match='^the 2 processes do not meet at far:7: no route$'):
        parallel.join(cpu_machine(world=2), 'gloo')


def test_a_failure_on_the_first_rank_ends_all(monkeypatch):
    def fails():
        raise OSError('disk full')

    monkeypatch.setattr(parallel, 'max_over_ranks', lambda m, value: 1)
    with pytest.raises(OSError, match='disk full'):
        parallel.on_rank0(cpu_machine(), fails)
    with pytest.raises(SystemExit) as stop:
        parallel.on_rank0(cpu_machine(rank=1), fails)
    assert stop.value.code == 1
