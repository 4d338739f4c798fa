"""Parts of a whole sequence: shard, unshard, and the positions of a part's tokens."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..core.checks import checked_device, typed
from .exchange import gather
from .layout import Layout, check_layout, check_length, local_positions, split
from .ranks import Ranks


def positions(
    length: int,
    group: ProcessGroup | DeviceMesh,
    layout: Layout = "balanced",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The positions of this rank's tokens in the whole sequence.

    Args:
        length: of the whole sequence, a multiple of the number of ranks, and of twice that for ``"balanced"``.
        group: a ``ProcessGroup`` or a one-dimensional ``DeviceMesh``.
        layout: ``"balanced"`` cuts the sequence into two chunks for each rank: rank r of n has the chunks r and
            2 n - 1 - r. ``"contiguous"`` cuts it into one chunk for each rank.
        device: of the result; default that of ``torch.arange``.

    Returns:
        (local length,) int64.

    Raises:
        TypeError, ValueError: another group, layout or device, and a length that does not divide.
    """
    ranks = Ranks.of(group)
    check_layout(layout)
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"length must be an integer, got {typed(length)}")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    check_length(length, ranks.size, layout)
    return local_positions(length, ranks, layout, None if device is None else checked_device(device))


def shard(tensor: Tensor, dim: int, group: ProcessGroup | DeviceMesh, layout: Layout = "balanced") -> Tensor:
    """This rank's part of a tensor that every rank has whole: tokens, labels, positions.

    Nothing is exchanged. The result is a copy, and differentiable: its gradient is that of the own part, 0 elsewhere.

    Args:
        tensor: of any dtype.
        dim: the dimension of the sequence. Its length must be a multiple of the number of ranks, and of twice that for
            ``"balanced"``.
        group, layout: as for :func:`positions`.

    Raises:
        TypeError, ValueError: another group, layout or dimension, and a length that does not divide.
    """
    ranks = Ranks.of(group)
    check_layout(layout)
    dim = check_dim(tensor, dim)
    check_length(tensor.shape[dim], ranks.size, layout)
    return split(tensor, dim, ranks.size, layout)[ranks.rank]


def unshard(tensor: Tensor, dim: int, group: ProcessGroup | DeviceMesh, layout: Layout = "balanced") -> Tensor:
    """The whole tensor, on every rank, of parts of one shape: the inverse of :func:`shard`.

    Every rank of the group must call it. It is differentiable, once: the gradient of a part is the sum of what the
    whole gets on each rank, always added in the same order, in float32 for 16-bit types.

    Args:
        tensor: of any dtype, of one shape and dtype on all ranks.
        dim: the dimension of the sequence. With ``"balanced"``, its local length must be even.
        group, layout: as for :func:`positions`.

    Raises:
        TypeError, ValueError: another group, layout or dimension, and a length that does not divide.
    """
    ranks = Ranks.of(group)
    check_layout(layout)
    dim = check_dim(tensor, dim)
    check_length(tensor.shape[dim] * ranks.size, ranks.size, layout)
    return gather(tensor, dim, ranks, layout)


def check_dim(tensor: object, dim: object) -> int:
    """The dimension, counted from 0."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {typed(dim)}")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim must be a dimension of the tensor {tuple(tensor.shape)}, got {dim}")
    return dim % tensor.dim()
