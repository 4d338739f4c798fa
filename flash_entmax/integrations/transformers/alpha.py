"""Alpha of a Transformers model with ``attn_implementation="entmax"``: where it is kept, and how the layers find it.

Numbers are in the config, as ``config.entmax_alpha``: one for all layers, or one for each. A tensor is a weight of the
model: the module ``entmax_alpha`` of its base model holds it, and the config says so. Each module in the base model has
an `Owner`, and reads alpha from it at each call. So it reads whatever replaced the weight, and the layers of a copied
model read the alpha of the copy.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ...core.alphas import within_range
from ...core.call import ALPHAS
from ...core.checks import check_number_alpha, said
from ...nn.alpha import not_narrowed
from .config import HELD_BY, is_held


class AlphaWeight(nn.Module):
    """Alpha as a weight: `value` is a parameter if it is learned, else a buffer. Calling the module gives alpha.

    It moves with the model, but ``model.to(torch.bfloat16)`` does not narrow it: bfloat16 has no 1.3.
    """

    is_to_be_loaded = False  # built on the meta device, to be loaded from a folder
    _keep_in_fp32_modules_strict = ("entmax_alpha",)  # Transformers reads it when it loads weights

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter):
            self.register_parameter("value", value)
        else:
            self.register_buffer("value", value)

    def __setattr__(self, name: str, value: object) -> None:
        """Make alpha nan if the folder lacks it, so that `check_loaded` finds that: its memory holds no number yet.

        Transformers marks the weights that it read from the folder, because it does not draw these at random.
        """
        if name == "value" and self.is_to_be_loaded and not value.is_meta:
            self.is_to_be_loaded = False
            if not getattr(value, "_is_hf_initialized", False):
                value.data.fill_(torch.nan)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *arguments) -> None:
        self.is_to_be_loaded = False  # load_state_dict itself reports what is missing
        super()._load_from_state_dict(*arguments)

    def forward(self) -> Tensor:
        return self.value.clone()  # fully_shard of this module alone frees the value after the call

    def _apply(self, function, recurse=True):
        held = self.value
        super()._apply(lambda tensor: not_narrowed(tensor, function(tensor)), recurse)
        moved = self.value
        if moved is not held and not isinstance(moved, nn.Parameter) and not (moved.is_meta or held.is_meta):
            held.data = moved  # the same tensor object: its holder changes it in place
            self.value = held
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.value.shape)}, {'learned' if isinstance(self.value, nn.Parameter) else 'not learned'}"


class Owner:
    """A reference from a module to its base model, which PyTorch does not take for a part of the module.

    In a copy of the base model, the modules refer to the copy. A module that is copied alone keeps its owner.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict) -> "Owner":
        return Owner(memo.get(id(self.model), self.model))


def link(module: nn.Module, owner: Owner) -> None:
    """Give a module and all its parts their owner."""
    for part in module.modules():
        part.entmax_owner = owner


def awaits_alpha(model: nn.Module) -> bool:
    """Whether the config says that this class of model holds alpha."""
    declared = getattr(model.config, "entmax_alpha", None)
    return is_held(declared) and declared[HELD_BY] == type(model).__name__


def restore_alpha(model: nn.Module) -> None:
    """Give the model the alpha that its config declares, before its weights are loaded."""
    declared = model.config.entmax_alpha
    # At least float32. Alpha of a float64 model is float64, as it was saved.
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    value = torch.tensor(declared["initial"], dtype=dtype)
    link(model, Owner(model))
    model.entmax_alpha = AlphaWeight(nn.Parameter(value) if declared["learned"] else value)
    model.entmax_alpha.is_to_be_loaded = value.is_meta


def has_weights(part: nn.Module) -> bool:
    return any(weight.is_floating_point() for weight in part.parameters())


def hold_alpha(model: nn.Module, value: Tensor) -> None:
    """Make alpha a weight of the model: its second part with weights, whether alpha was set or loaded.

    Optimizers save their state by the order of parameters. Alpha is not the first parameter, because Transformers takes
    the dtype of the first for the dtype of the model.
    """
    link(model, Owner(model))
    parts = list(model.named_children())
    first = next((place for place, (_, part) in enumerate(parts) if has_weights(part)), len(parts))
    model.entmax_alpha = AlphaWeight(value)
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
            f"attn_implementation='entmax' needs an alpha: set entmax_alpha of the {type(module.config).__name__} to a "
            "number up to 2, or call flash_entmax.integrations.transformers.set_alpha(model, alpha)"
        )
    if is_held(declared):
        return _held_alpha(module, declared, device)
    if isinstance(declared, dict):
        return _alpha_of_layer(module, declared)
    if isinstance(declared, Tensor):
        raise TypeError(f"config.entmax_alpha holds numbers, got {said(declared)}: use set_alpha(model, tensor)")
    if not isinstance(declared, Real):
        raise TypeError(f"config.entmax_alpha must be a number, or a dict of numbers by layer, got {said(declared)}")
    check_number("config.entmax_alpha", declared)
    return float(declared)


def _held_alpha(module: nn.Module, declared: dict[str, Any], device: torch.device) -> Tensor:
    owner = getattr(module, "entmax_owner", None)
    if owner is None or not hasattr(owner.model, "entmax_alpha"):
        raise ValueError(
            f"the config says that alpha is a weight of {declared[HELD_BY]}, but {type(module).__name__} is in none "
            "that has it: build the model after register() and with attn_implementation='entmax', or call "
            "set_alpha(model, alpha)"
        )
    alpha = owner.model.entmax_alpha()
    alpha = (alpha if alpha.numel() > 1 else alpha.reshape(())).to(device)  # layers may be on several devices
    return within_range(alpha, declared.get("range", ALPHAS)) if declared["learned"] else alpha


def _alpha_of_layer(module: nn.Module, declared: dict) -> float:
    index = getattr(module, "layer_idx", None)
    alpha = declared.get(str(index), declared.get(index))  # the keys of JSON are text
    if alpha is None and index is None:
        raise ValueError(
            f"config.entmax_alpha has an alpha for each layer_idx, and {type(module).__name__} has none: set one "
            "number for all layers, or give its part of the model another attention"
        )
    if alpha is None:
        raise ValueError(f"config.entmax_alpha has no alpha for the layer_idx {index!r} of {type(module).__name__}")
    check_number(f"config.entmax_alpha[{index}]", alpha)
    return float(alpha)


def check_number(name: str, alpha: object) -> None:
    if not isinstance(alpha, Real) or isinstance(alpha, bool):
        raise TypeError(
            f"{name} must be a number, a tensor with one for each head, or a dict of numbers for each layer, got "
            f"{said(alpha)}"
        )
    check_number_alpha(name, float(alpha))


def check_loaded(model: nn.Module) -> None:
    """Refuse a model whose weights were loaded without alpha."""
    for weight in model.modules():
        if isinstance(weight, AlphaWeight):
            value = weight.value
            if type(value) not in (Tensor, nn.Parameter) or value.is_meta:  # fake or sharded: it cannot be read
                continue
            if value.isnan().any():
                raise ValueError(
                    f"alpha of {type(model).__name__} is missing in the weights that were loaded, or is nan there: "
                    "call set_alpha(model, alpha)"
                )
