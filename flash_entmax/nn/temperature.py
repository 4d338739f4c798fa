"""The length-aware temperature of ASEntmax."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..core.tensors import row_dtype


class AdaptiveTemperature(nn.Module):
    """A factor of the scores for each query (ASEntmax, arXiv 2506.16640): 1 + beta * log(position + 2)^gamma.

    beta = softplus(W_b x + b_b) and gamma = 2 tanh(W_g x + b_g) of the layer input x. Heads after the first ``heads``
    have the factor 1.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.beta = ZeroLinear(embed_dim, heads, device=device, dtype=dtype)
        self.gamma = ZeroLinear(embed_dim, heads, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.beta.reset_parameters()
        self.gamma.reset_parameters()

    def forward(self, x: Tensor, position: Tensor, num_heads: int) -> Tensor:
        """x (..., embed_dim) at position (...) -> (..., num_heads), float64 if x is, else float32."""
        dtype = row_dtype(x)
        beta, gamma = softplus(self.beta(x).to(dtype)), 2.0 * self.gamma(x).to(dtype).tanh()
        factor = 1.0 + beta * (position.to(dtype) + 2.0).log().unsqueeze(-1) ** gamma
        others = num_heads - factor.shape[-1]
        return torch.cat((factor, factor.new_ones(*factor.shape[:-1], others)), -1) if others else factor


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero. Temperatures that start at random numbers were seen to stay there.

    It draws no random number: from the same seed, later layers get the numbers that they get without it.
    """

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
