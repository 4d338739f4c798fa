"""The nouns of a call: ScoreOptions and VisibilityArgs, the Problem that they pose, and the Support that comes back."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import WORD_BITS, ceil_div, clamped

MAX_HEAD_SIZE = 512
ALPHAS = 1.01, 2.0  # what a tensor alpha may be in attention, and any but 1 in the kernels of rows
# What a number alpha may be in attention, beside 1: float32 rounds a probability by 2^-24 / (alpha - 1) of itself.
NUMBER_ALPHAS = 1.0001, 2.0
SCALES = 1e-6, 1e6  # a tensor scale is clamped to these
MOST_DECODED = 16  # queries of a call that is decoded: few queries, many keys, no gradients
SUMMARY_BLOCK = 64  # keys of which KeySummaries keep one bound; a multiple of every tile of keys
LARGEST_ROUNDED = 127.0  # of a key: the largest number of 8 bits
LARGEST_ROUNDED_QUERY = 127.0 * 256.0 + 127.0  # of a query: 256 high + low, both of 8 bits
SMALLEST_ROUNDED = 2.0**-100  # a key or query whose components are all below it is rounded to zeros
NORM_ROUNDING = 1.0 + 2.0**-10  # what float32 sums, and 16 bits, may take from a length


class Support(NamedTuple):
    """Which keys each query attends to, in numbers.

    ``z = (alpha - 1) * scale * query . key`` is the unit of ``maximum``, ``offset`` and ``tau``. A key has positive
    probability exactly when its ``z`` is above the row's ``tau``.

    Attributes:
        maximum: (batch, heads, query length), the largest visible ``z`` of each row; +inf where no key is visible.
        offset: (batch, heads, query length), how far ``tau`` lies below the maximum, in ``(0, 1]``.
        size: (batch, heads, query length) int32, the number of keys with positive probability.
        tiles: (batch, heads, query tiles, key tiles) bool, True where the tile holds a positive probability.
        tile_shape: (queries, keys) of one tile of ``tiles``. The shape of ``tiles`` depends on the lengths by division,
            so an exported program of a ``Support`` is for lengths of as many tiles.
        keys: (batch, heads, query tiles) int32, the number of keys to which at least one query of the tile attends. It
            is the size of the union of their supports: a key counts once, however many queries attend to it.
    """

    maximum: Tensor
    offset: Tensor
    size: Tensor
    tiles: Tensor
    tile_shape: tuple[int, int]
    keys: Tensor

    @property
    def tau(self) -> Tensor:
        """(batch, heads, query length), the threshold of each row: ``maximum - offset``; +inf where no key is visible.

        Next to a large maximum a single float cannot hold the offset's digits: compute with the two numbers.
        """
        return self.maximum - self.offset


class ScoreOptions(NamedTuple):
    """How a query's products with the keys become scores, and these probabilities.

    Attributes:
        alpha, scale: numbers, or tensors, scalar or (heads,). A scale of None is 1 / sqrt(head size). After `lowered`
            both are numbers, or both tensors (heads,).
        softcap: bounds the scores to (-softcap, softcap); 0 for none.
        alibi_slopes: what each step of distance takes from a score: (heads,) or, after `lowered`, (batch, heads).
    """

    alpha: float | Tensor
    scale: float | Tensor | None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None

    def is_softmax(self) -> bool:
        """Whether alpha is the number 1."""
        return not isinstance(self.alpha, Tensor) and self.alpha == 1.0

    def lowered(self, query_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "ScoreOptions":
        """Numbers, or tensors of the dtype of rows, for a query (batch, heads, query length, head size).

        Softmax, alpha = 1, keeps its number beside a scale that is a tensor.
        """
        batch, heads, _, head_size = query_shape
        alpha, scale, softcap, slopes = self
        scale = head_size**-0.5 if scale is None else scale
        if isinstance(alpha, Tensor) or isinstance(scale, Tensor):
            like = heads, dtype, device
            alpha = 1.0 if self.is_softmax() else expanded(alpha, *like)
            scale = expanded(clamped_scale(scale), *like)
        else:
            alpha, scale = float(alpha), float(scale)
        if slopes is not None:
            slopes = slopes.to(dtype).expand(batch, heads)
        return ScoreOptions(alpha, scale, float(softcap), slopes)

    @property
    def tensors(self) -> "OwnOptions":
        """Without intervals."""
        numbers = self.alpha, self.scale, self.alibi_slopes
        return OwnOptions(*(number if isinstance(number, Tensor) else None for number in numbers))

    def without_tensors(self) -> "ScoreOptions":
        """With numbers that count for nothing in their place."""
        numbers = (1.5, 1.0) if isinstance(self.alpha, Tensor) else (self.alpha, self.scale)
        return ScoreOptions(*numbers, self.softcap)

    def with_tensors(self, own: "OwnOptions") -> "ScoreOptions":
        """With these in place of its own tensors."""
        alpha, scale = (self.alpha, self.scale) if own.alpha is None else (own.alpha, own.scale)
        return ScoreOptions(alpha, scale, self.softcap, own.alibi_slopes)


class OwnOptions(NamedTuple):
    """The options that are tensors, and that each of several calls alike has its own of; None where there is none."""

    alpha: Tensor | None = None
    scale: Tensor | None = None
    alibi_slopes: Tensor | None = None
    intervals: Tensor | None = None


def expanded(number: float | Tensor, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(heads,), a copy: its holder may change a tensor in place before the backward pass."""
    if not isinstance(number, Tensor):
        return torch.full((heads,), number, dtype=dtype, device=device)
    return number.to(dtype).expand(heads).clone(memory_format=torch.contiguous_format)


