"""How many refinement steps each method needs for tau, until the probabilities of a row sum to 1 within 1e-6.

    bisection         halves [n^-1/2, 1] from its middle
    halley            the same start; Halley's step where it stays inside, else the middle (AdaSplash, arXiv 2502.12082)
    uniform-bins      a histogram of 8 equal bins over [maximum - 1, maximum] (4 where n > 16,320), then halley inside
                      the bin that holds tau, as shipped in adasplash 0.2.2 (AdaSplash-2, arXiv 2604.15180)
    geometric-bins    a histogram of 8 bins with edges 1, 1/2, 1/4, ..., then safeguarded quadratic steps
    certified         three Newton steps on the maxima of blocks of 64 keys, then safeguarded quadratic steps: ours on
                      CPUs
    certified-newton  the same start, then Newton steps on the norm, which need no count and no bracket: our kernels

With f = F - 1, f' = 2 weight and f'' = 2 count, Halley's step in the offset is 2 f f' / (2 f'^2 - f f''). All methods
run at alpha 1.5 in float64, so that rounding changes no count. F and its derivatives at any offset come from running
sums over the sorted row. Sorting makes the experiment quick, and no method knows of it.

A step is one pass over the row that computes these sums and moves the offset by them. One more pass finds that the row
has converged. It is the same for all methods, and is not counted. Kernels solve rows in tiles of 64, and the worst row
of a tile decides how many steps the tile takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flash_entmax.core.threshold import (
    Bracket,
    certified_offset,
    histogram_offset,
    newton_step,
    row_maximum,
    smallest_offset,
)
from flash_entmax.testing import DISTRIBUTIONS, score_rows

from .settings import ALPHA

TOLERANCE = 1e-6
MOST_STEPS = 64
TILE = 64
BLOCK = 64
MOST_SCORES = 2**21  # of all rows of one distribution and length
WATCHED_STEPS = (1, 2, 3)  # whose |sum p - 1| is reported


class Sums(NamedTuple):
    """Over each row, with d = [z - maximum + offset]_+: sum d^2, sum d, and how many d are positive."""

    total: Tensor
    weight: Tensor
    count: Tensor


class Rows:
    """Rows of scores z (rows, keys), which give their sums at any offset."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.maximum = z, row_maximum(z)
        out_of_reach = 2.0
        self.gaps = (self.maximum.unsqueeze(-1) - z).clamp_max(out_of_reach).sort(dim=-1).values
        self.first, self.second = (
            torch.nn.functional.pad(powers.cumsum(-1), (1, 0)) for powers in (self.gaps, self.gaps * self.gaps)
        )
        visible = torch.full_like(self.maximum, z.shape[-1])
        self.low, self.high = smallest_offset(visible, ALPHA), torch.ones_like(self.maximum)

    def sums(self, offset: Tensor) -> Sums:
        """The sums at an offset (rows,), from the number of gaps smaller than it and from their running sums."""
        reached = torch.searchsorted(self.gaps, offset.unsqueeze(-1))
        first, second = (running.gather(-1, reached).squeeze(-1) for running in (self.first, self.second))
        count = reached.squeeze(-1).to(offset.dtype)
        return Sums(offset * offset * count - 2 * offset * first + second, (offset * count - first).clamp_min(0), count)


Start = tuple[Tensor, Tensor, Tensor]  # offset, and the bracket low to high that it lies in; (rows,) each


def middle_start(rows: Rows) -> Start:
    return (rows.low + rows.high) / 2, rows.low, rows.high


