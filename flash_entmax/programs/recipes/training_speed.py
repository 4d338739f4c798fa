"""How many bytes a second does the language model train on at long context, with entmax and with the fastest softmax?

Times whole training steps (forward, backward, optimizer) of the models of the recipe language-model:

- trained with entmax, whose attention is as sparse as training made it;
- the same model untrained, whose entmax attends to every key;
- trained with softmax, by PyTorch's cuDNN and FlashAttention-2 backends.
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
from ..files import write_json
from . import sparsity
from .language_model import RECIPE, next_byte_losses
from .recipe import Run
from .results import conditions
from .runs import new_model, trained_model
from .settings import RecipeSettings

LENGTHS = {"toy": (64, 128), "small": (256, 1024, 2048), "full": (2048, 8192, 32_768)}
TOKENS = {"toy": 256, "small": 2048, "full": 65_536}
REPEATS = {"toy": 2, "small": 4, "full": 8}
SOFTMAX = "softmax, RoPE"


def run(settings: RecipeSettings) -> None:
    console = Console(highlight=False, markup=False)
    models = sparsity.trained(settings)
    entmax, softmax = sparsity.first(models, *sparsity.CAPTURED), sparsity.first(models, SOFTMAX)
    found = {}
    for name, model, context in contestants(entmax, softmax):
        found[name] = {}
        for length in LENGTHS[settings.size]:
            batch = max(1, TOKENS[settings.size] // length)
            data = sparsity.held_out(softmax, batch, length + 1)
            with context():
                seconds = seconds_of_step(model, data, REPEATS[settings.size])
            found[name][str(length)] = data[:, 1:].numel() / seconds
        del model
    path = settings.out / f"training-speed-{settings.size}.json"
    write_json(path, {"conditions": conditions("training-speed", settings), "bytes_per_second": found})
    console.print(table(found))
    console.print(f"{path}", soft_wrap=True)


def contestants(
    entmax: Run, softmax: Run
) -> Iterator[tuple[str, torch.nn.Module, Callable[[], AbstractContextManager]]]:
    """(name, model, context in which its steps run) of the models of two trainings."""
    yield "entmax 1.5, trained", trained_model(RECIPE, entmax), nullcontext
    yield "entmax 1.5, before training", new_model(RECIPE, entmax), nullcontext
    if softmax.device == "cuda":
        for title, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION")):
            context = partial(sdpa_kernel, getattr(SDPBackend, backend))
            yield f"softmax, {title}", trained_model(RECIPE, softmax), context
    else:
        yield "softmax, SDPA", trained_model(RECIPE, softmax), nullcontext


def seconds_of_step(model: torch.nn.Module, data: Tensor, repeats: int) -> float:
    """The median time of whole steps, after two that do not count. A learning rate of 0 keeps the attention sparse."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train()), lr=0.0)
    times = []
    for _ in range(repeats + 2):
        start = perf_counter()
        loss = next_byte_losses(model, data).mean()
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
