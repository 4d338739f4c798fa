"""What every recorded call has, of attention and of other layers: all that tables, pictures and the page read."""

from typing import Protocol

from torch import Tensor

from ..core.checks import said
from .sparse_rows import HeadVisibility


class RecordedSizes(Protocol):
    """``query_length`` tokens take from ``key_length`` tokens, in ``batch`` rows and ``heads`` heads."""

    batch: int
    heads: int
    query_length: int
    key_length: int


class Recorded(Protocol):
    """Rows of non-negative shares, one for each query of each head, which sum to 1.

    Attributes:
        name: of the module that made the call.
        number: how many calls ran before it: the layer, in one pass through a model.
        problem: its sizes.
        covered: how much of the sum 1 the entries of ``rows`` make up at least, where a query has any. The rest of
            their sum is of other keys. It is 1 for attention, whose other keys have probability exactly 0.
        tile: queries, and keys, of one tile.
        size: (batch, heads, query length), how many entries a row has.
        keys_per_query: (heads,) float64, the mean of the sizes of rows that see a key.
        keys_per_64_queries, key_sparsity: (heads,) float64, the same of 64 consecutive queries together: the number of
            keys, and the share of the keys that they see which are in none of their rows.
        block_sparsity: (heads,) float64, the share of the visible tiles without an entry.
        block_sparsity_by_position: (query tiles,) float64, the same by tile of queries.
        intervals: (batch, 3, query length), the first key that a query sees, one past the last, and its position.
        visible_per_query: the mean number of keys that a query sees.
        mask_heads: 1 where all heads see the same keys, else how many heads there are.
    """

    name: str
    number: int
    problem: RecordedSizes
    covered: float
    tile: int
    size: Tensor
    keys_per_query: Tensor
    keys_per_64_queries: Tensor
    key_sparsity: Tensor
    block_sparsity: Tensor
    block_sparsity_by_position: Tensor
    intervals: Tensor
    visible_per_query: float
    mask_heads: int

    def visibility(self, batch: int, head: int) -> HeadVisibility:
        """Which keys one head sees in one batch row."""
        ...

    def rows(self, batch: int = 0, head: int = 0) -> Tensor:
        """Sparse CSR (query length, key length): the keys of each query and their shares."""
        ...

    def release(self) -> None:
        """Let go of what the layer read, after computing what depends on it."""
        ...


def check_place(batch: object, head: object, batches: int, heads: int) -> None:
    for name, index, count in (("batch", batch, batches), ("head", head, heads)):
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"{name} must be an integer, got {said(index)}")
        if not 0 <= index < count:
            raise IndexError(f"{name} must be from 0 to {count - 1}, got {index}")


def versions(*tensors: Tensor) -> tuple[int | None, ...]:
    """How often each tensor was written to; None for inference tensors, which do not count it."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)


def share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.double()
