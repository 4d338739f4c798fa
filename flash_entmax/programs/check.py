"""The self-check of this installation: every implementation that can run here, against the reference in float64.

The error of an output or gradient is the norm of its difference from the reference, relative to the reference's norm.
It passes within twice the error of dense PyTorch in the same dtype, plus a floor of a few roundings. In float16 and
bfloat16 the floor alone is the budget. Dense PyTorch rounds the scores to that dtype there, which changes its support.
Its error, up to half of the result, would excuse anything. A second run must give the same bits.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import BACKENDS, Impl, choose
from ..functional import entmax_attention

# A few roundings of the dtype, relative to the norm of the result.
NORM_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")


@dataclass(frozen=True)
class SelfCheckCase:
    """One call. ``spread`` multiplies the queries: a larger spread of the scores makes the support smaller."""

    heads: int = 4
    key_heads: int = 4
    query_length: int = 200
    key_length: int = 200
    head_size: int = 64
    value_size: int = 64
    alpha: float = 1.5
    is_causal: bool = True
    transposed: bool = False
    spread: float = 2.0

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        sizes = f"{self.head_size}" if self.head_size == self.value_size else f"{self.head_size}/{self.value_size}"
        flags = ("causal" if self.is_causal else "full") + (", transposed" if self.transposed else "")
        return f"alpha {self.alpha}, {self.query_length} x {self.key_length}, heads {heads}, size {sizes}, {flags}"


CASES = (
    SelfCheckCase(),
    SelfCheckCase(is_causal=False),
    SelfCheckCase(alpha=2.0),
    SelfCheckCase(alpha=1.3),
    SelfCheckCase(heads=8, key_heads=2, head_size=32, value_size=32),
    SelfCheckCase(query_length=70, key_length=333),
    SelfCheckCase(query_length=150, key_length=90),
    SelfCheckCase(head_size=128, value_size=128, transposed=True),
    SelfCheckCase(head_size=40, value_size=24, is_causal=False, query_length=65, key_length=129),
)
# On a GPU every dtype runs these five. They share their kernels, because compilation takes most of the time there.
CUDA_CASES = (
    SelfCheckCase(),
    SelfCheckCase(heads=8, key_heads=2),
    SelfCheckCase(query_length=70, key_length=333),
    SelfCheckCase(query_length=150, key_length=90),
    SelfCheckCase(query_length=2048, key_length=2048, transposed=True),
)
MORE_CUDA_CASES = {
    torch.float32: (),
    torch.float16: (SelfCheckCase(head_size=40, value_size=24, is_causal=False, query_length=65, key_length=129),),
    torch.bfloat16: (
        SelfCheckCase(alpha=1.3),
        SelfCheckCase(query_length=2048, key_length=2048, alpha=2.0, head_size=128, value_size=128),
    ),
}
INTERPRETED_CASES = (
    SelfCheckCase(heads=2, key_heads=1, query_length=130, key_length=130, head_size=32, value_size=32),
    SelfCheckCase(heads=1, key_heads=1, query_length=40, key_length=100, head_size=16, value_size=16, alpha=2.0),
    SelfCheckCase(
        heads=1, key_heads=1, query_length=65, key_length=65, head_size=16, value_size=16, alpha=1.3, is_causal=False
    ),
)


@dataclass(frozen=True)
class SelfCheckVerdict:
    """The quantity with the largest ratio of error to budget; ``repeats`` if a second run gave the same bits."""

    quantity: str
    error: float
    budget: float
    repeats: bool

    @property
    def passed(self) -> bool:
        return self.error <= self.budget and self.repeats


def plan() -> Iterator[tuple[str, Impl, torch.dtype, SelfCheckCase]]:
    """Every (device, implementation, dtype, case) that this machine can run."""
    for dtype in (torch.float64, torch.float32):
        for case in CASES:
            yield "cpu", "torch", dtype, case
    if not BACKENDS["triton"].obstacle(torch.float32, torch.device("cpu")):
        for case in INTERPRETED_CASES:
            yield "cpu", "triton", torch.float32, case
    if torch.cuda.is_available():
        yield from plan_for_cuda()


def plan_for_cuda() -> Iterator[tuple[str, Impl, torch.dtype, SelfCheckCase]]:
    for dtype, more in MORE_CUDA_CASES.items():
        impl = choose(dtype, torch.device("cuda"), "auto")
        for case in CUDA_CASES + more:
            yield "cuda", impl, dtype, case


def check(device: str, impl: Impl, dtype: torch.dtype, case: SelfCheckCase, seed: int = 0) -> SelfCheckVerdict:
    """Run a case twice, and compare output and gradients with the float64 reference on the same rounded inputs."""
    inputs = inputs_of(case, dtype, device, seed)
    results = output_and_gradients(inputs, case, impl)
    again = output_and_gradients(inputs, case, impl)
    exact = output_and_gradients([tensor.double() for tensor in inputs], case, "reference")
    dense = output_and_gradients(inputs, case, "reference") if dtype.itemsize >= 4 else exact
    repeats = all(torch.equal(first, second) for first, second in zip(results, again, strict=True))
    worst = SelfCheckVerdict("", 0.0, 1.0, repeats)
    for name, result, truth, plain in zip(NAMES, results, exact, dense, strict=True):
        error, budget = norm_error(result, truth), 2 * norm_error(plain, truth) + NORM_FLOOR[dtype]
        if not error / budget <= worst.error / worst.budget:
            worst = replace(worst, quantity=name, error=error, budget=budget)
    return worst


def inputs_of(case: SelfCheckCase, dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Query, key, value, and gradient of the output, each (2, heads, length, size).

    A transposed case stores them as (2, length, heads, size).
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (case.heads, case.query_length, case.head_size),
        (case.key_heads, case.key_length, case.head_size),
        (case.key_heads, case.key_length, case.value_size),
        (case.heads, case.query_length, case.value_size),
    )
    tensors = [torch.randn(2, *shape, generator=generator, dtype=torch.float32) for shape in shapes]
    tensors[0] *= case.spread
    if case.transposed:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    return [tensor.to(device, dtype) for tensor in tensors]


def output_and_gradients(inputs: list[Tensor], case: SelfCheckCase, impl: Impl) -> list[Tensor]:
    *leaves, grad_output = (tensor.detach() for tensor in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    output = entmax_attention(*leaves, alpha=case.alpha, is_causal=case.is_causal, impl=impl)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def norm_error(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth||, Frobenius norms in float64; NaN if either tensor holds one."""
    return float((result.double() - truth).norm() / truth.norm())


def self_check() -> bool:
    """Run the plan, print a line for each case and a summary; True when every case passed."""
    failures = total = 0
    for seed, (device, impl, dtype, case) in enumerate(plan()):
        verdict = check(device, impl, dtype, case, seed)
        total += 1
        failures += not verdict.passed
        place = f"{device:4} {impl:6} {str(dtype).removeprefix('torch.'):8}"
        errors = f"error {verdict.error:.1e}  budget {verdict.budget:.1e}"
        repeats = "" if verdict.repeats else "  NOT REPEATABLE: a second run gave other bits"
        print(f"{'ok  ' if verdict.passed else 'FAIL'}  {place}  {errors}  {case}  ({verdict.quantity}){repeats}")
    interpreter = " (kernels under Triton's interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    print(f"{total - failures} of {total} cases agree with the float64 reference{interpreter}")
    if failures:
        print(
            "WRONG: do not rely on an implementation that failed here. Another one may be chosen by impl=. "
            "Please report this, with what flash-entmax info prints"
        )
    return failures == 0
