"""Deliberate faults in the kernel of forward-mode derivatives, in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch
from cases import make_case
from conftest import HAS_CUDA, Backend
from mutants import Mutant, plant
from test_forward_mode import assert_within_budget, directions

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton import alpha, tangent

INTERPRETER = Backend("triton", "cpu")
HEADS = torch.tensor([0.1, 0.7])
FAULTS = {
    "the sum of p moves": (tangent, "add_products", "u * context.mean[:, None]", "0.0"),
    "keys stand still": (tangent, "changes", "tl.trans(dk)", "0.0 * tl.trans(dk)"),
    "softcap is straight": (tangent, "changes", "ds *= softcap_slope", "ds *= 1.0"),
    "distance helps": (tangent, "changes", "ds -= ...", "ds += ..."),
    "the offset is forgotten": (
        tangent, "changes", "context.alpha * threshold.offset[:, None]", "context.alpha",
    ),
    "alpha moves the wrong way": (alpha, "share_logarithm", "... - logarithm", "... + logarithm"),
    "scale stands still": (tangent, "changes", "context.scale", "0.0"),
    "values are weighted by u": (tangent, "tangent_kernel", "probability(...)", "support_weight(...)"),
    "some keys are left out": (
        tangent, "add_products", "load_block(context.value_tangent, block, sizes.key_length, ...)",
        "load_block(context.value_tangent, block, 32, ...)",
    ),
}  # fmt: skip


def check(backend=INTERPRETER) -> None:
    case = make_case(
        backend, length=40, alpha=1.2 + HEADS, scale=torch.tensor(0.3), alibi_slopes=HEADS, softcap=2.0, is_causal=True
    )
    assert_within_budget(case, backend, directions(case.tensors.values()))


def test_the_kernel_passes_without_a_fault():
    check()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS[fault]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check()