def uniform_bins_start(rows: Rows) -> Start:
    """The start of AdaSplash-2: every score moves to the lower edge of its bin, and tau lies within a bin of that root.

    ``level`` is the height above maximum - 1, so that the offset is 1 - level.
    """
    blocks = -(-rows.z.shape[-1] // BLOCK)
    bins = next(bins for bins in (8, 4, 2) if blocks < 2 ** (64 // bins))
    square, plain, count = (torch.ones_like(rows.maximum) for _ in range(3))
    above = torch.ones_like(rows.maximum)
    for number in reversed(range(bins)):
        edge = number / bins
        reached = torch.searchsorted(rows.gaps, torch.full_like(above, 1 - edge).unsqueeze(-1), right=True)
        inside, above = reached.squeeze(-1) - above, reached.squeeze(-1).to(above.dtype)
        new = square + inside * edge * edge, plain + inside * edge, count + inside
        fits = new[2] * edge * edge - 2 * new[1] * edge + new[0] < 1
        square, plain, count = (torch.where(fits, *pair) for pair in zip(new, (square, plain, count), strict=True))
    level = (plain - (plain * plain - count * (square - 1)).sqrt()) / count
    return 1 - level - 0.5 / bins, 1 - level - 1 / bins, 1 - level


def geometric_bins_start(rows: Rows) -> Start:
    return histogram_offset(rows.z, ALPHA), rows.low, rows.high


def certified_start(rows: Rows) -> Start:
    padded = torch.nn.functional.pad(rows.z, (0, -rows.z.shape[-1] % BLOCK), value=-torch.inf)
    offset = certified_offset(padded.unflatten(-1, (-1, BLOCK)).amax(-1), rows.maximum, ALPHA)
    return offset, rows.low, offset


class Bisection(Bracket):
    def advance(self, offset: Tensor, sums: Sums) -> Tensor:
        self.low = torch.where(sums.total < 1, offset, self.low)
        self.high = torch.where(sums.total < 1, self.high, offset)
        return (self.low + self.high) / 2


class Halley(Bisection):
    def advance(self, offset: Tensor, sums: Sums) -> Tensor:
        middle = super().advance(offset, sums)
        excess = sums.total - 1
        stepped = offset - 2 * excess * sums.weight / (4 * sums.weight**2 - excess * sums.count)
        return torch.where((stepped > self.low) & (stepped < self.high), stepped, middle)


class Quadratic(Bracket):
    def advance(self, offset: Tensor, sums: Sums) -> Tensor:
        return self.step(offset, *sums)


class Newton(Bracket):
    def advance(self, offset: Tensor, sums: Sums) -> Tensor:
        return newton_step(offset, sums.total, sums.weight, ALPHA)


@dataclass(frozen=True)
class Method:
    """``passes_before`` counts the passes over the row that its start takes, ahead of the first step."""

    name: str
    title: str
    passes_before: int
    start: Callable[[Rows], Start]
    stepper: type[Bisection] | type[Quadratic] | type[Newton]


METHODS = (
    Method("bisection", "bisection", 1, middle_start, Bisection),
    Method("halley", "Halley-bisection (AdaSplash)", 1, middle_start, Halley),
    Method("uniform-bins", "8 or 4 uniform bins, then Halley (AdaSplash-2)", 2, uniform_bins_start, Halley),
    Method("geometric-bins", "8 geometric bins, then quadratic steps", 2, geometric_bins_start, Quadratic),
    Method("certified", "certify on block maxima, then quadratic steps (ours, CPU)", 1, certified_start, Quadratic),
    Method("certified-newton", "certify, then Newton on the norm (ours, kernels)", 1, certified_start, Newton),
)


class Refined(NamedTuple):
    """The offset and steps of each row; the largest |F - 1| of all rows at the start and after every step."""

    offset: Tensor
    steps: Tensor
    residuals: list[float]


def refine(method: Method, rows: Rows) -> Refined:
    """Step until every row has converged. A row that has converged keeps its offset."""
    offset, low, high = method.start(rows)
    stepper = method.stepper(low, high, ALPHA)
    steps, residuals = torch.zeros_like(offset, dtype=torch.int64), []
    for _ in range(MOST_STEPS):
        sums = rows.sums(offset)
        error = (sums.total - 1).abs()
        residuals.append(error.max().item())
        pending = ~(error <= TOLERANCE)
        if not pending.any():
            break
        steps += pending
        offset = torch.where(pending, stepper.advance(offset, sums), offset)
    return Refined(offset, steps, residuals)


def measure(lengths: tuple[int, ...], device: str | torch.device = "cpu") -> list[dict]:
    """One result for each length, distribution and method."""
    results = []
    for length in lengths:
        count = max(TILE, min(4 * TILE, MOST_SCORES // length // TILE * TILE))
        for distribution in DISTRIBUTIONS:
            rows = Rows(score_rows(distribution, length, rows=count, device=device))
            for method in METHODS:
                result = {"length": length, "distribution": distribution, "rows": count, "method": method.name}
                result |= summary(refine(method, rows))
                results.append(result)
    return results


def summary(refined: Refined) -> dict:
    by_tile = refined.steps.view(-1, TILE).amax(-1)
    residuals = refined.residuals
    return {
        "mean_steps": refined.steps.double().mean().item(),
        "mean_steps_of_tile": by_tile.double().mean().item(),
        "worst_steps": int(refined.steps.max()),
        "residual_after": {str(step): residuals[min(step, len(residuals) - 1)] for step in WATCHED_STEPS},
    }
