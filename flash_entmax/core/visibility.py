"""Which keys a query may see: the caller's options, and what they are lowered to.

The backends know two things only. Each query has an interval of keys: causality, windows, positions, padding and packed
sequences are all intervals. A filter by tiles holds any other mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .call import VisibilityArgs
from .intervals import FURTHEST, UNLIMITED, intervals
from .tile_filter import filter_of_blocks, key_filter

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Visibility:
    """The options that decide which keys a query may see: a key must pass all of them."""

    is_causal: bool = False
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED)
    query_positions: int | Tensor | None = None
    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    block_mask: "BlockMask | None" = None
    cu_seq_q: Tensor | None = None
    cu_seq_k: Tensor | None = None
    max_q: int = 0  # the longest packed sequence, of queries and of keys
    max_k: int = 0
    known_intervals: Tensor | None = None  # (batch, 3, query length) int32: in place of all options but the masks

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with causality as the window that ends at the query itself."""
        left, right = self.window_size
        return min(left, 2 * FURTHEST), 0 if self.is_causal else min(right, 2 * FURTHEST)

    @property
    def is_plain(self) -> bool:
        """There is no mask, or the causal one of the whole rectangle: no intervals are needed for it."""
        left, right = self.window
        limits = self.query_positions, self.key_lengths, self.cu_seq_q, self.known_intervals
        is_whole = all(limit is None for limit in limits)
        return left == UNLIMITED and right in (UNLIMITED, 0) and is_whole

    def max_span(self, key_length: int) -> int:
        """No 64 consecutive queries see more keys than this from the first to the last.

        It is not clamped to the keys that exist: a number that no length enters lets a compiler keep one graph for all
        lengths.
        """
        left, right = self.window
        if isinstance(self.query_positions, Tensor) or self.cu_seq_q is not self.cu_seq_k:
            return key_length
        if self.cu_seq_q is not None:  # queries and keys of a sequence are in the same places
            longest = max(self.max_q, self.max_k)
            left = longest if left == UNLIMITED else min(left, longest)
            right = longest if right == UNLIMITED else min(right, longest)
        if UNLIMITED in (left, right):
            return key_length
        return left + right + 64

    def lowered(self, query: Tensor, key_length: int, tile: int | None) -> VisibilityArgs:
        """For queries (batch, heads, query length, head size); a filter in tiles of `tile` queries and keys.

        Without a tile there is no filter: the specification and softmax read key_mask and block_mask themselves.
        """
        kinds, bits = None, None
        if tile is not None and self.key_mask is not None:
            kinds, bits = key_filter(self.key_mask, tile)
        elif tile is not None and self.block_mask is not None:
            kinds, bits = filter_of_blocks(self.block_mask, (query.shape[2], key_length), tile)
        is_causal, span = self.is_plain and self.window[1] == 0, self.max_span(key_length)
        return VisibilityArgs(self.intervals(query, key_length), kinds, bits, is_causal, span)

    @property
    def limits(self) -> tuple[int | Tensor | None, ...]:
        """What intervals are made of."""
        return self.known_intervals, self.query_positions, self.key_lengths, self.cu_seq_q, self.cu_seq_k

    def intervals(self, query: Tensor, key_length: int, compute: Callable[..., Tensor] | None = None) -> Tensor | None:
        """(batch, 3, query length) int32, or None where every query sees all keys, or the causal ones.

        `compute` may be the function that computes the operator, in its place.
        """
        if self.is_plain:
            return None
        if self.known_intervals is not None:
            return self.known_intervals
        given = self.query_positions
        positions, first = (given, 0) if isinstance(given, Tensor) else (None, given)
        if first is None:  # the last query stands at the last key
            first = key_length - query.shape[2]
        limits = positions, self.key_lengths, self.cu_seq_q, self.cu_seq_k
        compute = compute or intervals
        return compute(query.detach(), *limits, key_length, first, *self.window, self.max_q, self.max_k)
