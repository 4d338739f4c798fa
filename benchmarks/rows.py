"""Activations and losses compared with their peers: python benchmarks/rows.py, on a GPU or a CPU.

A matrix has rows of 1,024 to 131,072 scores, and 2^26 scores in all (2^20 on a CPU). All run in one process on the
same tensors. "normal" scores are N(0, 1). "peaked" scores are N(0, 3^2), and one of each row is 12 larger, as in many
trained models. Activations also report the worst |sum p - 1|. Losses on a GPU also report the peak memory beyond inputs
and gradients. All times are medians. A GPU is timed twice: in a CUDA graph, without the host, and as called, with it
(both by triton.testing). A CPU is timed over 3 calls.

--passes counts instead how often the solver of a row reads the row, from three starts, in float64 on the CPU.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch

from flash_entmax import __version__, entmax, entmax_loss
from flash_entmax.core.threshold import certified_offset, histogram_offset, newton_step, probability, support_weight
from flash_entmax.testing import DISTRIBUTIONS, score_rows

LENGTHS = 1024, 4096, 16384, 50257, 65536, 131072
REPEATS = 3


def scores(kind: str, rows: int, length: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(rows, length, device=device) * (1 if kind == "normal" else 3)
    if kind == "peaked":
        x[torch.arange(rows), torch.randint(length, (rows,))] += 12
    return x.to(dtype)


def activations(alpha: float, on_cuda: bool) -> dict:
    """{name: function of scores}."""
    ways = {"flash-entmax": lambda x: entmax(x, alpha), "softmax": lambda x: x.softmax(-1)}
    try:
        import entmax as package

        named = {1.5: package.entmax15, 2.0: package.sparsemax}
        ways["entmax 1.3"] = named.get(alpha, lambda x: package.entmax_bisect(x, alpha))
    except ImportError:
        print("the package entmax is not installed")
    if on_cuda:
        try:
            import adasplash

            ways["adasplash 0.2.2"] = lambda x: adasplash.triton_entmax(x, alpha=alpha)
            ways["adasplash 0.2.2, 10 steps"] = lambda x: adasplash.triton_entmax(x, alpha=alpha, n_iter=10)
        except ImportError:
            print("the package adasplash is not installed")
    return ways


def losses(alpha: float) -> dict:
    """{name: function of scores and targets}."""
    ways = {
        "flash-entmax": lambda x, y: entmax_loss(x, y, alpha),
        "cross entropy": torch.nn.functional.cross_entropy,
    }
    try:
        import entmax as package

        named = {1.5: package.entmax15_loss, 2.0: package.sparsemax_loss}
        one = named.get(alpha, lambda x, y: package.entmax_bisect_loss(x, y, alpha))
        ways["entmax 1.3"] = lambda x, y: one(x, y).mean()
    except ImportError:
        pass
    return ways


def median_ms(call, as_called: bool = False) -> float:
    """Milliseconds; on a GPU by a CUDA graph, without the host's time, unless ``as_called`` asks for it."""
    if torch.cuda.is_available():
        from triton.testing import do_bench, do_bench_cudagraph

        if as_called:
            return do_bench(call, warmup=5, rep=20, return_mode="median")
        try:
            return do_bench_cudagraph(call, rep=6, return_mode="median")
        except RuntimeError as error:
            print(f"    no graph, timed as called: {str(error).splitlines()[0]}")
            return median_ms(call, as_called=True)
    call()
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - start))
    return median(times)


def measure_activation(way, x: torch.Tensor) -> dict:
    leaf, grad = x.detach().requires_grad_(), torch.randn_like(x)
    row_sum_error = (way(x).double().sum(-1) - 1).abs().max().item()
    with torch.no_grad():
        forward = median_ms(lambda: way(x))
    result = {"forward_ms": forward, **step_times(lambda: torch.autograd.grad(way(leaf), leaf, grad))}
    return {**result, "row_sum_error": row_sum_error}


def step_times(step) -> dict:
    times = {"step_ms": median_ms(step)}
    if torch.cuda.is_available():
        times["called_ms"] = median_ms(step, as_called=True)
    return times


