"""Setting alpha of a whole Transformers model: as numbers in its config, or as a weight."""

import warnings

import torch
from torch import Tensor, nn

from ...core.alphas import check_alpha_range
from ...core.call import ALPHAS
from ...core.checks import said
from .alpha import AlphaWeight, check_number, hold_alpha
from .config import HELD_BY, declare, implementation_of


def set_alpha(
    model: nn.Module, alpha: float | Tensor | dict[int, float], alpha_range: tuple[float, float] | None = None
) -> None:
    """Set the alpha of all layers of a model that runs ``attn_implementation="entmax"``.

    It is saved with the model. A plain ``from_pretrained(folder)`` after ``register()`` loads it.

    Args:
        model: one of Transformers, or a wrapper around one.
        alpha: a number, 1 or from 1.0001 to 2; or a dict of such numbers by the ``layer_idx`` of each layer; or a
            tensor of values in [1.01, 2], shaped (), (1,) or (heads,), on the model's device, which all layers share.
            A tensor becomes the weight ``entmax_alpha.value`` of the base model. A ``Parameter`` is learned; a scalar
            one gets the shape (1,), which FSDP needs. Any other tensor may be changed in place at any time, and nothing
            is compiled again; where it is out of [1.01, 2], calls refuse it.
        alpha_range: of a ``Parameter``, which an optimizer may move anywhere: (lowest, highest) within [1.01, 2], to
            which calls clamp it, with gradient 0 outside. None is the whole of [1.01, 2]. It is saved with the model.

    Models that were built from one config object share its numbers.

    Raises:
        TypeError, ValueError: no layer of the model runs entmax, or alpha is none of the above; nothing is changed.
    """
    assign_alpha(model, alpha, "set_alpha", alpha_range)


def assign_alpha(
    model: nn.Module, alpha: float | Tensor | dict[int, float], by: str, alpha_range: tuple[float, float] | None = None
) -> None:
    """As `set_alpha`. Messages name `by`, which the user called: set_alpha or AnnealAlpha."""
    if alpha_range is not None:
        _check_range(alpha, alpha_range)
    layers, root, owner = _check_model(model, by)
    _check_holder(model, root, owner, alpha, by)
    if isinstance(alpha, Tensor):
        check_tensor(alpha, layers, owner)
    elif isinstance(alpha, dict):
        _check_layers(alpha, layers)
    else:
        check_number("alpha", alpha)
    _remove_alpha(root)
    if isinstance(alpha, dict):
        declared = {str(index): float(number) for index, number in alpha.items()}
    elif not isinstance(alpha, Tensor):
        declared = float(alpha)
    else:
        if isinstance(alpha, nn.Parameter) and alpha.dim() == 0:
            alpha.data = alpha.data.reshape(1)
        hold_alpha(owner, alpha)
        name = type(owner).__name__.removeprefix("FSDP")
        numbers = torch.full(alpha.shape, torch.nan) if alpha.is_meta else alpha.detach()
        declared = {HELD_BY: name, "learned": isinstance(alpha, nn.Parameter), "initial": numbers.tolist()}
        if isinstance(alpha, nn.Parameter):
            declared["range"] = list(map(float, alpha_range or ALPHAS))
    for config in {id(part.config): part.config for part in (*layers, owner)}.values():
        config.entmax_alpha = declared
    declare(root.config)


