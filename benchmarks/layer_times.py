"""A layer's attention beside cuDNN, on captured inputs: how dense it is, and how long steps and forward passes take.

On a CPU, PyTorch's own softmax attention stands in for cuDNN, so that the programs that use this can be tried there.
"""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import mean, median

import derivatives
import keys
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_entmax import entmax_attention
from flash_entmax.inspection import RecordedCall
from flash_entmax.programs.benchmarks.cases import BenchCase
from flash_entmax.programs.benchmarks.competitors import prepare_softmax

KINDS = "graph", "called", "forward", "forward_called"


def cudnn(on_cuda: bool):
    """The context in which scaled_dot_product_attention is cuDNN's."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_cuda else nullcontext()


def milliseconds(function: Callable[[], object], repeats: int, on_cuda: bool) -> float:
    """The median time of a call, by CUDA events; on a CPU by the clock."""
    if on_cuda:
        return derivatives.milliseconds(function, repeats)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def densities(call: RecordedCall) -> dict:
    """Means over the heads, and the shares of tiles and keys by head."""
    if call.size.is_cuda and (call.impl != "triton" or call.dtype != torch.bfloat16):
        raise ValueError(f"bfloat16 by Triton was to be measured, got {call}")
    tile_density, key_density = 1 - call.block_sparsity, call.key_density
    return {
        "tile": list(call.support.tile_shape),
        "impl": call.impl,
        "dtype": str(call.dtype),
        "tile_density": tile_density.mean().item(),
        "key_density": key_density.mean().item(),
        "keys_per_query": call.keys_per_query.mean().item(),
        "keys_per_tile": call.support.keys.double().mean().item(),
        "tile_density_by_head": tile_density.tolist(),
        "key_density_by_head": key_density.tolist(),
    }


def timed(inputs: tuple[Tensor, Tensor, Tensor], alpha: float, repeats: int) -> dict:
    """{"ours": ms by KINDS, "cudnn": the same, "ratio": ours over cuDNN's}; inputs are (batch, heads, length, dim).

    On a GPU, "kernels" has the milliseconds of each of our kernels in a step. A "note" says whether keys and values of
    grouped heads had to be repeated for cuDNN.
    """
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    grad, on_cuda = torch.randn_like(query), query.is_cuda
    case = BenchCase(query.shape[2], query.shape[3], query.shape[1], key.shape[1])
    softmax = prepare_softmax(case, (query, key, value), "CUDNN_ATTENTION" if on_cuda else None)

    def ours() -> Tensor:
        return entmax_attention(query, key, value, alpha=alpha, is_causal=True)

    def peer() -> Tensor:
        return softmax.attend(query, key, value)

    def both(function: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds as a CUDA graph, and as called."""
        replay = keys.graphed(function) if on_cuda else function
        return milliseconds(replay, repeats, on_cuda), milliseconds(function, repeats, on_cuda)

    found = {}
    for name, attend, context in (("ours", ours, nullcontext), ("cudnn", peer, softmax.context)):

        def step(attend=attend) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(), (query, key, value), grad)

        with context():
            times = both(step)
            with torch.no_grad():
                times += both(attend)
        found[name] = dict(zip(KINDS, times, strict=True))
        if on_cuda and name == "ours":
            found["kernels"] = keys.kernels(step)
        gc.collect()
    ratio = {kind: found["ours"][kind] / found["cudnn"][kind] for kind in KINDS}
    return found | {"ratio": ratio} | ({"note": softmax.note} if softmax.note else {})


def line(number: int, row: dict) -> str:
    words = {"graph": "graph", "called": "called", "forward": "fwd", "forward_called": "fwd-called"}
    ours, theirs, ratio = row["ours"], row["cudnn"], row["ratio"]
    times = (f"{word} {ours[kind]:.3f}/{theirs[kind]:.3f}={ratio[kind]:.3f}" for kind, word in words.items())
    return f"layer {number} {' '.join(times)}"


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Of each kind: the mean and the worst quotient of the layers, and the quotient of the sums of their times."""
    found = {}
    for kind in KINDS if rows else ():
        ratios = [row["ratio"][kind] for row in rows]
        sums = [sum(row[name][kind] for row in rows) for name in ("ours", "cudnn")]
        found[kind] = {"mean": mean(ratios), "worst": max(ratios), "of_sums": sums[0] / sums[1]}
    return found
