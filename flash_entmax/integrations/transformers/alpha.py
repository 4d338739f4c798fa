"""Alpha of a Transformers model with ``attn_implementation="entmax"``: where it is kept, and how the layers find it.

Numbers are in the config, as ``config.entmax_alpha``: one, or one for each layer. A tensor is a weight of the model, in
a module `entmax_alpha` of its base model; the config says so. Each module below the base model knows it by an
`Owner`, and asks it for alpha at each call: whatever replaces weights is seen, and a copied model has its own alpha.
"""

import warnings
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import ALPHAS
from ...core.checks import said
from .config import HELD_BY, declare, implementation_of, is_held


class Alpha(nn.Module):
    """Alpha as a weight: `value`, a parameter where it is learned and a buffer where it is not. Calling it gives alpha.

    It is moved with the model, but no ``model.to(torch.bfloat16)`` narrows it: 1.3 is no number of bfloat16.
    """

    is_to_be_loaded = False  # built without numbers, for those of a folder
    _keep_in_fp32_modules_strict = ("entmax_alpha",)  # read by Transformers when it loads weights

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter):
            self.register_parameter("value", value)
        else:
            self.register_buffer("value", value)

    def __setattr__(self, name: str, value: object) -> None:
        """A weight that a folder lacks would be whatever the memory holds: it is made nan, which `check_loaded` finds.

        Transformers marks what it read from a folder, so that it does not draw it at random.
        """
        if name == "value" and self.is_to_be_loaded and not value.is_meta:
            self.is_to_be_loaded = False
            if not getattr(value, "_is_hf_initialized", False):
                value.data.fill_(torch.nan)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *arguments) -> None:
        self.is_to_be_loaded = False  # by load_state_dict, which says itself what is missing
        super()._load_from_state_dict(*arguments)

    def forward(self) -> Tensor:
        return self.value.clone()  # fully_shard of this module alone frees the value after the call

    def _apply(self, function, recurse=True):
        before = self.value
        super()._apply(lambda tensor: _unnarrowed(tensor, function(tensor)), recurse)
        moved = self.value
        if moved is not before and not isinstance(moved, nn.Parameter) and not (moved.is_meta or before.is_meta):
            before.data = moved  # who holds the tensor, to change it in place, still does
            self.value = before
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.value.shape)}, {'learned' if isinstance(self.value, nn.Parameter) else 'not learned'}"


def _unnarrowed(tensor: Tensor, changed: Tensor) -> Tensor:
    return changed if changed.dtype in (torch.float32, torch.float64) else tensor.to(changed.device)


