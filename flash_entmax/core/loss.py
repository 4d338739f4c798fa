"""What a loss along rows is given: its numbers, and its target."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LossOptions(NamedTuple):
    """The numbers of a loss: q is 1 - smoothing of the target, and smoothing / n more everywhere.

    A target is classes (rows,) int64, or probabilities (rows, n). Rows whose class is `ignore_index` have loss 0.
    """

    ignore_index: int
    smoothing: float
    alpha: float


def holds_classes(target: Tensor) -> bool:
    return target.dim() == 1


def check_classes(target: Tensor, ignore_index: int, count: int) -> None:
    """Read the classes on a CPU. On a GPU, where reading would wait for the device, assert them there."""
    if not holds_classes(target):
        return
    valid = ((target >= 0) & (target < count)) | (target == ignore_index)
    message = f"target must hold classes from 0 to {count - 1}, or ignore_index {ignore_index}"
    if target.is_cuda:
        torch._assert_async(valid.all(), message)
    elif not target.is_meta and not valid.all():
        raise ValueError(f"{message}, got {target[~valid][0].item()}")


def smoothed_entropy(smoothing: float, n: int, alpha: float) -> float:
    """Omega of q where the target is a class: smoothing / n everywhere, and 1 - smoothing more at that class."""
    if not smoothing:
        return 0.0
    share = smoothing / n
    entries = (n - 1, share), (1, 1.0 - smoothing + share)
    total = sum(count * q * math.expm1((alpha - 1.0) * math.log(q)) for count, q in entries if q > 0)
    return total / (alpha * (alpha - 1.0))
