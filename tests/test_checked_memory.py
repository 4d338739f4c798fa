"""What interpreter.py adds to Triton's interpreter: no access to memory leaves the tensors of its launch."""

from importlib.util import find_spec

import pytest
import torch
from conftest import HAS_CUDA

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, read, written, PLACES: tl.constexpr):
    place = tl.arange(0, PLACES)
    tl.store(target + place, tl.load(source + place, mask=place < read, other=-1.0), mask=place < written)


@pytest.mark.parametrize(("read", "written"), [(8, 8), (9, 8), (8, 9), (16, 16)])
def test_places_outside_of_the_tensors_are_left_out_and_said(read, written):
    held = torch.zeros(64)
    source, target = torch.ones(8), held[:8].clone()
    if read == written == 8:
        copy_kernel[(1,)](source, target, read, written, PLACES=16)
        assert (target == 1).all()
    else:
        with pytest.raises(AssertionError, match=r"copy_kernel goes outside of its tensors: [18] places"):
            copy_kernel[(1,)](source, target, read, written, PLACES=16)


def test_the_whole_of_a_view_counts():
    """Scratch is cut from one allocation: kernels may find one array by the address of another."""
    held = torch.zeros(16)
    copy_kernel[(1,)](torch.ones(16), held[:8], 16, 16, PLACES=16)
    assert (held == 1).all()
