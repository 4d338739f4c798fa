"""Reading a mask function of Transformers by calling it with symbols in place of indices.

Transformers describes a mask by a function of the indices of batch row, head, query and key. `read_mask` finds the
window and the sequences that describe causal, bidirectional, windowed and packed attention.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...core.intervals import UNLIMITED


class _UnreadableError(Exception):
    """The function is none of the masks that `MaskTerms` can describe."""


class MaskTerms:
    """A mask by its terms: keys from `left` before the query to `right` after it, in the query's sequence.

    sequences: (batch, length), the number of each token's sequence. positions: the table whose entries were compared,
    None where indices were.
    """

    device = None  # mask functions move their terms to one device

    def __init__(self, left=UNLIMITED, right=UNLIMITED, sequences=None, positions=None) -> None:
        self.left, self.right, self.sequences, self.positions = left, right, sequences, positions

    def to(self, device) -> "MaskTerms":
        return self

    def __and__(self, other: "MaskTerms") -> "MaskTerms":
        if not isinstance(other, MaskTerms):
            raise _UnreadableError
        return MaskTerms(
            _narrower(self.left, other.left), _narrower(self.right, other.right),
            _common(self.sequences, other.sequences), _common(self.positions, other.positions),
        )  # fmt: skip

    def __bool__(self) -> bool:
        raise _UnreadableError


def _narrower(one: int, other: int) -> int:
    if UNLIMITED in (one, other):
        return max(one, other)
    return min(one, other)


def _common(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is not None and other is not None and one is not other:
        raise _UnreadableError
    return other if one is None else one


class _Index:
    """The symbol query * (index of the query) + key * (index of the key) + constant, or its absolute value.

    With a `table`, the entries of the table at the indices take their place: positions, or numbers of sequences.
    """

    def __init__(self, query: int, key: int, constant: int = 0, table: Tensor | None = None, is_absolute=False) -> None:
        self.query, self.key, self.constant, self.table, self.is_absolute = query, key, constant, table, is_absolute

    def new_ones(self, size, dtype=None) -> MaskTerms:
        return MaskTerms()

    def __sub__(self, other) -> "_Index":
        if self.is_absolute and isinstance(other, int):
            return _Index(self.query, self.key, self.constant - other, self.table, True)
        if isinstance(other, int):
            other = _Index(0, 0, other, self.table)
        if not isinstance(other, _Index) or self.is_absolute or other.is_absolute or self.table is not other.table:
            raise _UnreadableError
        return _Index(self.query - other.query, self.key - other.key, self.constant - other.constant, self.table)

    def __abs__(self) -> "_Index":
        if (self.query, self.key) not in ((1, -1), (-1, 1)) or self.constant:
            raise _UnreadableError
        return _Index(self.query, self.key, 0, self.table, True)

    def __le__(self, other) -> MaskTerms:
        return (self - other).is_at_most_zero()

    def __lt__(self, other) -> MaskTerms:
        return self.__le__(other - 1)

    def __ge__(self, other) -> MaskTerms:
        return (_Index(0, 0, other, self.table) if isinstance(other, int) else other).__le__(self)

    def __gt__(self, other) -> MaskTerms:
        return self.__ge__(other - -1)

    def __eq__(self, other) -> MaskTerms:
        if not isinstance(other, _Index) or self.table is None or self.table is not other.table:
            raise _UnreadableError
        if (self.query, self.key, other.query, other.key) != (1, 0, 0, 1) or self.constant or other.constant:
            raise _UnreadableError
        return MaskTerms(sequences=self.table)

    __hash__ = None

    def is_at_most_zero(self) -> MaskTerms:
        limit, sides = -self.constant, (self.query, self.key)
        if self.is_absolute and limit >= 0:
            return MaskTerms(limit, limit, positions=self.table)
        if sides == (1, -1) and limit >= 0:  # query - key <= limit
            return MaskTerms(left=limit, positions=self.table)
        if sides == (-1, 1) and limit >= 0:
            return MaskTerms(right=limit, positions=self.table)
        if sides == (-1, 0) and limit >= 0:  # 0 <= query, which is always so
            return MaskTerms(positions=self.table)
        raise _UnreadableError


class _TableLookUp(TorchFunctionMode):
    """Lets symbols index a table, as in ``position_ids[batch, query]``."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.__getitem__ and isinstance(arguments[1], tuple):
            table, index = arguments
            if len(index) == 2 and isinstance(index[0], _BatchIndex) and isinstance(index[1], _Index):
                token = index[1]
                if token.table is not None or token.constant or token.is_absolute:
                    raise _UnreadableError
                return _Index(token.query, token.key, 0, table)
        return function(*arguments, **(options or {}))


class _BatchIndex:
    """The symbol of a batch row or of a head. It can only look up an entry in a table."""


def read_mask(mask_function: Callable) -> MaskTerms | None:
    """Call the function with symbols instead of indices; None if `MaskTerms` cannot describe its mask.

    This works in ``torch.compile`` too, which cannot look into the function's closure, but can call it.
    """
    try:
        with _TableLookUp():
            result = mask_function(_BatchIndex(), _BatchIndex(), _Index(1, 0), _Index(0, 1))
    except Exception:  # the function may do anything, and most of it fails with symbols
        return None
    if not isinstance(result, MaskTerms) or (result.positions is not None and result.sequences is None):
        return None
    return result