class Owner:
    """A reference from a module to the base model above it, which is none of its parts.

    A copy of the base model is the owner of its own modules; a module that is copied alone keeps its owner.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict) -> "Owner":
        return Owner(memo.get(id(self.model), self.model))


def link(modules: nn.Module, owner: Owner) -> None:
    """Let a module and all below it know their owner."""
    for module in modules.modules():
        module.entmax_owner = owner


def awaits_alpha(model: nn.Module) -> bool:
    """Its config says that this class of model holds alpha."""
    declared = getattr(model.config, "entmax_alpha", None)
    return is_held(declared) and declared[HELD_BY] == type(model).__name__


def restore_alpha(model: nn.Module) -> None:
    """Make room for the alpha that a model awaits, before its weights are loaded."""
    declared = model.config.entmax_alpha
    # Alpha of a float64 model is float64, or it would not be what was saved.
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    value = torch.tensor(declared["initial"], dtype=dtype)
    link(model, Owner(model))
    model.entmax_alpha = Alpha(nn.Parameter(value) if declared["learned"] else value)
    model.entmax_alpha.is_to_be_loaded = value.is_meta


# Alpha stands behind the first part that has weights, in a model that was given alpha as in one that is loaded:
# optimizers save their state by the order of parameters. It is not the first, whose dtype is that of the model.


def has_weights(part: nn.Module) -> bool:
    return any(weight.is_floating_point() for weight in part.parameters())


def _hold(model: nn.Module, value: Tensor) -> None:
    link(model, Owner(model))
    parts = list(model.named_children())
    first = next((place for place, (_, part) in enumerate(parts) if has_weights(part)), len(parts))
    model.entmax_alpha = Alpha(value)
    for name, part in parts[first + 1 :]:
        delattr(model, name)
        setattr(model, name, part)


# Reading


def alpha_of(module: nn.Module, device: torch.device) -> float | Tensor:
    """Alpha of an attention module: a number, or a tensor () or (heads,) on this device."""
    if hasattr(module, "entmax_alpha"):
        raise ValueError(
            f"{type(module).__name__} has an attribute entmax_alpha, which would not be saved: give layers their own "
            "alpha by set_alpha(model, {layer index: alpha})"
        )
    declared = getattr(module.config, "entmax_alpha", None)
    if declared is None:
        raise ValueError(
            "attn_implementation='entmax' needs an alpha: set config.entmax_alpha to a number from 1 to 2, or call "
            "flash_entmax.integrations.transformers.set_alpha(model, alpha)"
        )
    if is_held(declared):
        return _held_alpha(module, declared, device)
    if isinstance(declared, dict):
        return _alpha_of_layer(module, declared)
    if isinstance(declared, Tensor):
        raise TypeError(f"config.entmax_alpha holds numbers, got {said(declared)}: use set_alpha(model, tensor)")
    check_number("config.entmax_alpha", declared)
    return float(declared)


def _held_alpha(module: nn.Module, declared: dict[str, Any], device: torch.device) -> Tensor:
    owner = getattr(module, "entmax_owner", None)
    if owner is None or not hasattr(owner.model, "entmax_alpha"):
        raise ValueError(
            f"the config says that alpha is a weight of {declared[HELD_BY]}, and {type(module).__name__} is in none "
            "that has it: build the model after register() and with attn_implementation='entmax', or call "
            "set_alpha(model, alpha)"
        )
    alpha = owner.model.entmax_alpha()
    return (alpha if alpha.numel() > 1 else alpha.reshape(())).to(device)  # layers may be on several devices


def _alpha_of_layer(module: nn.Module, declared: dict) -> float:
    index = getattr(module, "layer_idx", None)
    alpha = declared.get(str(index), declared.get(index))  # the keys of JSON are text
    if alpha is None:
        raise ValueError(f"config.entmax_alpha has no alpha for the layer_idx {index!r} of {type(module).__name__}")
    check_number(f"config.entmax_alpha[{index}]", alpha)
    return float(alpha)


def check_loaded(model: nn.Module) -> None:
    """No alpha is missing in the weights."""
    for held in model.modules():
        if isinstance(held, Alpha):
            value = held.value
            if type(value) not in (Tensor, nn.Parameter) or value.is_meta:  # fake or sharded: nothing to be read
                continue
            if value.isnan().any():
                raise ValueError(
                    f"alpha of {type(model).__name__} is missing in the weights that were loaded, or is nan there: "
                    "call set_alpha(model, alpha)"
                )


def held_tensor(model: nn.Module) -> Tensor | None:
    """The tensor that is alpha of this model now, that of the active adapter where there is one."""
    owner = _owner_in(model)
    held = getattr(owner, "entmax_alpha", None)
    return None if held is None else held.value


def belongs_to_adapter(model: nn.Module) -> bool:
    """Something else than an `Alpha` stands in its place."""
    return not isinstance(getattr(_owner_in(model), "entmax_alpha", None), (Alpha, type(None)))


# Setting


def set_alpha(model: nn.Module, alpha: float | Tensor | dict[int, float]) -> None:
    """Give all layers of a model that runs ``attn_implementation="entmax"`` this alpha, in place of what they have.

    It is saved with the model, and a plain ``from_pretrained(folder)`` after ``register()`` has it again.

    Args:
        model: one of Transformers, or a wrapper around one.
        alpha: a number from 1 to 2; or a dict of numbers, one for the ``layer_idx`` of each layer; or a tensor of
            values in [1.01, 2], shaped (), (1,) or (heads,), on the model's device, that all layers share.
            A tensor becomes the weight ``entmax_alpha.value`` of the base model: a ``Parameter`` is learned (and may
            leave that range, to which it is clamped; a scalar one gets the shape (1,), which FSDP needs), and any
            other tensor may be changed in place at any time, which compiles nothing.

    Models built from one config object share its numbers.

    Raises:
        TypeError, ValueError: no layer of the model runs entmax, or alpha is none of the above; nothing is changed.
    """
    assign_alpha(model, alpha, "set_alpha")


def assign_alpha(model: nn.Module, alpha: float | Tensor | dict[int, float], by: str) -> None:
    """What `set_alpha` does, in the words of who was called: that, or `AnnealAlpha`."""
    layers, root, owner = _check_model(model, by)
    _check_holder(model, root, owner, alpha, by)
    if isinstance(alpha, Tensor):
        check_tensor(alpha, layers, owner)
    elif isinstance(alpha, dict):
        _check_layers(alpha, layers)
    else:
        check_number("alpha", alpha)
    _take_away(root)
    if isinstance(alpha, dict):
        declared = {str(index): float(number) for index, number in alpha.items()}
    elif not isinstance(alpha, Tensor):
        declared = float(alpha)
    else:
        if isinstance(alpha, nn.Parameter) and alpha.dim() == 0:
            alpha.data = alpha.data.reshape(1)
        _hold(owner, alpha)
        name = type(owner).__name__.removeprefix("FSDP")
        numbers = torch.full(alpha.shape, torch.nan) if alpha.is_meta else alpha.detach()
        declared = {HELD_BY: name, "learned": isinstance(alpha, nn.Parameter), "initial": numbers.tolist()}
    for config in {id(of.config): of.config for of in (*layers, owner)}.values():
        config.entmax_alpha = declared
    declare(root.config)


def _root_in(model: nn.Module) -> nn.Module | None:
    """The outermost model of Transformers in here."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _owner_in(model: nn.Module) -> nn.Module | None:
    """The base model, where models with different heads look for their weights; the model where it has layers of its
    own beside."""
    root = _root_in(model)
    if root is None:
        return None
    base = root.base_model
    below = set(base.modules())
    beside = [m for m in root.modules() if m not in below and hasattr(m, "layer_idx") and hasattr(m, "config")]
    return root if beside else base


