"""One training of one arm, and what is measured of it."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flash_entmax.adapt import alpha_schedule, distillation_loss, softmax_teacher
from flash_entmax.integrations.transformers import set_alpha

from ...demo.train import pace, precision
from ..training import Show
from .models import take_entmax, with_adapters
from .settings import SOFTMAX, AdaptSize

LAST = 4  # the time of a step is the median of the last 1/LAST of the steps, where alpha is at rest
NOTED = 10  # how often the loss of the training is noted


@dataclass(frozen=True)
class AdaptRun:
    """One training. ``alpha`` is where it ends; 1 is softmax, all along."""

    alpha: float
    rate: float
    seed: int
    steps: int

    @property
    def arm(self) -> str:
        return arm_of(self.alpha)

    @property
    def key(self) -> str:
        return f"{self.arm} | {self.rate:g} | seed {self.seed} | {self.steps} steps"


def arm_of(alpha: float) -> str:
    return "softmax" if alpha == SOFTMAX else f"entmax {alpha:g}"


def train(
    base: nn.Module, run: AdaptRun, size: AdaptSize, batch_of: Callable[[int], Tensor], device: str, show: Show
) -> tuple[nn.Module, dict]:
    """(adapted copy of the base in evaluation mode, {"step_ms", "seconds", "training_losses"}).

    AdamW without weight decay, a short warm-up, a cosine, gradients clipped to 1; on CUDA in bfloat16 autocast.
    Softmax has no teacher: it is the training that entmax is compared with.
    """
    torch.manual_seed(run.seed)
    model, schedule, teacher = copy.deepcopy(base).to(device), None, None
    if run.alpha != SOFTMAX:
        schedule = alpha_schedule(run.steps, hold=size.hold, ramp=size.ramp, end=run.alpha, device=device)
        take_entmax(model, schedule.alpha)
    adapted = model
    if size.rank:
        model = with_adapters(model, size.rank)
    if schedule is not None and size.distillation:
        teacher = softmax_teacher(model, attention=base.config._attn_implementation)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    losses, seconds = [], []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * pace((step + 1) / run.steps)
        batch = batch_of(step)
        start = time.perf_counter()
        optimizer.zero_grad()
        losses.append(add_gradients(model, batch, size, teacher))
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if schedule is not None and not schedule.is_at_rest:
            schedule.step()
            if schedule.is_at_rest:
                set_alpha(adapted, run.alpha)  # at rest it is a number: the kernels may need no powers
        if batch.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        show(step + 1, run.steps)
    if size.rank:
        model = model.merge_and_unload()
    if schedule is not None:
        take_entmax(model, run.alpha)
    last = seconds[-max(1, run.steps // LAST) :]
    numbers = {"step_ms": 1000 * median(last), "seconds": sum(seconds), "training_losses": losses_noted(losses)}
    return model.eval(), numbers


def add_gradients(
    model: nn.Module, batch: Tensor, size: AdaptSize, teacher: Callable[[Tensor], Tensor] | None
) -> float:
    """Add the gradients of the mean loss of the batch, some rows after others. Returns that loss on the text."""
    total = 0.0
    for ids in batch.split(size.rows):
        share = len(ids) / len(batch)
        with precision(batch.device):
            theirs = None if teacher is None else teacher(ids)
            logits = model(ids, use_cache=False).logits
        loss = on_text = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        if theirs is not None:
            loss = (1 - size.distillation) * on_text + size.distillation * distillation_loss(logits, theirs)
        (share * loss).backward()
        total += share * on_text.item()
    return total


def losses_noted(losses: list[float]) -> dict[str, float]:
    """{last step: mean loss since the one before}, at NOTED steps at most."""
    width = -(-len(losses) // NOTED)
    parts = [losses[first : first + width] for first in range(0, len(losses), width)]
    return {str(min(len(losses), width * (number + 1))): sum(part) / len(part) for number, part in enumerate(parts)}
