"""Times of training steps, of forward-mode derivatives and of wide heads, and the time of the host in a call.

python benchmarks/derivatives.py takes a minute on a GPU. With PYTHONPATH at another version of the package, it times
that version. The times are those of single events and include the host's launches. Compare them with each other only.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import triton

from flash_entmax import entmax_attention
from flash_entmax.testing import iid_inputs, topic_inputs

WINDOW, HIDDEN_KEYS = (1000, 0), 100


def milliseconds(call: Callable[[], object], runs: int = 20) -> float:
    """The median time of a call on the GPU."""
    for _ in range(4):
        call()
    times = []
    for _ in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


def host_microseconds(call: Callable[[], object], runs: int = 300) -> float:
    """The mean time in which the host launches a call, without waiting for the GPU."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / runs


def step_of(tensors, **options) -> Callable[[], object]:
    """A call that computes the output and the gradients."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    grad_output = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(entmax_attention(*leaves, is_causal=True, **options), leaves, grad_output)


def tangent_of(tensors) -> Callable[[], object]:
    """A call that computes the output and its derivative along a tangent of every input."""
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)

    def attend(*tensors):
        return entmax_attention(*tensors, is_causal=True)

    return torch.no_grad()(lambda: torch.func.jvp(attend, tuple(tensors), tangents))


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}; bfloat16, causal")
    for length, topics in ((8192, 4), (32768, 4), (32768, 20)):
        tensors = topic_inputs(1, 8, length, 64, topics, dtype=torch.bfloat16, device="cuda")
        mask = torch.arange(length, device="cuda")[None] >= HIDDEN_KEYS
        times = {
            "tangent": milliseconds(tangent_of(tensors)),
            "step": milliseconds(step_of(tensors)),
            "window": milliseconds(step_of(tensors, window_size=WINDOW)),
            "key mask": milliseconds(step_of(tensors, key_mask=mask)),
        }
        print(
            f"{length} tokens, {topics} topics:", ", ".join(f"{name} {value:.2f} ms" for name, value in times.items())
        )
    for dtype in (torch.bfloat16, torch.float32):
        tensors = iid_inputs(1, 4, 4096, 512, dtype=dtype, device="cuda")
        print(f"4,096 tokens, 4 heads of 512, {dtype}: step {milliseconds(step_of(tensors), 5):.1f} ms")
    small = iid_inputs(1, 8, 64, 64, dtype=torch.bfloat16, device="cuda")
    print(f"64 tokens: the host takes {host_microseconds(step_of(small)):.0f} us for a step")


if __name__ == "__main__":
    main()