def _take_away(root: nn.Module) -> None:
    for module in list(root.modules()):
        vars(module).pop("entmax_owner", None)
        if isinstance(getattr(module, "entmax_alpha", None), Alpha):
            del module.entmax_alpha


# Checks


def check_number(name: str, alpha: object) -> None:
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(
            f"{name} must be a number, a tensor with one for each head, or a dict of numbers for each layer, got "
            f"{said(alpha)}"
        )
    if not 1 <= alpha <= 2:
        raise ValueError(f"{name} must be from 1 to 2, got {alpha}")


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
    ends = numbers.new_tensor([lowest, highest])  # in the dtype of alpha, whose 1.01 may be below that of float64
    if not ((numbers >= ends[0]) & (numbers <= ends[1])).all():
        raise ValueError(f"a tensor alpha must be in [{lowest:g}, {highest:g}], got {numbers.tolist()}")


def _check_layers(alpha: dict, layers: list[nn.Module]) -> None:
    for index, number in alpha.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"the keys of alpha must be the indices of layers, got {index!r}")
        check_number(f"alpha[{index}]", number)
    wanted = {index for layer in layers if isinstance(index := getattr(layer, "layer_idx", None), int)}
    if set(alpha) != wanted:
        raise ValueError(f"alpha must have the layers {sorted(wanted)} of the model, got {sorted(alpha)}")


def _check_model(model: object, by: str) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """(modules whose config has "entmax", outermost model of Transformers, the one that holds alpha)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{by} takes a model of Transformers, got {said(model)}")
    layers, root = [layer for layer in model.modules() if implementation_of(layer) == "entmax"], _root_in(model)
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
    """What would leave the tensor where nothing trains it, or nothing saves it."""
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
            stacklevel=4,  # the line that calls set_alpha, or makes AnnealAlpha
        )


def _is_distributed(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    kinds = (FSDPModule, nn.parallel.DistributedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules())
