"""The operator that appends keys to KeySummaries.

flash_entmax::append_keys  -> nothing: it writes to the tensors of RoundedKeys
"""

from torch import Tensor

from ..backends import BACKENDS
from ..core.call import RoundedKeys
from ..core.registration import fake, operator
from .eager import unrecorded


@operator("Tensor(a!) rounded, Tensor(b!) unit, Tensor(c!) error, Tensor key, Tensor lengths, str backend", results=0)
def append_keys(rounded, unit, error, key, lengths, backend):
    BACKENDS[backend].append_keys(RoundedKeys(rounded, unit, error), key, lengths)


@fake("append_keys")
def _(rounded, unit, error, key, lengths, backend):
    return None


def append(rounded_keys: RoundedKeys, key: Tensor, lengths: Tensor, backend: str) -> None:
    """See backends.Backend.append_keys. Gradients are off."""
    tensors = *rounded_keys, key, lengths
    unrecorded(append_keys, tensors)(*tensors, backend)
