"""Kernels are launched directly only where Triton's JIT would launch the same ones with the same arguments."""

import inspect

import pytest
import torch
from conftest import HAS_CUDA
from torch import Tensor

pytest.importorskip("triton", minversion="3.6", reason="launches are direct with Triton 3.6 and later")

from triton import knobs

from flash_entmax import entmax_attention
from flash_entmax.backends.triton import launch, plan
from flash_entmax.backends.triton.launch import Direct, Launcher, Signature, ThroughTriton
from flash_entmax.backends.triton.scratch import ALIGNMENT, Scratch
from flash_entmax.backends.triton.tile import Matrix
from flash_entmax.operators import dispatch

KERNELS = object(), object()
CPU = torch.device("cpu")
x = torch.zeros(64)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """As if there were a GPU. Of each launch: the class that made it, the kernel, programs, arguments."""
    launches = []

    def through_triton(kernel, programs, setting, config, *arguments):
        launches.append((ThroughTriton, kernel, programs, arguments))
        return object()

    def direct(self, kernel, programs, setting, *arguments):
        launches.append((Direct, kernel, programs, arguments))

    monkeypatch.setattr(launch, "CAN_BE_DIRECT", True)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(launch, "launch", through_triton)
    monkeypatch.setattr(Direct, "__call__", direct)
    return launches


def opened(launcher: Launcher, *arguments, largest: int = 0):
    return launcher.open(KERNELS, arguments, None, CPU, largest)[0]


def run(launcher: Launcher, *arguments) -> None:
    """Launch both kernels."""
    call = opened(launcher, *arguments)
    for kernel in KERNELS:
        call(kernel, 1, None)


def test_the_interpreter_is_never_passed_by():
    if knobs.runtime.interpret:
        assert not launch.CAN_BE_DIRECT


def test_kernels_are_published_once_all_are_compiled(compiled):
    launcher = Launcher(None)
    first = opened(launcher, x)
    first(KERNELS[0], 1, None)
    assert isinstance(opened(launcher, x), ThroughTriton)
    first(KERNELS[1], 1, None)
    assert isinstance(opened(launcher, x), Direct)


UNUSUAL = {
    "another dtype": (x.half(), None, 16),
    "no tensor": (None, None, 16),
    "one more tensor": (x, x, 16),
    "an address that 16 does not divide": (x[1:], None, 16),
    "a number that 16 does not divide": (x, None, 24),
    "a number of more than 32 bits": (x, None, 2**31),
    "a stride of more than 32 bits": (Matrix(x, 2**31, 16, 16), None, 16),
    "a stride that 16 does not divide": (Matrix(x, 16, 8, 16), None, 16),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_triton_compiles_other_code_for_goes_through_triton(name, compiled):
    launcher = Launcher(None)
    run(launcher, x, None, 16)
    run(launcher, Matrix(x, 0, 0, 16), None, 16)
    assert isinstance(opened(launcher, x[16:], None, 32), Direct)
    assert isinstance(opened(launcher, *UNUSUAL[name]), ThroughTriton)
    assert isinstance(opened(launcher, x, None, 16, largest=2**31), ThroughTriton)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launches_that_somebody_is_told_of_go_through_triton(hook, compiled):
    launcher = Launcher(None)
    run(launcher, x)

    def told(*_):
        pass

    chain = getattr(knobs.runtime, hook)
    chain.add(told)
    try:
        assert isinstance(opened(launcher, x), ThroughTriton)
    finally:
        chain.remove(told)
    assert isinstance(opened(launcher, x), Direct)


def test_debugging_goes_through_triton(compiled, monkeypatch):
    launcher = Launcher(None)
    run(launcher, x)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert isinstance(opened(launcher, x), ThroughTriton)


def test_addresses_stand_where_tensors_stood():
    arguments = x, (None, x[16:], 0.5), Matrix(x[32:], 0, 16, 32), 7
    address = x.data_ptr()
    signature = Signature(arguments, CPU)
    assert signature.arguments == (address, (None, address + 64, 0.5), (address + 128, 0, 16, 32), 7)
    assert signature.dtypes == [torch.float32, None, torch.float32, torch.float32]


def test_scratch_is_one_allocation_of_aligned_arrays():
    scratch = Scratch((torch.int32, 3), (torch.float16, 20), (torch.float32, 0), (torch.float32, 5))
    memory = scratch.allocate(CPU)
    tensors, addresses = scratch.tensors(memory), scratch.addresses(memory)
    assert [(t.dtype, t.numel()) for t in tensors] == list(scratch.arrays)
    assert [t.data_ptr() for t in tensors if t.numel()] == [addresses[0], addresses[1], addresses[3]]
    assert all((address - memory.data_ptr()) % ALIGNMENT == 0 for address in addresses)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [set(t.tolist()) for t in tensors] == [{0}, {1}, set(), {3}]


OPTIONS = {
    "plain": {},
    "learned": {"alpha": torch.tensor([1.3, 1.7], requires_grad=True), "softcap": 20.0},
    "masked": {"window_size": (30, 5), "alibi_slopes": torch.tensor([0.5, 0.1]), "key_mask": torch.ones(2, 100) > 0},
}


@pytest.mark.skipif(HAS_CUDA, reason="as if there were a GPU; test_cuda.py launches on one")
@pytest.mark.parametrize("name", OPTIONS)
def test_direct_launches_have_the_arguments_of_those_through_triton(name, compiled, monkeypatch):
    monkeypatch.setattr(dispatch, "keep", lambda *_: None)  # calls like one that is kept launch from notes
    plan.plan_of.cache_clear()
    launch.launcher_of.cache_clear()
    inputs = [torch.randn(2, 2, 100, 32, requires_grad=True) for _ in range(3)]
    calls = []
    for can_be_direct in (False, True, True):
        monkeypatch.setattr(launch, "CAN_BE_DIRECT", can_be_direct)
        compiled.clear()
        entmax_attention(*inputs, is_causal=True, impl="triton", **OPTIONS[name]).sum().backward()
        with torch.no_grad():
            entmax_attention(*inputs, is_causal=True, impl="triton", return_support=True, **OPTIONS[name])
        calls.append(list(compiled))
    jit, _, direct = calls
    assert {kind for kind, *_ in jit} == {ThroughTriton}
    assert {kind for kind, *_ in direct} == {Direct}
    assert len(jit) >= 9
    for (_, kernel, programs, tensors), (_, same_kernel, same_programs, addresses) in zip(jit, direct, strict=True):
        assert (kernel, programs) == (same_kernel, same_programs)
        assert len(addresses) == len(inspect.signature(kernel.fn).parameters) - 1  # all but the Config
        assert shown(tensors, tensors) == shown(addresses, tensors)
    plan.plan_of.cache_clear()
    launch.launcher_of.cache_clear()


def shown(values: tuple, tensors: tuple) -> list:
    """Numbers as they are; of an address in place of a tensor, that it is one."""
    result = []
    for value, tensor in zip(values, tensors, strict=True):
        if isinstance(tensor, tuple):
            result.append(shown(value, tensor))
        elif isinstance(tensor, Tensor):
            assert isinstance(value, (Tensor, int))
            result.append("address")
        else:
            result.append(value)
    return result
