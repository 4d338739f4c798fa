"""Calls whose options are numbers: checked and lowered once, and kept for calls like them.

To check and to lower a call takes the host as long as to launch a short one. Calls with tensors of the same shapes,
dtypes and devices, and with equal options, pass the same checks and are lowered to the same.
"""

import torch
from torch import Tensor

from .attention import OptionNumbers, OptionTensors
from .eager import PLAIN

MOST = 256  # calls that are kept
NUMBERS = float, int, bool, str, type(None)

Lowered = tuple[OptionTensors, OptionNumbers]
_kept: dict[tuple, Lowered] = {}


def likeness(tensors: tuple[Tensor, ...], options: tuple, window: object) -> tuple | None:
    """What is equal in calls that are checked and lowered alike; None where more than this decides.

    An option of another type is another option: 1 is a window, and True is none.
    """
    if type(window) is not tuple or torch.compiler.is_compiling():
        return None
    types = *map(type, options), *map(type, window)
    if any(kind not in NUMBERS for kind in types):
        return None
    alike = []
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.is_nested or tensor.is_meta:
            return None
        device = tensor.device
        if torch.is_autocast_enabled(device.type):
            return None
        alike += tensor.shape, tensor.dtype, device
    return *alike, *options, window, *types


def kept(like: tuple | None) -> Lowered | None:
    """The options of a call like this one, as the operator takes them; None if there was none."""
    return None if like is None else _kept.get(like)


def keep(like: tuple | None, lowered: Lowered) -> None:
    """Keep what a call was lowered to; the oldest goes. Tensors may be of a mode, or of a graph, that ends."""
    if like is None or any(tensor is not None for tensor in lowered[0]):
        return
    if len(_kept) >= MOST:
        _kept.pop(next(iter(_kept)), None)
    _kept[like] = lowered
