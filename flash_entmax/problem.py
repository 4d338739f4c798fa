"""The nouns: the Problem that one call poses, the Support it can report, the Impl that solves it, and every check."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

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


def refuse_nested(name: str, tensor: object) -> None:
    if isinstance(tensor, Tensor) and tensor.is_nested:
        raise ValueError(f"{name} must be a tensor that is not nested, got a nested one: pass its values()")


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a ValueError or TypeError that quotes what was passed and says what is accepted."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, length, dim), got {tuple(tensor.shape)}")
    _check_dtypes_and_devices(tensors)
    _check_shapes(query, key, value)


def _check_dtypes_and_devices(tensors: dict[str, Tensor]) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"query, key and value must have one dtype, got {_listed(dtypes)}")
    accepted = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if dtypes["query"] not in accepted:
        raise TypeError(f"query, key and value must be float16, bfloat16, float32 or float64, got {dtypes['query']}")
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"query, key and value must be on one device, got {_listed(devices)}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            f"query, key and value must have one batch size, got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same number of heads, got {key.shape[1]} and {value.shape[1]}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"key and value must have the same length, got {key.shape[2]} and {value.shape[2]}")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"query heads must be a multiple of key heads, got {heads} query heads and {key_heads} key heads"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head size, got {query.shape[3]} and {key.shape[3]}")
    for name, size in (("query and key", query.shape[3]), ("value", value.shape[3])):
        if not 1 <= size <= MAX_HEAD_SIZE:
            raise ValueError(f"head size of {name} must be from 1 to {MAX_HEAD_SIZE}, got {size}")


def check_scalars(
    query: Tensor, alpha: float | Tensor, scale: float | Tensor | None, softcap: float, slopes: Tensor | None, impl: str
) -> None:
    batch, heads = query.shape[:2]
    if isinstance(alpha, Tensor):
        _check_parameter("alpha", alpha, query, ((), (heads,)))
    elif not is_number(alpha):
        raise TypeError(f"alpha must be a float in [1, 2] or a tensor, got {typed(alpha)}")
    elif not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must be in [1, 2] (1 is softmax, 2 is sparsemax), got {alpha}")
    if isinstance(scale, Tensor):
        _check_parameter("scale", scale, query, ((), (heads,)))
    elif scale is not None and not is_number(scale):
        raise TypeError(f"scale must be a positive float, a tensor or None, got {typed(scale)}")
    elif scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    check_softcap(softcap)
    limit = 1e3 if query.dtype.itemsize == 2 else 1e6
    if softcap > limit:
        raise ValueError(f"softcap must be at most {limit:g} for {query.dtype}, got {softcap}")
    if slopes is not None:
        _check_parameter("alibi_slopes", slopes, query, ((heads,), (batch, heads)))
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(map(repr, get_args(Impl)))}, got {impl!r}")
    if not isinstance(alpha, Tensor) and not isinstance(scale, Tensor) and alpha > 1.0:
        slope = (alpha - 1.0) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if not 1e-30 <= slope <= 1e30:
            raise ValueError(f"(alpha - 1) * scale must be from 1e-30 to 1e30, got alpha {alpha} and scale {scale}")


def check_softcap(softcap: object) -> None:
    if not is_number(softcap):
        raise TypeError(f"softcap must be a positive float, or 0 for none, got {typed(softcap)}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or 0 for none, got {softcap}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be True or False, got {said(value)}")


def said(value: object) -> str:
    """What was passed, in a message: its value, or its type where that may be long."""
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def typed(value: object) -> str:
    """What was passed, in a message about types: its type, and its value where that is short."""
    kind = type(value).__name__
    return kind if said(value) == kind else f"{kind} {said(value)}"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_parameter(name: str, tensor: Tensor, query: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of the query, {query.device}, got {tensor.device}")


def _listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
