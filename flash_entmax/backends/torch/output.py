"""The output of rows at their offsets, with the last step of tau made on the output itself."""

import torch
from torch import Tensor

from ...core.threshold import probability, support_weight


def outputs(alpha: float, relative: Tensor, offset: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O = sum p v and O1 = sum u v / sum u, with one more step of tau on the output itself.

    dO / d offset = r sum u v, so the step (1 - sum p) / (r sum u) adds (1 - sum p) O1.
    """
    distance = (relative + offset.unsqueeze(-1)).clamp_min_(0)
    p, u = probability(distance, alpha), support_weight(distance, alpha)
    weight = u.sum(-1, keepdim=True)
    mean = product_with(u, v) / torch.where(weight == 0, 1, weight)
    return product_with(p, v) + (1 - p.sum(-1, keepdim=True)) * mean, mean


def product_with(p: Tensor, v: Tensor, block: int = 512) -> Tensor:
    """p @ v, a block of keys at a time: one float32 sum of 131,072 equal parts would be off by 5e-4."""
    if p.shape[-1] <= block:
        return torch.bmm(p, v)
    return sum(p[..., start : start + block] @ v[:, start : start + block] for start in range(0, p.shape[-1], block))
