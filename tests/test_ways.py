"""The way of a query, of alpha and of a mask from the public call to the first launch: check, lower, call.

A way is the sequence of files whose functions hold the tensor: as an argument or a local name, alone or within a tuple.
Functions that ask one thing about a tensor, or take its address, are no stay (TOOLS). A file stands on the floor above
all that it imports. A way climbs where it goes to a file on a higher floor.
"""

import dataclasses
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_architecture import MODULES, PACKAGE, imports
from torch import Tensor

from flash_entmax import entmax_attention
from flash_entmax.backends import BACKENDS
from flash_entmax.operators import dispatch

if not find_spec("triton"):
    pytest.skip("needs Triton", allow_module_level=True)

TOOLS = {
    "addressed", "aligned", "as_autocast", "as_given", "below_autograd", "check_alphas", "device_of", "empty_stored_as",
    "has_tangent", "is_aligned", "is_eager", "is_nested", "is_plain", "is_recorded", "is_transformed", "matrix", "open",
    "recorded",
    "row_dtype", "tile_of", "trimmed", "unrecorded", "<genexpr>", "<listcomp>",
}  # fmt: skip


def floors() -> dict[str, int]:
    within = {name.removesuffix(".__init__"): imports(name, path)[0] for name, path in MODULES.items()}
    within["backends"] |= {f"backends.{name}.attention" for name in BACKENDS}  # imported by the table
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 0
            below = [floor(target) for target in within.get(name, ()) if target != name]
            found[name] = 1 + max(below, default=-1)
        return found[name]

    for name in within:
        floor(name)
    return found


class Arrived(Exception):  # noqa: N818
    """The way is at its end."""


def holds(value: object, target: Tensor, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return value is target or (value.dtype == target.dtype and 0 < value.data_ptr() == target.data_ptr())
    if depth and isinstance(value, (tuple, list)):
        return any(holds(part, target, depth - 1) for part in value)
    if depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(holds(getattr(value, field.name), target, depth - 1) for field in dataclasses.fields(value))
    return False


def way(target: Tensor, *inputs: Tensor, calls_before: int = 0, **options) -> list[str]:
    """Names of the files, each once for a stay, after so many calls of the same kind."""
    stack, path = [], []
    dispatch.kept.clear()
    for _ in range(calls_before):
        entmax_attention(*inputs, **options, impl="triton")

    def note() -> None:
        frame = stack[-1]
        name = Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(name).removesuffix(".__init__")
        is_tool = frame.f_code.co_name in TOOLS
        if not is_tool and any(holds(value, target) for value in frame.f_locals.values()) and path[-1:] != [name]:
            path.append(name)

    def watch(frame, event, _) -> None:
        if event not in ("call", "return") or not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            return
        if (event == "call" and frame.f_code.co_name.endswith("_kernel")) or frame.f_code.co_name == "launch":
            sys.setprofile(None)
            raise Arrived
        if event == "call":
            stack.append(frame)
        elif stack and stack[-1] is frame:
            stack.pop()
        if stack:
            note()

    sys.setprofile(watch)
    try:
        entmax_attention(*inputs, **options, impl="triton")
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
    return path


def ways() -> dict[str, list[str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [torch.randn(1, 2, 40, 16, device=device, dtype=torch.float32) for _ in range(3)]
    alpha, mask = torch.tensor([1.4, 1.6], device=device), torch.rand(1, 40, device=device) > 0.2
    training = [tensor.clone().requires_grad_() for tensor in inputs]
    return {
        "query": way(inputs[0], *inputs, is_causal=True),
        "query again": way(inputs[0], *inputs, is_causal=True, calls_before=2),
        "query in training": way(training[0], *training, is_causal=True),
        "query in training, again": way(training[0], *training, is_causal=True, calls_before=2),
        "alpha": way(alpha, *inputs, alpha=alpha),
        "mask": way(mask, *inputs, key_mask=mask),
    }


@pytest.mark.parametrize(("name", "path"), ways().items(), ids=ways())
def test_a_way_climbs_three_times_at_most_and_enters_no_file_three_times(name, path):
    floor = floors()
    climbs = sum(floor[later] > floor[earlier] for earlier, later in pairwise(path))
    stays = Counter(path)
    shown = " > ".join(f"{file} ({floor[file]})" for file in path)
    print(f"{name}: {len(path)} stays in {len(stays)} files, {climbs} climbs: {shown}")
    assert path[0] == "functional"
    assert climbs <= 3, shown
    assert max(stays.values()) < 3, shown


def test_the_way_of_a_query_ends_at_the_kernels():
    assert ways()["query"][-1] == "backends.triton.stages"
