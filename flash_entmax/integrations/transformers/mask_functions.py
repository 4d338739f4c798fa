"""What a mask function of Transformers says, found by calling it with symbols in place of indices.

Transformers describes a mask by a function of the indices of batch row, head, query and key. `read` finds the bounds
and the sequences that causal, bidirectional, windowed and packed attention are made of.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...core.visibility import UNLIMITED


class _UnreadableError(Exception):
    """The function does something else than the masks that have options of their own."""


class Seen:
    """What a mask function says: keys from `left` before the query to `right` after it, of the query's sequence.

    sequences: (batch, length), the number of each token's sequence. positions: the table that gave the places, if any.
    """

    device = None  # mask functions move their parts to each other's device

    def __init__(self, left=UNLIMITED, right=UNLIMITED, sequences=None, positions=None) -> None:
        self.left, self.right, self.sequences, self.positions = left, right, sequences, positions

    def to(self, device) -> "Seen":
        return self

    def __and__(self, other: "Seen") -> "Seen":
        if not isinstance(other, Seen):
            raise _UnreadableError
        return Seen(
            _nearer(self.left, other.left), _nearer(self.right, other.right),
            _only(self.sequences, other.sequences), _only(self.positions, other.positions),
        )  # fmt: skip

    def __bool__(self) -> bool:
        raise _UnreadableError


def _nearer(one: int, other: int) -> int:
    if UNLIMITED in (one, other):
        return max(one, other)
    return min(one, other)


def _only(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is not None and other is not None and one is not other:
        raise _UnreadableError
    return other if one is None else one


class _Place:
    """query * (index of the query) + key * (index of the key) + shift; or its absolute value.

    With `table`, places are those that the table gives for the indices: positions, or numbers of sequences.
    """

    def __init__(self, query: int, key: int, shift: int = 0, table: Tensor | None = None, is_absolute=False) -> None:
        self.query, self.key, self.shift, self.table, self.is_absolute = query, key, shift, table, is_absolute

    def new_ones(self, size, dtype=None) -> Seen:
        return Seen()

    def __sub__(self, other) -> "_Place":
        if self.is_absolute and isinstance(other, int):
            return _Place(self.query, self.key, self.shift - other, self.table, True)
        if isinstance(other, int):
            other = _Place(0, 0, other, self.table)
        if not isinstance(other, _Place) or self.is_absolute or other.is_absolute or self.table is not other.table:
            raise _UnreadableError
        return _Place(self.query - other.query, self.key - other.key, self.shift - other.shift, self.table)

    def __abs__(self) -> "_Place":
        if (self.query, self.key) not in ((1, -1), (-1, 1)) or self.shift:
            raise _UnreadableError
        return _Place(self.query, self.key, 0, self.table, True)

    def __le__(self, other) -> Seen:
        return (self - other).is_at_most_zero()

    def __lt__(self, other) -> Seen:
        return self.__le__(other - 1)

    def __ge__(self, other) -> Seen:
        return (_Place(0, 0, other, self.table) if isinstance(other, int) else other).__le__(self)

    def __gt__(self, other) -> Seen:
        return self.__ge__(other - -1)

    def __eq__(self, other) -> Seen:
        if not isinstance(other, _Place) or self.table is None or self.table is not other.table:
            raise _UnreadableError
        if (self.query, self.key, other.query, other.key) != (1, 0, 0, 1) or self.shift or other.shift:
            raise _UnreadableError
        return Seen(sequences=self.table)

    __hash__ = None

    def is_at_most_zero(self) -> Seen:
        limit, sides = -self.shift, (self.query, self.key)
        if self.is_absolute and limit >= 0:
            return Seen(limit, limit, positions=self.table)
        if sides == (1, -1) and limit >= 0:  # query - key <= limit
            return Seen(left=limit, positions=self.table)
        if sides == (-1, 1) and limit >= 0:
            return Seen(right=limit, positions=self.table)
        if sides == (-1, 0) and limit >= 0:  # 0 <= query, which is always so
            return Seen(positions=self.table)
        raise _UnreadableError


class _LookUps(TorchFunctionMode):
    """Lets places index a table, as in ``position_ids[batch, query]``."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.__getitem__ and isinstance(arguments[1], tuple):
            table, index = arguments
            if len(index) == 2 and isinstance(index[0], _Batch) and isinstance(index[1], _Place):
                place = index[1]
                if place.table is not None or place.shift or place.is_absolute:
                    raise _UnreadableError
                return _Place(place.query, place.key, 0, table)
        return function(*arguments, **(options or {}))


class _Batch:
    """The index of a batch row, or of a head: nothing can be done with it but to look up in a table."""


def read(mask_function: Callable) -> Seen | None:
    """Calls the function with symbols instead of indices; None where it is none of the masks that `Seen` can say.

    Works in ``torch.compile`` too, which cannot look into the function's closure, but can call it.
    """
    try:
        with _LookUps():
            seen = mask_function(_Batch(), _Batch(), _Place(1, 0), _Place(0, 1))
    except Exception:  # whatever a function does that cannot work with symbols
        return None
    if not isinstance(seen, Seen) or (seen.positions is not None and seen.sequences is None):
        return None
    return seen
