"""One training loop for all recipes. It goes on where it was interrupted, from files in the safetensors format."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..demo.train import pace, parameter_groups
from .recipe import ADAMW, AdamW, Batch

SAVE_EVERY = 30.0  # seconds
# The first seeds of validation, of scores of checkpoints, and of tests. Those of training are smaller. A CPU's
# generator takes 32 bits.
VALIDATION_SEED, SCORE_SEED, TEST_SEED = 2**30, 3 * 2**29, 2**31
Show = Callable[[int, int], None]  # (steps done, all steps)
Loss = Callable[..., Tensor]


def fit(
    model: nn.Module,
    batch_of: Callable[[int], Batch],
    loss: Loss,
    steps: int,
    learning_rate: float,
    path: Path,
    show: Show,
    adamw: AdamW = ADAMW,
    *,
    start: Path | None = None,
    branch: tuple[int, Path] | None = None,
) -> None:
    """Train on ``loss(model, *batch)`` to the last step, and write the model to ``path``.

    ``start`` is a file from which the training goes on. After the step of ``branch``, its file gets the model and the
    optimizer's state.

    AdamW, a short warm-up, a cosine, gradients clipped to 1. ``show`` is called after each step. The state of the
    training stands in a file beside ``path`` until it is done. An interrupted training goes on from there with the same
    result, if ``batch_of(step)`` depends on the step alone.
    """
    rate = torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, adamw.weight_decay),
        lr=rate,
        betas=adamw.betas,
        fused=True,
        capturable=rate.is_cuda,
    )
    give_state(optimizer)
    unfinished = path.with_suffix(".unfinished.safetensors")
    advance = Graphed(model, loss, optimizer) if rate.is_cuda else Eager(model, loss, optimizer)
    begin = 0 if start is None else restore(start, model, optimizer, is_whole=False)
    with suppress(FileNotFoundError, SafetensorError):  # none, or a broken one: begin anew
        begin = restore(unfinished, model, optimizer)
    saved = time.perf_counter()
    for step in range(begin, steps):
        rate.fill_(learning_rate * pace((step + 1) / steps, adamw.warm_up))
        advance(batch_of(step))
        if branch is not None and step + 1 == branch[0]:
            save(branch[1], model, optimizer, step + 1)
        show(step + 1, steps)
        if time.perf_counter() - saved > SAVE_EVERY:
            save(unfinished, model, optimizer, step + 1)
            saved = time.perf_counter()
    save(path, model)
    with suppress(FileNotFoundError):
        unfinished.unlink()


def give_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the optimizer's moments, which a graph needs. They are 0, and the weights stay as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()


class Eager:
    """A training step, operation by operation."""

    def __init__(self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def __call__(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model, *batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


class Graphed(Eager):
    """A training step as one CUDA graph for each shape of the batch. Without it a small model waits for the host.

    Only one graph runs at a time, and none reads what another left. So all share one pool of memory.
    """

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, tuple[Batch, torch.cuda.CUDAGraph]] = {}

    def __call__(self, batch: Batch) -> None:
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(batch)
        inputs, graph = self.graphs[shapes]
        for own, given in zip(inputs, batch, strict=True):
            own.copy_(given)
        graph.replay()

    def capture(self, batch: Batch) -> tuple[Batch, torch.cuda.CUDAGraph]:
        """Capture a step, after two passes that do what a capture must not, such as compiling kernels."""
        inputs = tuple(tensor.clone() for tensor in batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.loss(self.model, *inputs).backward()
                self.optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            super().__call__(inputs)
        return inputs, graph


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, step: int = 0, **notes: str
) -> None:
    """Write a second file and rename it, so that an interruption leaves the old file or the new one.

    The step and the ``notes`` become the file's metadata.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": tensor for key, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"step": str(step), **notes})
    part.replace(path)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, is_whole: bool = True) -> int:
    """Load what `save` wrote, and return the number of steps that were done.

    If ``is_whole`` is False, the file may lack parameters: these, and their optimizer's state, stay as they are.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        step = int(file.metadata()["step"])
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    unknown = model.load_state_dict(weights, strict=is_whole).unexpected_keys
    if unknown:
        raise ValueError(f"{path} has weights that the model does not have: {', '.join(unknown)}")
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, state in optimizer.state[parameter].items():
                if is_whole or name in weights:
                    state.copy_(tensors[f"optimizer.{name}.{key}"])
    return step


def mean_over(parts: Iterable, numbers_of: Callable[..., Tensor]) -> float:
    """The mean of all numbers in ``numbers_of(part)``; infinite if one of them is not finite."""
    with torch.no_grad():
        values = torch.cat([numbers_of(part).flatten().double().cpu() for part in parts])
    return values.mean().item() if values.isfinite().all() else math.inf
