"""Time and memory of one call: medians, peak allocation, our kernels one by one, the rate of a matrix product.

On CUDA triton.testing.do_bench takes the times, by CUDA events around each call, with the L2 cache cleared first. A
call slower than SLOW_MS is timed SLOW_REPEATS times instead, since the cache hardly matters to it. Short steps may wait
for the host to launch them. Up to GRAPH_LONGEST tokens a step is therefore also timed as a CUDA graph, which needs no
host. On a CPU one series of steps gives both times: the forward pass is timed within each step, so that other work on
the cores slows both alike.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from .settings import BenchSettings

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WARMUP_MS = 20
LEAST_REPEATS = 5
SLOW_MS = 150.0
SLOW_REPEATS = 3
PROFILED_STEPS = 5
GRAPH_LONGEST = 16384
GRAPH_REPLAYS = 30
MIB = 2**20


def timing_method(settings: BenchSettings) -> str:
    if settings.on_cuda:
        return (
            f"median of triton.testing.do_bench (warmup {WARMUP_MS} ms, repeats for {settings.grid.repeat_ms:g} ms and "
            f"at least {LEAST_REPEATS} times, L2 cleared before each); of {SLOW_REPEATS} calls where one takes over "
            f"{SLOW_MS:g} ms"
        )
    return f"median of the steps of {settings.grid.repeat_ms:g} ms, at least one, the forward pass timed in each"


def step(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """One training step of the attention alone: the output, and the gradients of query, key and value."""
    output = attend(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad_output)


def forward_and_step(
    attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor, settings: BenchSettings
) -> dict[str, float]:
    """Milliseconds of the forward pass in training, of the whole step, and of the step as a CUDA graph."""
    if not settings.on_cuda:
        return forward_and_step_on_cpu(attend, inputs, grad_output, settings)
    whole = partial(step, attend, inputs, grad_output)
    times = {"forward_ms": median_ms(partial(attend, *inputs), settings), "step_ms": median_ms(whole, settings)}
    if inputs[0].shape[2] <= GRAPH_LONGEST:
        with suppress(RuntimeError):  # not every competitor can be recorded
            times["graph_ms"] = graph_ms(whole)
    return times


def forward_and_step_on_cpu(
    attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor, settings: BenchSettings
) -> dict[str, float]:
    step(attend, inputs, grad_output)
    samples = []
    ends = perf_counter() + settings.grid.repeat_ms / 1e3
    while not samples or perf_counter() < ends:
        started = perf_counter()
        output = attend(*inputs)
        attended = perf_counter()
        torch.autograd.grad(output, inputs, grad_output)
        samples.append((attended - started, perf_counter() - started))
    forward, whole = (1e3 * median(seconds) for seconds in zip(*samples, strict=True))
    return {"forward_ms": forward, "step_ms": whole}


def graph_ms(call: Callable[[], object]) -> float:
    """Median of replays of a CUDA graph of the call, recorded after warm-up calls on the recording stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return median([event_ms(graph.replay) for _ in range(GRAPH_REPLAYS)])


def median_ms(call: Callable[[], object], settings: BenchSettings) -> float:
    return median_ms_on_cuda(call, settings) if settings.on_cuda else median_ms_on_cpu(call, settings)


def median_ms_on_cuda(call: Callable[[], object], settings: BenchSettings) -> float:
    from triton.testing import do_bench

    call()
    once = event_ms(call)
    if once > SLOW_MS:
        return median([once, *(event_ms(call) for _ in range(SLOW_REPEATS - 1))])
    repeat = max(settings.grid.repeat_ms, LEAST_REPEATS * once)
    return float(do_bench(call, warmup=WARMUP_MS, rep=repeat, return_mode="median"))


def event_ms(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def median_ms_on_cpu(call: Callable[[], object], settings: BenchSettings) -> float:
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=settings.grid.repeat_ms / 1e3).median


def peak_memory_mib(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> float:
    """MiB that one step on CUDA allocates at its peak, without its inputs, output and gradients."""
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step(attend, inputs, grad_output)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - allocated
    return (peak - sum(tensor.numel() * tensor.element_size() for tensor in results)) / MIB


def stages_ms(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> dict[str, float]:
    """Milliseconds per step: {our kernel: time}, and "other" for everything else that ran on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            step(attend, inputs, grad_output)
        torch.cuda.synchronize()
    stages = {}
    for event in profile.key_averages():
        if event.self_device_time_total > 0:
            is_ours = event.key.endswith("_kernel")
            stage = event.key.removesuffix("_kernel") if is_ours else "other"
            stages[stage] = stages.get(stage, 0.0) + event.self_device_time_total / 1e3 / PROFILED_STEPS
    return stages


def matrix_rate(settings: BenchSettings) -> float:
    """Flop per second of a square matrix product of random numbers, in the dtype of the run."""
    size = settings.grid.matrix_size
    left, right = (torch.randn(size, size, device=settings.device).to(settings.dtype) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: left @ right, settings) / 1e3)
