"""The recurrence in time, unrolled: with which weight each token's input stands in each token's output.

A state ``h`` decays by ``exp(rate step_i)`` at token i and takes up ``step_i write_i x_i``; the output is
``<read_i, h_i> + skip x_i``. With ``elapsed_i = step_1 + ... + step_i`` the weight of ``x_j`` in output i >= j is

    weight_ij = sum_n read_i(n) exp(rate(n) (elapsed_i - elapsed_j)) step_j write_j(n) + [i = j] skip
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChannelScan(NamedTuple):
    """Mamba: every channel has a time step of its own, and every entry of its state a decay of its own.

    read, write: (batch, tokens, state). step: (batch, tokens, channels). elapsed: its running sum in float64, whose
    differences lose no digits. rate: (channels, state), negative. skip: (channels,).
    """

    read: Tensor
    write: Tensor
    step: Tensor
    elapsed: Tensor
    rate: Tensor
    skip: Tensor

    def weights(self, rows: range) -> Tensor:
        """(batch, rows, tokens up to the last row, channels)."""
        start = rows.start
        own = self._within(rows)
        if start == 0:
            return own
        # Over the boundary in front of the rows, the decay is a product of two parts that are both at most 1.
        boundary = self.elapsed[:, start - 1 : start]
        after = self._decay(self.elapsed[:, start : rows.stop] - boundary) * self.read[:, start : rows.stop, None]
        before = self._decay(boundary - self.elapsed[:, :start]) * self._written(slice(start))
        return torch.cat((torch.einsum("brcn,bjcn->brjc", after, before), own), 2)

    def _within(self, rows: range) -> Tensor:
        """The weights of the rows' own tokens: (batch, rows, rows, channels)."""
        here = slice(rows.start, rows.stop)
        elapsed = self.elapsed[:, here]
        decay = self._decay((elapsed.unsqueeze(2) - elapsed.unsqueeze(1)).clamp_min(0))
        weights = torch.einsum("brjcn,brn,bjcn->brjc", decay, self.read[:, here], self._written(here))
        return with_skip(weights, self.skip)

    def _decay(self, time: Tensor) -> Tensor:
        """(..., channels) float64 -> (..., channels, state)."""
        return torch.exp(time.to(self.rate.dtype).unsqueeze(-1) * self.rate)

    def _written(self, tokens: slice) -> Tensor:
        """(batch, tokens, channels, state)."""
        return self.step[:, tokens].unsqueeze(-1) * self.write[:, tokens].unsqueeze(2)


class HeadScan(NamedTuple):
    """Mamba-2: the channels of a head share its time step and its one decay. Groups of heads share read and write.

    read, write: (batch, tokens, groups, state). step: (batch, tokens, heads). elapsed: as above. rate, skip: (heads,).
    head_size: channels of a head.
    """

    read: Tensor
    write: Tensor
    step: Tensor
    elapsed: Tensor
    rate: Tensor
    skip: Tensor
    head_size: int

    def weights(self, rows: range) -> Tensor:
        """(batch, rows, tokens up to the last row, channels)."""
        here, seen = slice(rows.start, rows.stop), slice(rows.stop)
        time = (self.elapsed[:, here].unsqueeze(2) - self.elapsed[:, seen].unsqueeze(1)).clamp_min(0)
        match = torch.einsum("brgn,bjgn->brjg", self.read[:, here], self.write[:, seen])
        match = match.repeat_interleave(len(self.rate) // match.shape[-1], -1)
        weights = match * torch.exp(time.to(self.rate.dtype) * self.rate) * self.step[:, None, seen]
        return with_skip(weights, self.skip).repeat_interleave(self.head_size, -1)


def with_skip(weights: Tensor, skip: Tensor) -> Tensor:
    """(batch, rows, tokens, n): 0 for the tokens behind a row's own, which is the last, and plus ``skip`` there."""
    rows, tokens = weights.shape[1:3]
    row, token = (torch.arange(count, device=weights.device) for count in (rows, tokens))
    place = token - (row + tokens - rows).unsqueeze(1)
    weights = weights.masked_fill((place > 0)[..., None], 0.0)
    return weights + (place == 0)[..., None] * skip
