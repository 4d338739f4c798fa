"""Decoding in the interpreter, split over programs, parts and chunks: no bit of a row depends on any of it."""

from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from cases import attend
from conftest import HAS_CUDA, Backend
from decoding import case_with, check_decode, few_queries, small_steps

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton.scratch import Scratch

BACKEND = Backend("triton", "cpu")
CALLS = {
    "long supports": lambda: few_queries(BACKEND, 3, 200, heads=4, key_heads=2, alpha=1.2, scale=0.05),
    "windows": lambda: case_with(BACKEND, "positions of batch rows", window_size=(70, 0), scale=0.05),
    "together": lambda: case_with(BACKEND, "together", scale=torch.tensor([0.05, 0.3, 1.0, 0.1])),
}


@pytest.fixture(params=CALLS)
def case(request):
    return CALLS[request.param]()


def test_bits_do_not_depend_on_programs_and_chunks(case):
    with small_steps(processors=1):
        expected = check_decode(case, "triton")
    for processors, decoded in ((100, 2**27), (2, 20_000)):
        with small_steps(processors=processors, decoded=decoded):
            assert torch.equal(attend(case, "triton"), expected), (processors, decoded)


def test_bits_do_not_depend_on_what_scratch_held(case):
    """NaN, and huge numbers."""
    allocate = Scratch.allocate
    with small_steps(decoded=20_000):
        expected = attend(case, "triton")
        for byte in (0xFF, 0x7F):
            with mock.patch.object(Scratch, "allocate", lambda *given, byte=byte: allocate(*given).fill_(byte)):
                assert torch.equal(attend(case, "triton"), expected), hex(byte)


def test_bits_do_not_depend_on_the_rest_of_the_batch():
    case = case_with(BACKEND, "key lengths", scale=0.05)
    lengths = case.options["key_lengths"]
    with small_steps():
        together = attend(case, "triton")
        for row in range(2):
            tensors = {name: tensor[row : row + 1] for name, tensor in case.tensors.items()}
            alone = case.with_tensors(**tensors, key_lengths=lengths[row : row + 1])
            assert torch.equal(attend(alone, "triton"), together[row : row + 1])
