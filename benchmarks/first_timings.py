"""Forward and training step beside SDPA on inputs of known block sparsity, and where our time goes, stage by stage.

    python benchmarks/first_timings.py --output benchmarks/results/NAME.json

Needs a CUDA GPU. Medians of CUDA events over repeated calls; every competitor in this one process, on the same tensors
(bfloat16, causal, batch 1). Nothing is timed before the output of the case agrees with the reference on its last rows.
"""

import argparse
import json
import time
from functools import partial

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention
from flash_entmax.testing import relative_error, topic_inputs

CASES = [(8192, 64, 16), (32768, 64, 8), (32768, 128, 8)]  # length, head size, heads
TOPICS = (1, 4, 20)
SOFTMAX = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
OUTPUT_BUDGET = 1e-2


def median_ms(call, repeats: int = 15) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[repeats // 2]


def forward_and_step(attend, inputs, grad_output) -> dict[str, float]:
    def step() -> None:
        torch.autograd.grad(attend(*inputs), inputs, grad_output)

    return {"forward_ms": median_ms(partial(attend, *inputs)), "step_ms": median_ms(step)}


def check(inputs, rows: int = 256) -> float:
    """Relative error of the last rows against the float64 reference; raises where it is over budget."""
    query, key, value = (tensor.detach()[:, :1] for tensor in inputs)
    exact = entmax_attention(
        query[:, :, -rows:].double(), key.double(), value.double(), is_causal=True, impl="reference"
    )
    error = relative_error(entmax_attention(query, key, value, is_causal=True)[:, :, -rows:], exact)
    if not error < OUTPUT_BUDGET:
        raise RuntimeError(f"output is off by {error:.3g}, over {OUTPUT_BUDGET}: nothing is timed")
    return error


def stages(attend, inputs, grad_output, repeats: int = 5) -> dict[str, float]:
    """Milliseconds per training step in each of our kernels."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            torch.autograd.grad(attend(*inputs), inputs, grad_output)
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.key.endswith("_kernel")]
    return {event.key.removesuffix("_kernel"): event.device_time_total / 1000 / repeats for event in events}


def measure(length: int, head_size: int, heads: int, topics: int) -> dict:
    inputs = topic_inputs(1, heads, length, head_size, topics, dtype=torch.bfloat16, device="cuda")
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grad_output = torch.randn_like(inputs[0])
    error = check(inputs)
    attend = partial(entmax_attention, is_causal=True)
    support = attend(*(tensor.detach() for tensor in inputs), return_support=True)[1]
    visible = torch.ones_like(support.tiles).tril().sum()
    result = {
        "length": length,
        "head_size": head_size,
        "heads": heads,
        "topics": topics,
        "block_sparsity": 1 - (support.tiles.sum() / visible).item(),
        "support_size": support.size.float().mean().item(),
        "output_error": error,
        "flash-entmax": forward_and_step(attend, inputs, grad_output),
        "stages_ms": stages(attend, inputs, grad_output),
    }
    for name, backend in SOFTMAX.items():
        with sdpa_kernel(backend):
            result[name] = forward_and_step(partial(scaled_dot_product_attention, is_causal=True), inputs, grad_output)
    return result


def show(result: dict) -> None:
    ours, cudnn = result["flash-entmax"], result["cuDNN"]
    print(
        f"{result['length']:6d} {result['head_size']:4d} {result['heads']:3d} {result['block_sparsity']:6.3f}"
        + "".join(f" {result[n]['forward_ms']:8.3f} {result[n]['step_ms']:8.3f}" for n in ("flash-entmax", *SOFTMAX))
        + f" {ours['step_ms'] / cudnn['step_ms']:6.2f}   "
        + " ".join(f"{name} {ms:.2f}" for name, ms in result["stages_ms"].items()),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file for the results")
    arguments = parser.parse_args()
    conditions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": "bfloat16",
        "causal": True,
        "batch": 1,
        "alpha": 1.5,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/first_timings.py --output FILE",
    }
    print(conditions)
    start = time.perf_counter()
    inputs = [t.requires_grad_() for t in topic_inputs(1, 8, 1024, 64, 4, dtype=torch.bfloat16, device="cuda")]
    entmax_attention(*inputs, is_causal=True).sum().backward()
    torch.cuda.synchronize()
    conditions["first_forward_and_backward_s"] = time.perf_counter() - start
    print(f"first forward and backward, compilation included: {conditions['first_forward_and_backward_s']:.1f} s")
    print("length size heads sparse  ours fwd     step  FA-2 fwd     step cuDNN fwd    step  ratio   stages (ms)")
    results = []
    for case in CASES:
        for topics in TOPICS:
            results.append(measure(*case, topics))
            show(results[-1])
    with open(arguments.output, "w") as file:
        json.dump({"conditions": conditions, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
