"""A call whose keys are split in parts: each part is computed by itself, and what comes of all of them is put together.

backends.Backend says how: maxima combine by max over the parts in which a row sees a key, everything else by addition.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from cases import Case, attend, run_dense
from checks import Pairs, check_support, magnitudes, operator_arguments
from torch import Tensor

from flash_entmax.backends import BACKENDS
from flash_entmax.core.call import Problem, Support, VisibilityArgs
from flash_entmax.core.threshold import newton_step
from flash_entmax.core.tile_filter import filter_of_keys
from flash_entmax.operators import attention as ops
from flash_entmax.testing import FLOOR, assert_within_budget

# How far two ways to solve the same row may differ in its offset. 16-bit types settle a row by what its output shows.
OFFSET_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def problem_of(case: Case, impl: str) -> Problem:
    """The problem that the public call poses to the backend."""
    query, _, value, _, *options = operator_arguments(case, impl)
    return ops.unpack_arguments(query, value, options[: ops.TENSORS], options[ops.TENSORS :])[0]


def part_of(case: Case, problem: Problem, impl: str, first: int, stop: int) -> Problem:
    """The problem of the keys first <= key < stop, which count from `first`."""
    start, end, position = (rows - first for rows in problem.intervals(case.query.device).unbind(1))
    size = stop - first
    intervals = torch.stack((start.clamp(0, size), end.clamp(0, size), position), 1)
    kinds, bits = None, None
    if "key_mask" in case.options:
        tile = ops.tile_of(impl, case.query, case.value)
        kinds, bits = filter_of_keys(case.options["key_mask"][:, first:stop], tile)
    visibility = VisibilityArgs(intervals, kinds, bits, False, min(size, problem.visibility.max_visible_span))
    return replace(problem, key_length=size, visibility=visibility)


@dataclass
class Parts:
    """The parts of a case's keys between its edges."""

    case: Case
    impl: str
    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        query, key, value = self.case.inputs
        self.backend, self.query = BACKENDS[self.impl], query
        self.problem = problem_of(self.case, self.impl)
        self.parts = [
            (part_of(self.case, self.problem, self.impl, *part), key[:, :, slice(*part)], value[:, :, slice(*part)])
            for part in pairwise((0, *self.edges, key.shape[2]))
        ]

    def maximum(self) -> Tensor:
        """In the backend's own unit; +inf where no part has a key that the row sees."""
        maxima = torch.stack([self.backend.row_maxima(problem, self.query, key) for problem, key, _ in self.parts])
        assert not (maxima == -torch.inf).any(), "a row that sees no key has maximum +inf"
        largest = maxima.masked_fill(maxima == torch.inf, -torch.inf).amax(0)
        return largest.masked_fill(largest == -torch.inf, torch.inf)

    def sums(self, maximum: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        sums = (self.backend.sums_at(problem, self.query, key, maximum, offset) for problem, key, _ in self.parts)
        return tuple(sum(of_parts) for of_parts in zip(*sums, strict=True))

    def offset(self, maximum: Tensor) -> Tensor:
        """By Newton's steps from 1, which end at or above the root. A row without a key stays at 1."""
        alpha = self.problem.score.alpha
        alpha = alpha.view(-1, 1) if isinstance(alpha, Tensor) else alpha
        offset = torch.ones_like(maximum)
        for _ in range(40):
            total, weight = self.sums(maximum, offset)
            stepped = newton_step(offset, total, weight, alpha)
            stays = (total <= 1) | (stepped >= offset)  # a NaN moves
            if (stays | offset.isnan()).all():
                break
            offset = torch.where(stays, offset, stepped)
        return offset

    def output(self, maximum: Tensor, offset: Tensor) -> Tensor:
        return sum(self.backend.output_at(problem, self.query, *kv, maximum, offset) for problem, *kv in self.parts)


def check_parts(case: Case, impl: str, edges: tuple[int, ...]) -> None:
    """Maximum, threshold, support and output of the parts, against the whole and the float64 reference."""
    parts = Parts(case, impl, edges)
    query, key, value = case.inputs
    maximum = parts.maximum()
    tolerance = 1e-12 if maximum.dtype == torch.float64 else 1e-5
    whole = parts.backend.row_maxima(parts.problem, query, key)
    torch.testing.assert_close(maximum, whole, rtol=tolerance, atol=tolerance)
    _, _, forward, _, *reach = parts.backend.attention_forward(parts.problem, query, key, value, True)
    torch.testing.assert_close(maximum, forward, rtol=tolerance, atol=tolerance)

    offset = parts.offset(maximum)
    shipped = attend(case, impl, return_support=True)[1]
    torch.testing.assert_close(offset, shipped.offset, rtol=0, atol=OFFSET_TOLERANCE[case.query.dtype])
    output, exact = attend(case.in_float64(), "reference", return_support=True)
    z_maximum, size, tiles, keys = parts.backend.attention_support(parts.problem, query, key, maximum, offset, *reach)
    pairs = Pairs(case, exact)
    check_support(pairs, Support(z_maximum, offset, size, tiles, shipped.tile_shape, keys))

    ours, grad_output = parts.output(maximum, offset), case.grad_output()
    assert ours.dtype == maximum.dtype
    dense = run_dense(case, grad_output).output
    size = magnitudes(pairs, grad_output)["output"]
    assert_within_budget(ours, output, dense, name="output", magnitude=size, floor=FLOOR[case.query.dtype])
