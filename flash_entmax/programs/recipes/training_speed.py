"""How many bytes a second does the language model train on at long context, with entmax and with the fastest softmax?

Whole training steps (forward, backward, optimizer) of the models of the recipe language-model, whose attention is as
sparse as training made it; the same before any training, where entmax attends to every key; and softmax attention by
PyTorch's cuDNN and FlashAttention-2 backends.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..demo.train import parameter_groups
from . import Options, language_model, sparsity
from .results import conditions, save
from .runs import Run

LENGTHS = {"toy": (64, 128), "small": (256, 1024, 2048), "full": (2048, 8192, 32_768)}
TOKENS = {"toy": 256, "small": 2048, "full": 65_536}
REPEATS = {"toy": 2, "small": 4, "full": 8}
ENTMAX, SOFTMAX = "entmax 1.5, RoPE", "softmax, RoPE"


def run(options: Options) -> None:
    console = Console(highlight=False)
    found = {}
    for name, model, context in contestants(options):
        found[name] = {}
        for length in LENGTHS[options.size]:
            each = first(options, SOFTMAX)
            batch = max(1, TOKENS[options.size] // length)
            data = sparsity.held_out(each, batch, length + 1)
            with context():
                seconds = seconds_of_step(model, data, REPEATS[options.size])
            found[name][str(length)] = data[:, 1:].numel() / seconds
        del model
    path = options.out / f"training-speed-{options.size}.json"
    save(path, {"conditions": conditions("training-speed", options), "bytes_per_second": found})
    console.print(table(found))
    console.print(f"{path}", soft_wrap=True)


def first(options: Options, arm: str) -> Run:
    return next(each for each in sparsity.trained(options) if each.arm == arm)


def contestants(options: Options) -> Iterator[tuple[str, torch.nn.Module, Callable[[], AbstractContextManager]]]:
    entmax, softmax = first(options, ENTMAX), first(options, SOFTMAX)
    yield "entmax 1.5, trained", sparsity.model_of(entmax), nullcontext
    yield "entmax 1.5, before training", entmax.model(), nullcontext
    if options.device == "cuda":
        for title, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION")):
            context = partial(sdpa_kernel, getattr(SDPBackend, backend))
            yield f"softmax, {title}", sparsity.model_of(softmax), context
    else:
        yield "softmax, SDPA", sparsity.model_of(softmax), nullcontext


def seconds_of_step(model: torch.nn.Module, data: Tensor, repeats: int) -> float:
    """Median of whole steps after two others; the learning rate is 0, so that the attention stays as it is."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train()), lr=0.0)
    times = []
    for _ in range(repeats + 2):
        start = perf_counter()
        loss = language_model.next_byte_losses(model, data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if data.is_cuda:
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return median(times[2:])


def table(found: dict[str, dict[str, float]]) -> Table:
    result = Table(title="training, bytes per second, by length", title_justify="left")
    result.add_column("attention")
    for length in next(iter(found.values())):
        result.add_column(f"{int(length):,}", justify="right")
    for name, by_length in found.items():
        result.add_row(name, *(f"{speed:,.0f}" for speed in by_length.values()))
    return result
