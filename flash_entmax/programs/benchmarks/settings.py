"""What the command line said after `flash-entmax bench`: the cases for each kind of machine, and its checks.

On a GPU the default grid has lengths from 4,096 to 131,072, head sizes 64 and 128, five block sparsities, and
grouped-query heads at two lengths. The slowest cases are left out unless a flag asks for them: from 65,536 on there are
two sparsities, and at 131,072 head size 64 alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flash_entmax.core.call import MAX_HEAD_SIZE

from ..errors import CommandError, device_for
from .captured import captured_cases
from .cases import BenchCase

ALPHA = 1.5
CASE_PARTS = ("speed", "memory", "roofline")
PARTS = (*CASE_PARTS, "cold-start", "host", "refinement")
OURS, ADASPLASH = "flash-entmax", "adasplash"
TITLES = {
    OURS: "flash-entmax",
    "flash-attention-2": "FlashAttention-2",
    "cudnn": "cuDNN",
    "flex-attention": "FlexAttention",
    ADASPLASH: "AdaSplash-2",
    "sdpa": "SDPA",
    "dense-entmax": "dense entmax",
}
NAMES = tuple(TITLES)
MANY_HEADS, FEW_HEADS, LONGEST_WITH_MANY_HEADS = 16, 8, 8192
LONG, VERY_LONG = 65536, 131072


@dataclass(frozen=True)
class Grid:
    """The cases of one kind of machine, and how long each is timed."""

    lengths: tuple[int, ...]
    head_sizes: tuple[int, ...]
    topics: tuple[int, ...]
    dtype: torch.dtype
    repeat_ms: float
    matrix_size: int
    refinement_lengths: tuple[int, ...]
    heads: int | None = None  # None: it depends on the length
    shared_lengths: tuple[int, ...] = ()  # that also run with grouped-query heads
    few_topics: tuple[int, ...] = ()  # for long sequences and grouped-query heads

    def heads_at(self, length: int) -> int:
        return self.heads or (MANY_HEADS if length <= LONGEST_WITH_MANY_HEADS else FEW_HEADS)


CUDA = Grid(
    lengths=(4096, 8192, 16384, 32768, LONG, VERY_LONG),
    head_sizes=(64, 128),
    topics=(1, 2, 4, 10, 20),
    dtype=torch.bfloat16,
    repeat_ms=120.0,
    matrix_size=8192,
    refinement_lengths=(1024, 4096, 16384, 65536, 131072),
    shared_lengths=(8192, 32768),
    few_topics=(4, 20),
)
CPU = Grid(
    lengths=(512, 1024, 2048),
    head_sizes=(64,),
    topics=(1, 4, 20),
    dtype=torch.float32,
    repeat_ms=500.0,
    matrix_size=1024,
    refinement_lengths=(1024, 4096, 16384, 65536, 131072),
    heads=4,
)
SMALLEST_CUDA = Grid((1024,), (64,), (4,), torch.bfloat16, 20.0, 2048, (256, 1024), heads=4)
SMALLEST_CPU = Grid((256,), (32,), (1, 4), torch.float32, 10.0, 256, (256, 1024), heads=2)
GRIDS = {("cuda", False): CUDA, ("cuda", True): SMALLEST_CUDA, ("cpu", False): CPU, ("cpu", True): SMALLEST_CPU}
SHARED_GROUP = 4


@dataclass(frozen=True)
class BenchSettings:
    """One run. ``asked`` are the competitors that --only names; empty means all of them."""

    device: torch.device
    out: Path
    cases: tuple[BenchCase, ...]
    parts: tuple[str, ...]
    asked: tuple[str, ...]
    grid: Grid
    command: str = "flash-entmax bench"

    @property
    def dtype(self) -> torch.dtype:
        return self.grid.dtype

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def names(self) -> tuple[str, ...]:
        return self.asked or NAMES

    @property
    def measures_cases(self) -> bool:
        return "speed" in self.parts or "memory" in self.parts

    def shapes(self) -> Iterator[list[BenchCase]]:
        """Groups of cases, one for every shape."""
        for shape in dict.fromkeys(case.shape for case in self.cases):
            yield [case for case in self.cases if case.shape == shape]


def settings_for(
    device: str,
    out: Path,
    *,
    lengths: Sequence[int] | None = None,
    head_sizes: Sequence[int] | None = None,
    topics: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    wide_blocks: bool = False,
    inputs: Sequence[Path] | None = None,
    copies: int | None = None,
    side_by_side: bool = False,
    smallest: bool = False,
    command: str = "flash-entmax bench",
) -> BenchSettings:
    """The grid that fits the machine, in which every option that is given replaces its part.

    ``device`` is "auto", "cpu" or "cuda". The cases of ``inputs`` replace the grid, or join it if one of the grid's own
    options is given.
    """
    device = device_for(device)
    grid = GRIDS[device, smallest]
    check_numbers("--lengths", lengths)
    check_numbers("--head-sizes", head_sizes, MAX_HEAD_SIZE)
    check_numbers("--topics", topics)
    check_numbers("--groups", groups)
    check_numbers("--copies", None if copies is None else [copies])
    if not inputs and (copies is not None or side_by_side):
        flag = "--side-by-side" if copies is None else f"--copies {copies}"
        raise CommandError(f"{flag} is for the heads of captured inputs: it needs --inputs FILE")
    check_words("--only", only, NAMES)
    check_words("--parts", parts, PARTS)
    parts = tuple(parts or (CASE_PARTS if inputs else PARTS))
    if "roofline" in parts and "speed" not in parts:
        raise CommandError(
            f"--parts {' '.join(parts)}: roofline compares with the measured time, so it needs speed too"
        )
    cases = []
    if not inputs or any((lengths, head_sizes, topics, groups, wide_blocks)):
        grid_cases = cases_of(grid, lengths, head_sizes, topics, groups)
        cases += [replace(case, wide_blocks=wide_blocks) for case in dict.fromkeys(grid_cases)]
    cases += captured_cases(inputs or (), 1 if copies is None else copies, side_by_side)
    return BenchSettings(torch.device(device), out, tuple(cases), parts, tuple(only or ()), grid, command)


def cases_of(grid: Grid, lengths, head_sizes, topics, groups) -> Iterator[BenchCase]:
    """All combinations. What is None comes from the grid, which may have less at great lengths."""
    for length in lengths or grid.lengths:
        heads = grid.heads_at(length)
        default_sizes = grid.head_sizes[:1] if length >= VERY_LONG else grid.head_sizes
        default_groups = (1, SHARED_GROUP) if length in grid.shared_lengths else (1,)
        for head_size in head_sizes or default_sizes:
            for group in groups or default_groups:
                if heads % group:
                    raise CommandError(f"--groups must divide the {heads} heads at length {length:,}, got {group}")
                few = grid.few_topics and (length >= LONG or group > 1)
                for count in topics or (grid.few_topics if few else grid.topics):
                    if count > head_size:
                        raise CommandError(
                            f"--topics must be at most the head size, got {count} at head size {head_size}"
                        )
                    yield BenchCase(length, head_size, heads, heads // group, count)


def check_numbers(flag: str, numbers: Sequence[int] | None, most: int | None = None) -> None:
    for number in numbers or ():
        if number < 1 or (most is not None and number > most):
            accepted = "at least 1" if most is None else f"from 1 to {most}"
            raise CommandError(f"{flag} must be {accepted}, got {number}")


def check_words(flag: str, words: Sequence[str] | None, accepted: Sequence[str]) -> None:
    for word in words or ():
        if word not in accepted:
            raise CommandError(f"{flag} takes {', '.join(accepted)}; got {word!r}")
