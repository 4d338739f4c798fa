"""What a mixer computes of its tokens and is held fixed while its output is split: its gates, from its own weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, linear, silu, softplus

from ...core.tensors import row_dtype
from .mixers import is_second
from .scans import ChannelScan, HeadScan


class Gates(NamedTuple):
    """All tensors are in the dtype of rows: float32, or float64 for float64 inputs.

    channels: (batch, tokens, channels), the input of the convolution without its bias: linear in the layer's tokens.
    channel_bias: (channels,), that bias, of ``in_proj``. taps: (channels, taps), the weights of the convolution by how
    many tokens ago; tap_bias: (channels,). silu_gate: (batch, tokens, channels), sigmoid(a) behind the convolution; 0
    at padding. out_gate: (batch, tokens, channels), SiLU(z). norm: behind it, of Mamba-2. out_weight:
    (width, channels), out_bias: (width,).
    """

    channels: Tensor
    channel_bias: Tensor
    taps: Tensor
    tap_bias: Tensor
    silu_gate: Tensor
    scan: ChannelScan | HeadScan
    out_gate: Tensor
    norm: "NormGain | None"
    out_weight: Tensor
    out_bias: Tensor


class NormGain(NamedTuple):
    """An RMS norm over groups of channels: what it multiplies them with."""

    weight: Tensor
    group_size: int
    epsilon: float

    def of(self, channels: Tensor) -> Tensor:
        """(..., channels) -> the same shape."""
        groups = channels.unflatten(-1, (-1, self.group_size))
        gain = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * gain.expand(groups.shape).flatten(-2)


def gates_of(mixer: nn.Module, hidden: Tensor, attention_mask: Tensor | None) -> Gates:
    """hidden: (batch, tokens, width). attention_mask: (batch, tokens), 0 at padding."""
    hidden = hidden.to(row_dtype(hidden))
    mask = hidden.new_ones(()) if attention_mask is None else attention_mask.to(hidden.dtype).unsqueeze(-1)
    projected = linear(hidden * mask, like(hidden, mixer.in_proj.weight))
    bias = or_zeros(mixer.in_proj.bias, projected[0, 0])
    return (second_gates if is_second(mixer) else first_gates)(mixer, projected, bias, mask)


def first_gates(mixer: nn.Module, projected: Tensor, bias: Tensor, mask: Tensor) -> Gates:
    """Mamba. projected: (batch, tokens, 2 channels), without the bias: the input of the convolution, then z."""
    size, state, rank = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
    channels, z = projected[..., :size], projected[..., size:] + bias[size:]
    convolved, silu_gate = convolve(mixer, channels + bias[:size], mask)
    step, write, read = linear(convolved, like(z, mixer.x_proj.weight)).split((rank, state, state), -1)
    if hasattr(mixer, "dt_layernorm"):  # Falcon Mamba, Jamba
        step, write, read = mixer.dt_layernorm(step), mixer.b_layernorm(write), mixer.c_layernorm(read)
    step = softplus(linear(step, like(z, mixer.dt_proj.weight), like(z, mixer.dt_proj.bias)))
    rate, skip = -torch.exp(like(z, mixer.A_log)), like(z, mixer.D)
    scan = ChannelScan(read, write, step, step.double().cumsum(1), rate, skip)
    return Gates(channels, bias[:size], *taps_of(mixer, z), silu_gate, scan, silu(z), None, *out_of(mixer, z))


def second_gates(mixer: nn.Module, projected: Tensor, bias: Tensor, mask: Tensor) -> Gates:
    """Mamba-2. projected: z, the input of the convolution (values, then write and read by group), and the steps."""
    size, groups, state = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
    whole = projected + bias
    z, mixed, step = whole.split((size, size + 2 * groups * state, whole.shape[-1] - 2 * size - 2 * groups * state), -1)
    convolved, silu_gate = convolve(mixer, mixed, mask)
    write, read = (part.unflatten(-1, (groups, state)) for part in convolved[..., size:].chunk(2, -1))
    step = softplus(step + like(z, mixer.dt_bias)).clamp(*mixer.time_step_limit)
    rate, skip = -torch.exp(like(z, mixer.A_log)), like(z, mixer.D)
    scan = HeadScan(read, write, step, step.double().cumsum(1), rate, skip, mixer.head_dim)
    group_size = getattr(mixer.norm, "group_size", size)  # early versions of Transformers norm all channels together
    norm = NormGain(like(z, mixer.norm.weight), group_size, mixer.norm.variance_epsilon)
    taps, tap_bias = (part[:size] for part in taps_of(mixer, z))
    own = slice(size, 2 * size)
    channels, silu_gate = projected[..., own], silu_gate[..., :size]
    return Gates(channels, bias[own], taps, tap_bias, silu_gate, scan, silu(z), norm, *out_of(mixer, z))


def convolve(mixer: nn.Module, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU of the causal convolution of (batch, tokens, n), and its gate: both are 0 at padding."""
    convolution, length = mixer.conv1d, inputs.shape[1]
    weight, bias = like(inputs, convolution.weight), like(inputs, convolution.bias)
    taps = weight.shape[-1]
    found = conv1d(inputs.mT, weight, bias, padding=taps - 1, groups=weight.shape[0])[..., :length].mT
    gate = torch.sigmoid(found) * mask
    return gate * found, gate


def taps_of(mixer: nn.Module, other: Tensor) -> tuple[Tensor, Tensor]:
    """(n, taps) by how many tokens ago, and the bias (n,)."""
    weight = like(other, mixer.conv1d.weight).squeeze(1).flip(-1)
    return weight, or_zeros(mixer.conv1d.bias, weight[:, 0])


def out_of(mixer: nn.Module, other: Tensor) -> tuple[Tensor, Tensor]:
    weight = like(other, mixer.out_proj.weight)
    return weight, or_zeros(mixer.out_proj.bias, weight[:, 0])


def like(other: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(other.dtype)


def or_zeros(bias: Tensor | None, other: Tensor) -> Tensor:
    """The bias in the dtype of the other tensor; without one, zeros of its shape."""
    return torch.zeros_like(other) if bias is None else bias.to(other.dtype)
