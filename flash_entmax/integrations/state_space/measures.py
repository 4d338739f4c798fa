"""How large a part of an output is: from vectors to shares, which are not negative and sum to 1."""

from torch import Tensor


def norm_shares(parts: Tensor) -> Tensor:
    """(..., tokens, width) -> (..., tokens): the Euclidean length of each part, over the sum of these lengths.

    A row in which nothing contributes, such as that of padding, is 0.
    """
    return normalised(parts.norm(dim=-1))


def alti_shares(parts: Tensor) -> Tensor:
    """(..., tokens, width) -> (..., tokens): by how much each part makes the sum of all longer, by magnitudes.

    ``max(0, |y| - |y - part|)`` for the sum ``y``, over the sum of these numbers (Ferrando et al. 2022, arXiv
    2203.04212). A part that points away from the sum has share 0. A row in which no part makes the sum longer is 0.
    """
    output = parts.sum(-2, keepdim=True)
    size = output.abs().sum(-1)
    return normalised((size - (output - parts).abs().sum(-1)).clamp_min(0))


def normalised(amounts: Tensor) -> Tensor:
    total = amounts.sum(-1, keepdim=True)
    return amounts / total.masked_fill(total == 0, 1)


MEASURES = {"norm": norm_shares, "alti": alti_shares}
