"""The nouns: the Problem that one call poses, the Support it can report, the Impl that solves it, and every check."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]

MAX_HEAD_SIZE = 512
WORD_BITS = 32


class Support(NamedTuple):
    """Which keys each query attends to, in numbers.

    ``z = (alpha - 1) * scale * query . key`` is the unit of ``maximum``, ``offset`` and ``tau``. A key has positive
    probability exactly when its ``z`` is above the row's ``tau``.

    Attributes:
        maximum: (batch, heads, query length), the largest visible ``z`` of each row; +inf where no key is visible.
        offset: (batch, heads, query length), how far ``tau`` lies below the maximum, in ``(0, 1]``.
        size: (batch, heads, query length) int32, the number of keys with positive probability.
        tiles: (batch, heads, query tiles, key tiles) bool, True where the tile holds a positive probability.
        tile_shape: (queries, keys) of one tile of ``tiles``, whose shape depends on the lengths by division: an
            exported program of a ``Support`` is for lengths of as many tiles.
    """

    maximum: Tensor
    offset: Tensor
    size: Tensor
    tiles: Tensor
    tile_shape: tuple[int, int]

    @property
    def tau(self) -> Tensor:
        """(batch, heads, query length), the threshold of each row: ``maximum - offset``; +inf where no key is visible.

        Next to a large maximum a single float cannot hold the offset's digits: compute with the two numbers.
        """
        return self.maximum - self.offset


class Modifiers(NamedTuple):
    """What one attention call may take beside query, key and value; each is None where it is not used.

    Attributes:
        alpha, scale: (heads,), in place of the numbers of the Problem: both or none.
        slopes: (batch, heads), ALiBi: |position of the query - key| times this is taken from each score.
        intervals: (batch, 3, query length) int32: the first key that a query sees, one past the last, its position.
        kinds, bits: a mask by tiles, see ``sight.TileFilter``.
    """

    alpha: Tensor | None = None
    scale: Tensor | None = None
    slopes: Tensor | None = None
    intervals: Tensor | None = None
    kinds: Tensor | None = None
    bits: Tensor | None = None


class Tangents(NamedTuple):
    """The direction that a forward-mode derivative is taken in: one tensor like each input, None where it is 0."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    alpha: Tensor | None = None
    scale: Tensor | None = None
    slopes: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """The sizes and scalars of one attention call, after every check has passed.

    `softcap` is 0 for none. `is_causal` counts only without intervals. No 64 consecutive queries see more than
    `reach` keys in a row.
    """

    batch: int
    heads: int
    key_heads: int
    query_length: int
    key_length: int
    head_size: int
    value_size: int
    alpha: float
    scale: float
    is_causal: bool
    softcap: float = 0.0
    reach: int = 0

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: float,
        is_causal: bool,
        scale: float,
        softcap: float = 0.0,
        reach: int | None = None,
    ) -> "Problem":
        batch, heads, query_length, head_size = query.shape
        _, key_heads, key_length, value_size = value.shape
        return cls(
            batch,
            heads,
            key_heads,
            query_length,
            key_length,
            head_size,
            value_size,
            float(alpha),
            float(scale),
            is_causal,
            float(softcap),
            key_length if reach is None else reach,
        )

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.key_heads if self.key_heads else 1

    @property
    def widest(self) -> int:
        """The larger head size, of keys or of values."""
        return max(self.head_size, self.value_size)

    @property
    def slope(self) -> float:
        """z = slope * (query . key)."""
        return (self.alpha - 1.0) * self.scale

    @property
    def diagonal(self) -> int:
        """With a causal mask, query i sees keys 0 .. i + diagonal: the last query sees the last key."""
        return self.key_length - self.query_length

    @property
    def is_empty(self) -> bool:
        """No score exists: some extent is zero, so every output is zero."""
        return 0 in (self.batch, self.heads, self.key_heads, self.query_length, self.key_length)

    def intervals(self, device: torch.device) -> Tensor:
        """(batch, 3, query length) int32 of the plain mask: all keys, or the causal ones. See Modifiers."""
        position = torch.arange(self.query_length, dtype=torch.int32, device=device) + self.diagonal
        stop = (
            (position + 1).clamp(0, self.key_length) if self.is_causal else torch.full_like(position, self.key_length)
        )
        return torch.stack((torch.zeros_like(position), stop, position)).expand(self.batch, -1, -1)

    def live_words(self, tile: int) -> int:
        """The int32 words in which a tile of queries has one bit for each tile of keys.

        There is one more than it takes: PyTorch would compile an extent of 1 by itself.
        """
        return ceil_div(ceil_div(self.key_length, tile), WORD_BITS) + 1

    def live_shape(self, tile: int) -> tuple[int, int, int]:
        """Shape of the packed map of live tiles: (batch, heads, query tiles * words)."""
        return self.batch, self.heads, ceil_div(self.query_length, tile) * self.live_words(tile)

    def pack_live(self, tiles: Tensor, tile: int) -> Tensor:
        """(batch, heads, query tiles, key tiles) bool -> the packed map."""
        words = pack_tiles(tiles)
        return torch.nn.functional.pad(words, (0, self.live_words(tile) - words.shape[-1])).flatten(2)

    def unpack_live(self, live: Tensor, tile: int) -> Tensor:
        """The inverse of `pack_live`."""
        rows = live.unflatten(-1, (ceil_div(self.query_length, tile), self.live_words(tile)))
        return unpack_tiles(rows, ceil_div(self.key_length, tile))


