"""A pretrained softmax model taken to entmax: what a training loop of your own needs for it.

::

    from flash_entmax import adapt
    from flash_entmax.integrations.transformers import register, set_alpha

    register()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="entmax").train()
    schedule = adapt.alpha_schedule(steps=400, ramp=0.4, end=1.2)
    set_alpha(model, schedule.alpha)
    for ids in batches:  # (batch, length) int64
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not schedule.is_at_rest:
            schedule.step()
            if schedule.is_at_rest:
                set_alpha(model, 1.2)  # a number, for which the kernels need no powers
    print(adapt.evaluate(model, held_out))
    model.save_pretrained(folder)

``flash-entmax recipe adapt`` is such a loop, beside the same training with softmax.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from . import inspection
from .anneal import AlphaAnnealing
from .core.checks import is_number, said, typed

ENTMAX = "entmax", "entmax15", "sparsemax"  # as an attn_implementation
ROWS = 1024  # tokens whose losses are computed at a time


def alpha_schedule(
    steps: int,
    *,
    hold: float = 0.0,
    ramp: float = 0.4,
    start: float = 1.01,
    end: float = 1.5,
    device: torch.device | str | None = None,
) -> AlphaAnnealing:
    """Alpha over a training of ``steps`` steps: held at ``start``, then ramped, then at rest at ``end``.

    The ramp is geometric in 1 / (alpha - 1), the distance in score at which keys are cut off.

    Args:
        steps: of the whole training, at least 1.
        hold, ramp: shares of the steps, 0 or more, together at most 1. The rest of the steps is at ``end``.
        start, end: in [1.01, 2].
        device: of the tensor ``alpha``, which must be that of the model.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    for name, share in (("hold", hold), ("ramp", ramp)):
        if not is_number(share):
            raise TypeError(f"{name} must be a share of the steps, a number from 0 to 1, got {share!r}")
    if not (hold >= 0 and ramp >= 0 and hold + ramp <= 1):
        raise ValueError(f"hold and ramp must be shares of the steps, together at most 1, got {hold} and {ramp}")
    moving, held = max(1, round(ramp * steps)), round(hold * steps)
    return AlphaAnnealing(moving, start, end, "geometric", device, min(held, max(0, steps - moving)))


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How far the predictions are from the teacher's: KL(teacher || model), the mean over all tokens, in nats.

    Args:
        logits, teacher_logits: (..., vocabulary), in any floating-point dtype. The loss is float32, or float64 if the
            logits are. The teacher's logits get no gradient. A token with the teacher's logit -inf counts for nothing.

    Raises:
        TypeError: one of them is no floating-point tensor.
        ValueError: their shapes differ.
    """
    for name, tensor in (("logits", logits), ("teacher_logits", teacher_logits)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {said(tensor)}")
    if logits.shape != teacher_logits.shape or logits.dim() < 2:
        raise ValueError(
            "logits and teacher_logits must have one shape (..., vocabulary), "
            f"got {tuple(logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ours, theirs = (
        tensor.to(dtype).flatten(0, -2).log_softmax(-1) for tensor in (logits, teacher_logits.detach().to(dtype))
    )
    terms = kl_div(ours, theirs, log_target=True, reduction="none")
    return terms.masked_fill(theirs == -torch.inf, 0.0).sum() / max(1, len(terms))


def softmax_teacher(model: nn.Module, attention: str = "sdpa") -> Callable[[Tensor], Tensor]:
    """What the model predicts with softmax and its present weights: a function from ids to logits, without gradient.

    Later training does not change it. It is a frozen copy of the model. A model with adapters of PEFT is its own
    teacher, because its weights stay: the function turns the adapters off, runs softmax, and takes both back.

    Args:
        model: a causal language model of Transformers, or one of PEFT around it. It may run entmax already.
        attention: the teacher's ``attn_implementation``, such as "sdpa" or "eager".

    Raises:
        TypeError: the model has no ``set_attn_implementation``.
        ValueError: ``attention`` is entmax.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"softmax_teacher takes a model of Transformers, got {said(model)}")
    if attention in ENTMAX:
        raise ValueError(f"attention must be one of softmax, such as 'sdpa' or 'eager', got {attention!r}")
    if hasattr(model, "peft_config"):
        return _own_teacher(model, attention)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.set_attn_implementation(attention)

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return frozen(ids, use_cache=False).logits

    return logits


