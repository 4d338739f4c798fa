"""A mixer's output, split into what each input token contributes to it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.tensors import row_dtype
from .gates import Gates, gates_of
from .measures import MEASURES
from .mixers import check_hidden, check_mask, check_measure, check_mixer, check_outputs

ROWS = 16  # output tokens that are split at a time


class Contributions(NamedTuple):
    """The outputs are ``parts.sum(2) + bias``.

    parts: (batch, output tokens, input tokens, width), 0 for input tokens behind the output token.
    bias: (batch, output tokens, width), what comes of the biases of the layer and of no token.
    """

    parts: Tensor
    bias: Tensor


@torch.no_grad()
def contributions(
    mixer: nn.Module, hidden: Tensor, *, attention_mask: Tensor | None = None, outputs: range | None = None
) -> Contributions:
    """Split the output of a state-space layer into an exact sum over its input tokens, with its gates held fixed.

    The sum equals ``mixer(hidden)`` up to rounding in float32. The results have the dtype float32, or float64 for
    float64 inputs, and no gradient. 16-bit weights and inputs are taken as the float32 numbers that they are.

    Memory, with 4 bytes for each number (8 in float64), for n output tokens of T: the result has
    ``batch * n * T * width``. While it is computed, 16 output tokens at a time take some ``6 * batch * 16 * T *
    channels``, or with Mamba some ``4 * batch * T * channels * state`` where that is more. Where the whole is too
    large, take ``outputs`` in slices, or :func:`shares`, which does.

    Args:
        mixer: one of :data:`ACCEPTED`, such as ``model.backbone.layers[0].mixer``.
        hidden: (batch, tokens, width), the input of the mixer, behind the norm of its block.
        attention_mask: (batch, tokens), 0 at padding and 1 elsewhere, as the mixer takes it.
        outputs: the output tokens, such as ``range(100, 116)``; all by default.

    Raises:
        TypeError: another kind of layer, or of one of its parts (adapters, quantized weights); other wrong types.
        ValueError: an activation that is not SiLU; wrong shapes, devices or ranges.
    """
    check_mixer(mixer)
    check_hidden(mixer, hidden)
    check_mask(hidden, attention_mask)
    batch, tokens, _ = hidden.shape
    outputs, width = check_outputs(tokens, outputs), mixer.out_proj.out_features
    parts = hidden.new_zeros(batch, len(outputs), tokens, width, dtype=row_dtype(hidden))
    bias = parts.new_empty(batch, len(outputs), width)
    for rows, found in split_slices(mixer, hidden, attention_mask, outputs):
        here = slice(rows.start - outputs.start, rows.stop - outputs.start)
        parts[:, here, : rows.stop], bias[:, here] = found
    return Contributions(parts, bias)


@torch.no_grad()
def shares(mixer: nn.Module, hidden: Tensor, *, attention_mask: Tensor | None = None, measure: str = "norm") -> Tensor:
    """Each input token's share of each output: (batch, output tokens, input tokens), not negative, rows that sum to 1.

    A row in which no token contributes, such as that of padding, is 0. The parts are held for 16 output tokens at a
    time: beside the result, memory is that of :func:`contributions` for n = 16. The dtype is that of its parts.

    Args:
        mixer, hidden, attention_mask: as for :func:`contributions`.
        measure: ``"norm"``, the Euclidean length of a part, or ``"alti"``, by how much the part makes the output longer
            (arXiv 2203.04212).

    Raises:
        TypeError, ValueError: what :func:`contributions` raises; another measure.
    """
    check_mixer(mixer)
    check_hidden(mixer, hidden)
    check_mask(hidden, attention_mask)
    check_measure(measure, MEASURES)
    batch, tokens, _ = hidden.shape
    found = hidden.new_zeros(batch, tokens, tokens, dtype=row_dtype(hidden))
    for rows, split in split_slices(mixer, hidden, attention_mask, range(tokens)):
        found[:, rows.start : rows.stop, : rows.stop] = MEASURES[measure](split.parts)
    return found


def split_slices(
    mixer: nn.Module, hidden: Tensor, attention_mask: Tensor | None, outputs: range
) -> Iterator[tuple[range, Contributions]]:
    """Some output tokens after others, with the parts of the input tokens up to the last of them."""
    with torch.autocast(hidden.device.type, enabled=False):
        gates = gates_of(mixer, hidden, attention_mask)
        for first in range(outputs.start, outputs.stop, ROWS):
            rows = range(first, min(first + ROWS, outputs.stop))
            yield rows, split_rows(gates, rows)


def split_rows(gates: Gates, rows: range) -> Contributions:
    """Walk the layer backwards from the outputs of these rows: scan, SiLU, convolution."""
    of_convolved = gates.scan.weights(rows) * gates.silu_gate[:, None, : rows.stop]
    of_channels = through_convolution(of_convolved, gates.taps)
    bias = of_convolved.sum(2) * gates.tap_bias + of_channels.sum(2) * gates.channel_bias
    parts = of_channels * gates.channels[:, None, : rows.stop]
    factor = gates.out_gate[:, rows.start : rows.stop]
    if gates.norm is not None:
        factor = factor * gates.norm.of(factor * (parts.sum(2) + bias))
    parts = (parts * factor.unsqueeze(2)) @ gates.out_weight.mT
    return Contributions(parts, (bias * factor) @ gates.out_weight.mT + gates.out_bias)


def through_convolution(weights: Tensor, taps: Tensor) -> Tensor:
    """From weights of the convolution's outputs to weights of its inputs: (batch, rows, tokens, channels).

    ``a_j = sum_t taps(t) u_(j-t) + bias``, so the weight of ``u_k`` is ``sum_t taps(t) weight_(k+t)``.
    """
    found = weights * taps[:, 0]
    for ago in range(1, min(taps.shape[1], weights.shape[2])):
        found[:, :, :-ago] += weights[:, :, ago:] * taps[:, ago]
    return found