def root_in(model: nn.Module) -> nn.Module | None:
    """The outermost model of Transformers in this one."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _owner_in(model: nn.Module) -> nn.Module | None:
    """The module that holds alpha: the base model, whose weights models with other heads load as well.

    The whole model, if it has layers outside of its base model.
    """
    root = root_in(model)
    if root is None:
        return None
    base = root.base_model
    inside = set(base.modules())
    outside = [m for m in root.modules() if m not in inside and hasattr(m, "layer_idx") and hasattr(m, "config")]
    return root if outside else base


def _remove_alpha(root: nn.Module) -> None:
    for module in list(root.modules()):
        vars(module).pop("entmax_owner", None)
        if isinstance(getattr(module, "entmax_alpha", None), AlphaWeight):
            del module.entmax_alpha


def held_tensor(model: nn.Module) -> Tensor | None:
    """The tensor that is alpha of this model; if an adapter is active that has one, its own."""
    owner = _owner_in(model)
    held = getattr(owner, "entmax_alpha", None)
    return None if held is None else held.value


def belongs_to_adapter(model: nn.Module) -> bool:
    """Whether an adapter has wrapped the `AlphaWeight` of this model."""
    return not isinstance(getattr(_owner_in(model), "entmax_alpha", None), (AlphaWeight, type(None)))


# Checks


def check_tensor(alpha: Tensor, layers: list[nn.Module], owner: nn.Module) -> None:
    heads = {count for layer in layers if isinstance(count := getattr(layer.config, "num_attention_heads", None), int)}
    shapes = [(), (1,), *((count,) for count in heads if len(heads) == 1)]
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must be a floating-point tensor, got {alpha.dtype}")
    if (alpha.dim() > 1) if not heads else (tuple(alpha.shape) not in shapes):
        raise ValueError(f"alpha must have a shape of {', '.join(map(str, shapes))} (heads), got {tuple(alpha.shape)}")
    device = next((weight.device for weight in owner.parameters()), alpha.device)
    if alpha.device != device:
        raise ValueError(f"alpha must be on the device of the model, {device}, got {alpha.device}")
    if alpha.is_meta:
        return
    numbers, (lowest, highest) = alpha.detach(), ALPHAS
    ends = numbers.new_tensor([lowest, highest])  # in alpha's dtype, whose 1.01 may be less than that of float64
    if not ((numbers >= ends[0]) & (numbers <= ends[1])).all():
        raise ValueError(f"a tensor alpha must be in [{lowest:g}, {highest:g}], got {numbers.tolist()}")


def _check_range(alpha: object, alpha_range: object) -> None:
    if not isinstance(alpha, nn.Parameter):
        raise ValueError(f"alpha_range is for a Parameter, which is learned, got alpha {said(alpha)}")
    check_alpha_range(alpha_range)
    lowest, highest = ALPHAS
    if not lowest <= alpha_range[0] <= alpha_range[1] <= highest:
        raise ValueError(f"alpha_range must be within [{lowest:g}, {highest:g}], got {tuple(alpha_range)}")
    if alpha.is_meta or not alpha.is_floating_point():
        return
    ends = alpha.detach().new_tensor(alpha_range)
    if not ((alpha >= ends[0]) & (alpha <= ends[1])).all():
        raise ValueError(f"alpha must start within alpha_range, {tuple(alpha_range)}, got {alpha.tolist()}")


def _check_layers(alpha: dict, layers: list[nn.Module]) -> None:
    for index, number in alpha.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"the keys of alpha must be the indices of layers, got {index!r}")
        check_number(f"alpha[{index}]", number)
    nameless = [layer for layer in layers if getattr(layer, "layer_idx", "none at all") is None]
    if nameless:
        raise ValueError(
            f"alpha by layer_idx got {sorted(alpha)}, and {len(nameless)} {type(nameless[0]).__name__} have none: set "
            "one number for all layers, or give their part of the model another attention"
        )
    indices = {index for layer in layers if isinstance(index := getattr(layer, "layer_idx", None), int)}
    if not indices:
        raise ValueError(f"the layers of this model have no numbers: give one alpha for all, got {sorted(alpha)}")
    if set(alpha) != indices:
        raise ValueError(f"alpha must have the layers {sorted(indices)} of the model, got {sorted(alpha)}")


def _check_model(model: object, by: str) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """(modules whose config has "entmax", outermost model of Transformers, module that holds alpha)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{by} takes a model of Transformers, got {said(model)}")
    layers, root = [layer for layer in model.modules() if implementation_of(layer) == "entmax"], root_in(model)
    if not layers:
        raise ValueError(
            f"{by} needs a model with attn_implementation='entmax', got {implementation_of(root or model)!r}: call "
            "model.set_attn_implementation('entmax') first"
        )
    if root is None:
        raise ValueError(
            f"alpha belongs to a whole model of Transformers, got {type(model).__name__}: use "
            "set_alpha(model, {layer index: alpha})"
        )
    return layers, root, _owner_in(model)


def _check_holder(model: nn.Module, root: nn.Module, owner: nn.Module, alpha: object, by: str) -> None:
    """Refuse a tensor that nothing would train, and warn of one that nothing would save."""
    if belongs_to_adapter(model):
        wrapper = type(owner.entmax_alpha).__name__
        raise ValueError(f"alpha belongs to an adapter, {wrapper}: change {type(owner).__name__}.entmax_alpha.value")
    if not isinstance(alpha, Tensor):
        return
    if isinstance(alpha, nn.Parameter) and _is_distributed(model):
        raise ValueError("a learned alpha must be set before the model is wrapped by fully_shard or DDP, got it after")
    if hasattr(root, "peft_config"):
        warnings.warn(
            f"{by} sets alpha in a model that has an adapter, which will not save it: call {by} first, then "
            'get_peft_model with modules_to_save=["entmax_alpha"]',
            stacklevel=4,  # the line that calls set_alpha or AnnealAlpha
        )


def _is_distributed(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    kinds = (FSDPModule, nn.parallel.DistributedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules())
