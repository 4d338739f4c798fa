"""Host time of one short call: how long Python and PyTorch take until everything is launched.

At 256 tokens a GPU is done with the kernels sooner than the host with their launches, so this is what a call takes. The
times are medians of single calls by the host's clock. Every BURST calls the GPU catches up.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention

from .measure import Attend
from .settings import ALPHA, OURS, BenchSettings

SHAPE = BATCH, HEADS, LENGTH, HEAD_SIZE = 1, 8, 256, 64
WARMUP, CALLS, BURST = 30, 300, 50
ATTEND: dict[str, Attend] = {
    OURS: partial(entmax_attention, alpha=ALPHA, is_causal=True),
    "sdpa": partial(scaled_dot_product_attention, is_causal=True),
}
Call = Callable[[], tuple[Tensor, ...]]


def why_not(settings: BenchSettings) -> str:
    """Why nothing is measured; empty if something is."""
    return "" if settings.on_cuda else "on a CPU the host computes the attention itself"


def measure(settings: BenchSettings) -> dict[str, dict]:
    """Microseconds of each way to call, or how it failed, for this library and for PyTorch's attention."""
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(SHAPE, device=settings.device, dtype=settings.dtype, requires_grad=True) for _ in range(3)
    )
    grad_output = torch.randn_like(inputs[0])
    return {
        way: {name: measured(prepare, attend, inputs, grad_output) for name, attend in ATTEND.items()}
        for way, prepare in WAYS.items()
    }


def measured(prepare, attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> dict:
    try:
        return {"microseconds": microseconds(prepare(attend, inputs, grad_output))}
    except Exception as error:  # the other ways are still measured
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def microseconds(call: Call) -> float:
    for _ in range(WARMUP):
        call()
    seconds = []
    for number in range(CALLS):
        if number % BURST == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
        started = perf_counter()
        call()
        seconds.append(perf_counter() - started)
    return 1e6 * median(seconds)


# Ways to call. Each prepares a call that returns the output or the gradients.


def forward(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> Call:
    def call():
        with torch.no_grad():
            return (attend(*inputs),)

    return call


def step(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> Call:
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad_output)


def step_in_one_thread(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> Call:
    def call():
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(attend(*inputs), inputs, grad_output)

    return call


def compiled_step(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> Call:
    torch.compiler.reset()
    return step(torch.compile(attend), inputs, grad_output)


def compiled_step_with_less_overhead(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> Call:
    torch.compiler.reset()
    compiled = step(torch.compile(attend, mode="reduce-overhead"), inputs, grad_output)

    def call():
        torch.compiler.cudagraph_mark_step_begin()
        return compiled()

    return call


def graphed_step(attend: Attend, inputs: tuple[Tensor, ...], grad_output: Tensor) -> Call:
    samples = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    return step(torch.cuda.make_graphed_callables(lambda *tensors: attend(*tensors), samples), inputs, grad_output)


WAYS = {
    "forward without gradients": forward,
    "step": step,
    "step, autograd in the calling thread": step_in_one_thread,
    "step, torch.compile": compiled_step,
    'step, torch.compile with mode="reduce-overhead"': compiled_step_with_less_overhead,
    "step, CUDA graphs by make_graphed_callables": graphed_step,
}