def measure_loss(way, x: torch.Tensor) -> dict:
    leaf = x.detach().requires_grad_()
    target = torch.randint(x.shape[1], (x.shape[0],), device=x.device)
    result = step_times(lambda: torch.autograd.grad(way(leaf, target), leaf))
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        torch.autograd.grad(way(leaf, target), leaf)
        gradient = x.numel() * x.element_size()
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - allocated - gradient) / 2**20
    return result


@torch.no_grad()
def passes(z: torch.Tensor, offset: torch.Tensor, alpha: float) -> tuple[float, float]:
    """Means over rows until F <= 1 + 1e-6: passes, and how often the row is read if dead segments of 64 are skipped."""
    z = z - z.amax(-1, keepdim=True)
    segments = z.unflatten(-1, (-1, 64)).amax(-1)
    count, read = torch.zeros_like(offset), torch.zeros_like(offset)
    active = torch.ones_like(offset, dtype=torch.bool)
    while active.any():
        count += active
        read += active * (segments + offset.unsqueeze(-1) > 0).double().mean(-1)
        distance = (z + offset.unsqueeze(-1)).clamp_min(0)
        total, weight = probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1)
        active &= (total - 1).abs() > 1e-6
        offset = torch.where(active, newton_step(offset, total, weight, alpha), offset)
    return count.mean().item(), read.mean().item()


def print_passes() -> None:
    print("passes (lengths read), mean of the distributions of flash_entmax.testing, 8 rows each, float64")
    for alpha in (1.5, 2.0):
        for length in (4096, 131_072):
            found = {"offset 1": [], "histogram of 8 bins": [], "maxima of 64": []}
            for name in DISTRIBUTIONS:
                z = score_rows(name, length, 8)
                maximum = z.amax(-1)
                maxima = z.unflatten(-1, (-1, 64)).amax(-1)
                starts = torch.ones_like(maximum), histogram_offset(z, alpha), certified_offset(maxima, maximum, alpha)
                for own, start in zip(found.values(), starts, strict=True):
                    own.append(passes(z, start, alpha))
            means = (
                f"{way} {mean(c for c, _ in own):.1f} ({mean(r for _, r in own):.1f})" for way, own in found.items()
            )
            print(f"alpha {alpha:g}, {length:7} entries: {', '.join(means)}", flush=True)


def attempt(measure, way, x) -> dict:
    try:
        return measure(way, x)
    except Exception as error:  # a peer that cannot run a case is listed with its reason
        return {"cannot": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]}


def shown(result: dict) -> str:
    if "cannot" in result:
        return result["cannot"]
    units = {
        "forward_ms": "forward {:8.3f} ms",
        "step_ms": "step {:8.3f} ms",
        "called_ms": "as called {:8.3f} ms",
        "row_sum_error": "|sum p - 1| {:.1e}",
        "peak_mib": "peak {:8.1f} MiB",
    }
    return "   ".join(units[name].format(value) for name, value in result.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/rows.json"))
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.5])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--kinds", nargs="+", choices=("normal", "peaked"), default=("normal", "peaked"))
    parser.add_argument("--passes", action="store_true", help="count how often a row is read, from three starts")
    options = parser.parse_args()
    if options.passes:
        print_passes()
        return
    on_cuda = torch.cuda.is_available()
    device, dtypes = ("cuda", (torch.bfloat16, torch.float32)) if on_cuda else ("cpu", (torch.float32,))
    numbers = 2**26 if on_cuda else 2**20
    name = torch.cuda.get_device_name() if on_cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, flash-entmax {__version__}, torch {torch.__version__}")
    conditions = {"device": name, "torch": torch.__version__, "flash_entmax": __version__}
    results = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for alpha in options.alphas:
        for dtype in dtypes:
            for kind in options.kinds:
                for length in options.lengths:
                    x = scores(kind, max(1, numbers // length), length, dtype, device)
                    size = f"{x.shape[0]} x {length}, {str(dtype).removeprefix('torch.')}, {kind}, alpha {alpha:g}"
                    for task, ways, measure in (
                        ("activation", activations(alpha, on_cuda), measure_activation),
                        ("loss", losses(alpha), measure_loss),
                    ):
                        print(f"{task}, {size}")
                        for who, way in ways.items():
                            result = attempt(measure, way, x)
                            print(f"    {who:26} {shown(result)}", flush=True)
                            results.append({"task": task, "size": size, "way": who, **result})
                    options.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
