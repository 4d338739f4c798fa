"""What heads know of distance: positions, rotary angles, ALiBi slopes."""

import torch
from torch import Tensor

from ..core.tensors import row_dtype

POSITIONS = "rope", "alibi", "nape", "none"


def in_sequences(position: Tensor, cu_seq: Tensor | None) -> Tensor:
    """(tokens,) int64: positions as they are; of packed tokens, those in their own sequence."""
    if cu_seq is not None:
        sequence = torch.searchsorted(cu_seq, position, right=True) - 1
        position = position - cu_seq[sequence]
    return position


def rotation_of(position: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines and signed sines of the rotary angles (arXiv 2104.09864), for :func:`rotate`.

    (length,) positions -> (2, length, head_dim), float64 for positions in float64, else float32. The angle of pair j is
    position * base^(-2j / head_dim). Both halves have the same cosines; the sines of the first half are negated.
    """
    pair = torch.arange(0, head_dim, 2, dtype=row_dtype(position), device=position.device)
    angle = position.unsqueeze(-1) * base ** -(pair / head_dim)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """(..., length, heads, head_dim): turn the pairs (x_j, x_{j + head_dim / 2}) of each position by its angles."""
    cosine, sine = rotation.unsqueeze(-2)
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cosine + partner * sine).to(x.dtype)


def heads_without_slope(position: str, num_heads: int) -> int:
    """How many heads have no ALiBi slope. They come first."""
    return {"alibi": 0, "nape": num_heads - num_heads // 2}.get(position, num_heads)


def alibi_slopes_of(position: str, num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """(heads,) of the dtype; None where no head has a slope.

    Head h = 1, 2, ... of those with a slope has 2^(-8 h / heads) for "alibi" (arXiv 2108.12409), and 1 / h for "nape"
    (arXiv 2506.16640).
    """
    if position not in ("alibi", "nape"):
        return None
    without = heads_without_slope(position, num_heads)
    count = torch.arange(1 - without, num_heads + 1 - without, dtype=dtype, device=device)
    if position == "alibi":
        return 2.0 ** (-8.0 * count / num_heads)
    return torch.where(count > 0, 1.0 / count.clamp_min(1.0), 0.0)