def empty_stored_as(tensor: Tensor, size: int) -> Tensor:
    """(batch, heads, length, size) in the tensor's order: heads first, or rows first, as a layer's projections are."""
    batch, heads, length, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, length, heads, size).transpose(1, 2)
    return tensor.new_empty(batch, heads, length, size)


def row_dtype(query: Tensor) -> torch.dtype:
    """The dtype of everything that a row has one of."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def pack_tiles(tiles: Tensor) -> Tensor:
    """(..., key tiles) bool -> (..., words) int32: bit b of word w is key tile 32 w + b."""
    words = ceil_div(tiles.shape[-1], WORD_BITS)
    padded = torch.nn.functional.pad(tiles, (0, words * WORD_BITS - tiles.shape[-1]))
    bits = padded.unflatten(-1, (words, WORD_BITS)).to(torch.int64)
    weights = 1 << torch.arange(WORD_BITS, device=tiles.device, dtype=torch.int64)
    unsigned = (bits * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack_tiles(words: Tensor, key_tiles: int) -> Tensor:
    """(..., words) int32 -> (..., key tiles) bool, the inverse of pack_tiles."""
    bits = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> bits & 1).flatten(-2)[..., :key_tiles].bool()


def is_jagged(tensor: object, ragged: int = 1) -> bool:
    """A nested tensor whose ragged dimension is this one, without holes: all that its values and offsets can say."""
    if not isinstance(tensor, Tensor) or not tensor.is_nested or tensor.layout != torch.jagged:
        return False
    return tensor._ragged_idx == ragged and tensor.lengths() is None


def longest_sequence(jagged: Tensor) -> int:
    """Of a nested tensor that may know it; all tokens are a bound as well."""
    return getattr(jagged, "_maybe_max_seqlen", None) or jagged.values().shape[jagged._ragged_idx - 1]


ALPHAS = 1.01, 2.0  # a tensor alpha is clamped to these


SCALES = 1e-6, 1e6  # and a tensor scale to these


def parameters(query: Tensor, alpha: float | Tensor, scale: float | Tensor | None):
    """Two floats, or two tensors (heads,) clamped to their ranges."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(alpha, Tensor) and not isinstance(scale, Tensor):
        return float(alpha), float(scale)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        return 1.0, of_heads(query, scale, SCALES)
    return of_heads(query, alpha, ALPHAS), of_heads(query, scale, SCALES)


def of_heads(query: Tensor, number: float | Tensor, limits: tuple[float, float]) -> Tensor:
    """(heads,) in the dtype of rows; the gradient of what is clamped is 0."""
    dtype, heads = row_dtype(query), query.shape[1]
    if not isinstance(number, Tensor):
        number = min(max(number, limits[0]), limits[1])
        return torch.full((heads,), number, dtype=dtype, device=query.device)
    return clamped(number.to(dtype), limits).expand(heads).contiguous()


def clamped(number: Tensor, limits: tuple[float, float]) -> Tensor:
    """With gradient 0 outside of the limits and not on them, where `clamp` of torch 2.14 has 0 as well."""
    lowest, highest = limits
    return torch.where(number < lowest, lowest, torch.where(number > highest, highest, number))
