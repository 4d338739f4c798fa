"""The operator that appends keys to KeySummaries.

flash_entmax::append_keys  -> nothing: it writes to the tensors of RoundedKeys
"""

from typing import Any

from torch import Tensor

from ..backends import BACKENDS
from ..core.call import RoundedKeys
from ..core.registration import fake, operator
from .eager import unrecorded

_ROUNDED = (
    "Tensor(a!) rounded, Tensor(b!) unit, Tensor(c!) error, Tensor(d!)? centre, Tensor(e!)? radius, "
    "Tensor(f!)? centre_error"
)


@operator(f"{_ROUNDED}, Tensor key, Tensor lengths, str backend", results=0)
def append_keys(*arguments: Any) -> None:
    *rounded_keys, key, lengths, backend = arguments
    BACKENDS[backend].append_keys(RoundedKeys(*rounded_keys), key, lengths)


@fake("append_keys")
def _(*arguments: Any) -> None:
    return None


def append(rounded_keys: RoundedKeys, key: Tensor, lengths: Tensor, backend: str) -> None:
    """See backends.Backend.append_keys. Gradients are off."""
    tensors = *rounded_keys, key, lengths
    unrecorded(append_keys, tensors)(*tensors, backend)
