"""Deliberate faults in the kernel of forward-mode derivatives, in Triton's interpreter: each changes one line."""

import importlib.util
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import make_case
from conftest import HAS_CUDA, Backend
from test_forward_mode import assert_within_budget, directions

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton import attention, tangent

INTERPRETER = Backend("triton", "cpu")
HEADS = torch.tensor([0.1, 0.7])
FAULTS = {  # what a line has, and what stands there instead
    "the sum of p moves": ("dp = t - u * mean[:, None]", "dp = t"),
    "keys stand still": (
        "ds = tl.dot(queries.q, tl.trans(dk), ds, input_precision=S.PRECISION) * scale",
        "ds *= scale",
    ),
    "softcap is straight": ("ds *= steepness", "ds *= 1.0"),
    "distance helps": ("ds -= of_slope", "ds += of_slope"),
    "the offset is forgotten": ("of_alpha * reach[:, None] * p", "of_alpha * p"),
    "alpha moves the wrong way": ("- tl.log(reach)[:, None] - logarithm", "- tl.log(reach)[:, None] + logarithm"),
    "scale stands still": ("ds += of_scale", "ds += 0.0"),
    "values are weighted by u": ("by_values * probability(", "by_values * support_weight("),
    "some keys are left out": ("load_keys(value_tangent, key_tile", "load_keys(value_tangent, 0 * key_tile"),
}


def check(backend=INTERPRETER) -> None:
    case = make_case(
        backend, length=40, alpha=1.2 + HEADS, scale=torch.tensor(0.3), alibi_slopes=HEADS, softcap=2.0, is_causal=True
    )
    assert_within_budget(case, backend, directions(case.tensors.values()))


def test_the_kernel_passes_without_a_fault():
    check()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch, tmp_path):
    old, new = FAULTS[fault]
    source = Path(tangent.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("flash_entmax.backends.triton.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(attention, "tangent_kernel", mutant.tangent_kernel)
    with pytest.raises(AssertionError):
        check()
