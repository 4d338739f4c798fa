"""Speed, for `flash-entmax check`: a few times of this GPU, beside those that are expected of it.

Softmax by PyTorch is timed beside. So a GPU that is busy, or held back, is told from something that is wrong here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..backends import BACKENDS
from ..functional import entmax_attention
from ..testing import topic_inputs

SHAPE = 1, 8, 32_768, 64  # batch, heads, tokens, head size
TOPICS = 4  # a quarter of the tiles is live
INPUTS = "8 heads of 64, 32,768 tokens, 4 topics, bfloat16, causal, as CUDA graphs"
SOFTMAX = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # the first that runs
SLOW = 1.3  # times as long as expected


class Times(NamedTuple):
    """Milliseconds of entmax, and of softmax on the same tensors."""

    entmax: float
    softmax: float

    @property
    def quotient(self) -> float:
        return self.entmax / self.softmax


# By GPU: benchmarks/results/2026-11-29-h200-keys.json, "4 topics, 8 heads of 64, 32768 tokens".
EXPECTED = {
    "NVIDIA H200": {"training step": Times(4.33, 8.86), "forward pass": Times(2.34, 2.42)},
}


def speed_check() -> None:
    """Print a line for each time, and what it means."""
    obstacle = why_not()
    if obstacle:
        print(f"speed: not measured: {obstacle}")
        return
    gpu = torch.cuda.get_device_name()
    print(f"speed on {gpu}: {INPUTS}")
    for name, times in measured():
        print(f"{name}: entmax {times.entmax:.2f} ms, softmax {times.softmax:.2f} ms, {judged(gpu, name, times)}")


def why_not() -> str:
    """Why nothing is measured; empty if something is."""
    if not torch.cuda.is_available():
        return "there is no GPU, and no figures of CPUs are kept"
    return BACKENDS["triton"].obstacle(torch.bfloat16, torch.device("cuda"))


def measured() -> Iterator[tuple[str, Times]]:
    """By the name in EXPECTED, as benchmarks/keys.py measures them."""
    from .benchmarks.measure import graph_ms, step

    inputs = topic_inputs(*SHAPE, TOPICS, dtype=torch.bfloat16, device="cuda")
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)
    grad_output = torch.randn_like(inputs[0])
    attends: tuple[Callable[..., Tensor], ...] = partial(entmax_attention, is_causal=True), softmax
    yield "training step", Times(*(graph_ms(partial(step, attend, leaves, grad_output)) for attend in attends))
    with torch.no_grad():
        forward = Times(*(graph_ms(partial(attend, *inputs)) for attend in attends))
    yield "forward pass", forward


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SOFTMAX, set_priority=True):
        return scaled_dot_product_attention(query, key, value, is_causal=True)


def judged(gpu: str, name: str, times: Times) -> str:
    """In words: whether the times are those that are expected, and what may be wrong."""
    if gpu not in EXPECTED:
        known = ", ".join(f"{expected[name].quotient:.2f} on an {other}" for other, expected in EXPECTED.items())
        return f"a quotient of {times.quotient:.2f}: no figures of this GPU are kept (it is {known})"
    expected = EXPECTED[gpu][name]
    if times.entmax <= SLOW * expected.entmax:
        return f"as expected ({expected.entmax:.2f} and {expected.softmax:.2f} ms)"
    slower = f"{times.entmax / expected.entmax:.1f} times as long as expected ({expected.entmax:.2f} ms)"
    if times.softmax > SLOW * expected.softmax:
        return (
            f"SLOW: {slower}, and softmax is slow as well: is this GPU shared, or its clock held back? See nvidia-smi"
        )
    return f"SLOW: {slower}, where softmax is not: please report this, with what flash-entmax info prints"