def clamped_scale(scale: float | Tensor) -> float | Tensor:
    """Within SCALES: the gradient of what is clamped is 0."""
    if isinstance(scale, Tensor):
        return clamped(scale, SCALES)
    return min(max(scale, SCALES[0]), SCALES[1])


class VisibilityArgs(NamedTuple):
    """Which keys each query sees, as the backends take it. What is None hides nothing.

    Attributes:
        intervals: (batch, 3, query length) int32: the first key that a query sees, one past the last, its position.
            Without intervals, every query sees all keys, or the causal ones.
        tile_kinds, tile_bits: a mask by tiles, see ``tile_filter.TileFilter``.
        is_causal: counts only without intervals.
        max_visible_span: no 64 consecutive queries see more keys than this from the first to the last.
    """

    intervals: Tensor | None
    tile_kinds: Tensor | None
    tile_bits: Tensor | None
    is_causal: bool
    max_visible_span: int


class KeySummary(NamedTuple):
    """What a bound on blocks of keys reads. A block is the keys of one tile.

    Attributes:
        centre: (batch, key heads, blocks, head size), close to the mean of each block, in the dtype of the keys.
        radius: (batch, key heads, blocks) float32, at least the largest distance of a key of the block to the centre.
        error: of this shape, at least the distance of the block's mean to the centre.
        largest: of this shape, the largest absolute component of the block; not finite if a component is not.
    """

    centre: Tensor
    radius: Tensor
    error: Tensor
    largest: Tensor


class RoundedKeys(NamedTuple):
    """Keys in 8 bits, and how far they are from the keys: ``unit * rounded`` stands for a key.

    Attributes:
        rounded: (batch, key heads, capacity, head size up to a multiple of 16) int8.
        unit: (batch, key heads, capacity) float32. NaN where no key was appended, or one that is not finite: such a key
            is read as it is.
        error: (batch, key heads, blocks of SUMMARY_BLOCK keys) float32. A score by ``unit * rounded``, and a query
            rounded to 16 bits, is within ``|query| * error`` of the score, rounding of float32 included.
        centre: (batch, key heads, blocks, head size up to a multiple of 16), close to the mean of each block, in the
            dtype of the keys. None, like the rest, where no blocks are to be skipped.
        radius: (batch, key heads, blocks) float32, at least the largest distance of a key of the block to the centre;
            inf where the block is not full.
        centre_error: of this shape, at least the distance of the block's mean to the centre.
    """

    rounded: Tensor
    unit: Tensor
    error: Tensor
    centre: Tensor | None = None
    radius: Tensor | None = None
    centre_error: Tensor | None = None


