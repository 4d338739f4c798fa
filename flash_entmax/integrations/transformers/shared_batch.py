"""The batch that the block of `context_parallel` shares, as masks and layers find it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...distributed import ContextParallel


@dataclass(frozen=True)
class SharedBatch:
    """What masks must know of it: the group, this rank's length, and the boundaries of packed sequences in the whole.

    boundaries: (sequences + 1,) int32, None where no sequences are packed.
    jumps: whether this rank's positions do not follow one another, as models that pack by positions see.
    """

    parallel: "ContextParallel"
    local_length: int
    boundaries: Tensor | None
    jumps: bool


_open: list[SharedBatch] = []  # at most one, for all threads: autograd computes checkpoints again in threads of its own


def shared_batch() -> SharedBatch | None:
    """That of the block that is open."""
    return _open[0] if _open else None


def open_batch(batch: SharedBatch) -> None:
    _open.append(batch)


def close_batch() -> None:
    _open.clear()