def _own_teacher(model: nn.Module, attention: str) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        ours = attention_by_part(model.config)
        model.set_attn_implementation(attention)
        try:
            with model.disable_adapter(), in_evaluation(model):
                return model(ids, use_cache=False).logits
        finally:
            model.set_attn_implementation(ours)

    return logits


def attention_by_part(config: Any) -> str | dict[str, str]:
    """What ``set_attn_implementation`` takes to give the model, and parts with configs of their own, what they have."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    named = {name: part._attn_implementation for name, part in parts.items() if hasattr(part, "_attn_implementation")}
    return {"": config._attn_implementation, **named} if named else config._attn_implementation


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; then each of its modules in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class LayerEvaluation:
    """One layer's entmax attention on the windows of :func:`evaluate`: means over windows and heads.

    Attributes:
        name: of the module that attends.
        keys_per_query: mean support size.
        tile_density: the share of the visible tiles of queries and keys that hold a positive probability.
        key_density: of the keys that a tile of queries sees, the share to which one of its queries attends.
    """

    name: str
    keys_per_query: float
    tile_density: float
    key_density: float


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: the mean loss in nats per token, and the layers in the order in which they ran.

    Layers with softmax are not among them.
    """

    loss: float
    layers: tuple[LayerEvaluation, ...]

    @property
    def keys_per_query(self) -> float:
        """Mean over the layers; NaN without any. So are ``tile_density`` and ``key_density``."""
        return self._mean("keys_per_query")

    @property
    def tile_density(self) -> float:
        return self._mean("tile_density")

    @property
    def key_density(self) -> float:
        return self._mean("key_density")

    def _mean(self, quantity: str) -> float:
        return fmean(getattr(layer, quantity) for layer in self.layers) if self.layers else float("nan")


@torch.no_grad()
def evaluate(model: nn.Module, windows: Iterable[Tensor]) -> Evaluation:
    """The loss of a causal language model on held-out text, and how sparse its entmax attention is there.

    The model runs in evaluation mode, under the autocast of the caller, and is left in the mode that it was in.

    Args:
        model: ``model(ids)`` gives logits (batch, length, vocabulary), or has them as its attribute ``logits``.
        windows: tensors (batch, length) int64 of ids, on the model's device. The loss is that of every token but the
            first of each window.

    Raises:
        TypeError: the model is no module, a window is no int64 tensor, or all of them are one.
        ValueError: no windows, or one that is not (batch, length) with at least two tokens.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {typed(model)}")
    if isinstance(windows, Tensor) or not isinstance(windows, Iterable):
        got = f"a tensor {tuple(windows.shape)}" if isinstance(windows, Tensor) else typed(windows)
        raise TypeError(f"windows must be a list of tensors (batch, length), got {got}")
    total, count, layers = 0.0, 0, []
    with in_evaluation(model):
        for ids in windows:
            check_window(ids)
            with inspection.record(model, keep_inputs=False) as calls:
                output = model(ids)
            logits = output if isinstance(output, Tensor) else output.logits
            total += sum(_losses(logits, ids))
            count += ids[:, 1:].numel()
            layers.append([_figures(call) for call in calls])
            names = [[layer for layer, _ in each] for each in (layers[0], layers[-1])]
            if names[0] != names[1]:
                raise ValueError(f"every window must be attended to by the same layers, got {names[0]} and {names[1]}")
    if not count:
        raise ValueError("evaluate needs at least one window, got none")
    by_layer = zip(*layers, strict=True)
    means = [(same[0][0], *map(fmean, zip(*(figures for _, figures in same), strict=True))) for same in by_layer]
    return Evaluation(total / count, tuple(LayerEvaluation(*mean) for mean in means))


def check_window(ids: object) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"a window must be an int64 tensor of ids, got {said(ids)}")
    if ids.dim() != 2 or ids.shape[1] < 2 or not ids.shape[0]:
        raise ValueError(f"a window must be (batch, length) with at least 2 tokens, got {tuple(ids.shape)}")


def _losses(logits: Tensor, ids: Tensor) -> Iterable[float]:
    """The sum of the losses of some tokens after others: logits in float32 take more memory than the model."""
    rows = logits[:, :-1].flatten(0, 1).split(ROWS), ids[:, 1:].flatten().split(ROWS)
    for part, target in zip(*rows, strict=True):
        yield cross_entropy(part.float(), target, reduction="sum").item()


def _figures(call: inspection.RecordedCall) -> tuple[str, tuple[float, float, float]]:
    keys, dead, density = call.keys_per_query, call.block_sparsity, call.key_density
    return call.name, (keys.mean().item(), 1 - dead.mean().item(), density.mean().item())