def rounding_share(head_size: int) -> float:
    """By how much a score may be off beside what the 8 bits of the key leave out, as a share of |query| |key|.

    The first term is for the rounding of the query, the second for the float32 sum that is the score. docs/math.md has
    the proof.
    """
    return 0.51 * head_size**0.5 / LARGEST_ROUNDED_QUERY + (head_size + 32) * 2.0**-22


class Tangents(NamedTuple):
    """The direction that a forward-mode derivative is taken in: one tensor like each input, None where it is 0."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    alpha: Tensor | None = None
    scale: Tensor | None = None
    alibi_slopes: Tensor | None = None


def live_words(key_length: int, tile: int) -> int:
    """The int32 words in which a tile of queries has one bit for each tile of keys.

    There is one word more than the bits take: PyTorch compiles a dimension of one element by itself.
    """
    return ceil_div(ceil_div(key_length, tile), WORD_BITS) + 1


@dataclass(frozen=True)
class Problem:
    """One attention call as the backends take it: its sizes, and its options after they are checked and lowered."""

    batch: int
    heads: int
    key_heads: int
    query_length: int
    key_length: int
    head_size: int
    value_size: int
    score: ScoreOptions
    visibility: VisibilityArgs
    summary: KeySummary | None = None
    rounded_keys: RoundedKeys | None = None

    @classmethod
    def of(
        cls,
        query_shape: torch.Size,
        value_shape: torch.Size,
        score: ScoreOptions,
        visibility: VisibilityArgs,
        summary: KeySummary | None = None,
        rounded_keys: RoundedKeys | None = None,
    ) -> "Problem":
        """For a query and a value of these shapes."""
        batch, heads, query_length, head_size = query_shape
        _, key_heads, key_length, value_size = value_shape
        sizes = batch, heads, key_heads, query_length, key_length, head_size, value_size
        return cls(*sizes, score, visibility, summary, rounded_keys)

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.key_heads if self.key_heads else 1

    @property
    def widest(self) -> int:
        """The larger head size, of keys or of values."""
        return max(self.head_size, self.value_size)

    @property
    def z_scale(self) -> float | Tensor:
        """z = z_scale * (query . key). Both factors are numbers, or tensors."""
        assert self.score.scale is not None
        return (self.score.alpha - 1.0) * self.score.scale

    @property
    def diagonal(self) -> int:
        """With a causal mask, query i sees keys 0 .. i + diagonal: the last query sees the last key."""
        return self.key_length - self.query_length

    @property
    def is_empty(self) -> bool:
        """A dimension has no element. There is no score, and every output is zero."""
        return 0 in (self.batch, self.heads, self.key_heads, self.query_length, self.key_length)

    @property
    def may_hide_all_keys(self) -> bool:
        """A query may see no key."""
        visibility = self.visibility
        return visibility.intervals is not None or visibility.tile_kinds is not None or self.diagonal < 0

    def intervals(self, device: torch.device) -> Tensor:
        """(batch, 3, query length) int32: those of VisibilityArgs, or of the plain mask in their place."""
        if self.visibility.intervals is not None:
            return self.visibility.intervals
        position = torch.arange(self.query_length, dtype=torch.int32, device=device) + self.diagonal
        stop = torch.full_like(position, self.key_length)
        if self.visibility.is_causal:
            stop = (position + 1).clamp(0, self.key_length)
        return torch.stack((torch.zeros_like(position), stop, position)).expand(self.batch, -1, -1)
