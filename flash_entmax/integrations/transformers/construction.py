"""What is done while a model of Transformers is built: its config, its alpha, and whether it can run entmax.

PyTorch calls `on_registration` for each module that becomes a part of another. The first part of a model comes after
its config and before its weights.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ...core.checks import said
from .alpha import awaits_alpha, check_loaded, has_weights, link, restore_alpha
from .config import (
    IMPLEMENTATIONS,
    Declaration,
    declare,
    declared_attention,
    drop_held,
    hand_down,
    implementation_of,
    is_undeclared,
    takes_alpha,
)

_installed = []


def watch_construction() -> None:
    """Prepare all models that are built from now on. A second call changes nothing."""
    if not _installed:
        _installed.append(register_module_module_registration_hook(on_registration))


def on_registration(module: nn.Module, name: str, part: nn.Module | None) -> None:
    if torch.compiler.is_compiling():  # for instance a slice of a list of layers, which is a module as well
        return
    from transformers import PreTrainedModel

    if part is None or name == "entmax_alpha":
        return
    if isinstance(module, PreTrainedModel):
        if next(module.children(), None) is None and "entmax_check" not in vars(module):
            prepare(module)
        if "entmax_awaited" in vars(module) and has_weights(part):
            del module.entmax_awaited
            setattr(module, name, part)  # before alpha; PyTorch sets it again, at the same place
            restore_alpha(module)
        for inner in part.modules():
            _unwatch(inner)  # only the outermost model is checked
    owner = vars(module).get("entmax_owner")
    if owner is not None:
        link(part, owner)
    if "peft_config" in vars(part):
        _refuse_adapter(part)


def prepare(model: nn.Module) -> None:
    """Check and prepare a model that has its config and no parts."""
    attention = declared_attention(model.config)
    if attention is None:
        _warn_of_softmax(model)
    else:
        _refuse_by_class(model)
    if not takes_alpha(model.config) and drop_held(model.config):
        warnings.warn(
            f"{_whose(model)} was saved with an alpha among its weights, and is loaded with "
            f"{attention or model.config._attn_implementation!r}, which has no place for it: that alpha is dropped. To "
            "keep it, load with attn_implementation='entmax'",
            stacklevel=2,
        )
    hand_down(model.config)
    if takes_alpha(model.config) and awaits_alpha(model):
        model.entmax_awaited = True
    declare(model.config)
    model.entmax_check = model.register_forward_hook(check_use)


def prepare_built(model: nn.Module) -> None:
    """Prepare a model that was built before `watch_construction`."""
    from transformers import PreTrainedModel

    parts = model.modules() if isinstance(model, nn.Module) else ()
    root = next((part for part in parts if isinstance(part, PreTrainedModel)), None)
    if root is None:
        raise TypeError(f"register takes models of Transformers, got {said(model)}")
    if "entmax_check" not in vars(root):
        root.entmax_check = root.register_forward_hook(check_use)
    for part in root.modules():
        if hasattr(getattr(part, "config", None), "sub_configs"):
            declare(part.config)


def _warn_of_softmax(model: nn.Module) -> None:
    saved = vars(model.config).get("entmax_attention")
    if saved is not None and not isinstance(saved, Declaration):
        warnings.warn(
            f"{_whose(model)} was saved with attn_implementation={saved!r} and is loaded with "
            f"{model.config._attn_implementation!r}, which is softmax: its outputs are not those of the saved model. "
            "To load what was saved, leave out attn_implementation",
            stacklevel=2,
        )
        del model.config.entmax_attention
        drop_held(model.config)


def _whose(model: nn.Module) -> str:
    """Its class and folder: Python shows a warning of the same words only once."""
    folder = model.config.name_or_path
    return type(model).__name__ + (f" of {folder}" if folder else "")


# Models that would not use the attention, or not with its alpha


def _refuse_adapter(tuner: nn.Module) -> None:
    """Refuse an adapter whose alpha has no place: PEFT leaves out, in silence, the modules that the model lacks."""
    saved = (getattr(config, "modules_to_save", None) for config in dict(tuner.peft_config).values())
    if any("entmax_alpha" in (names or ()) for names in saved) and not any(
        name.endswith("entmax_alpha") for name, _ in tuner.named_modules()
    ):
        raise ValueError(
            "the adapter has an alpha, modules_to_save=['entmax_alpha'], for which the model has no place: load the "
            "model with attn_implementation='entmax', and call set_alpha(model, tensor) before it gets the adapter"
        )


def _refuse_by_class(model: nn.Module) -> None:
    """Refuse a class that neither declares Transformers' attention interface nor has code that calls it."""
    kind, attention = type(model), model.config._attn_implementation
    if declared_attention(model.config) == attention and not (
        kind._supports_attention_backend or kind._can_set_attn_implementation()
    ):
        raise ValueError(
            f"{kind.__name__} cannot run attn_implementation={attention!r}: its class says that it does not support "
            "attention backends, and its code never asks for one. Use attn_implementation='eager', its own softmax; "
            "for a part of a larger model, a dict such as {'text_config': 'entmax15', 'vision_config': 'eager'}"
        )


_traced: set[str] = set()  # classes of attention modules whose call of entmax was compiled


def note_call(module: nn.Module) -> None:
    """Note that an attention module called entmax; refuse it if its model was built before `register`.

    Of a compiled call only the class of the module is noted: tracing changes no module.
    """
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and "entmax_called" in vars(module):
        return
    if implementation_of(module) in IMPLEMENTATIONS and is_undeclared(module.config):
        raise RuntimeError(
            f"{type(module).__name__} belongs to a model that was built before register(), and would not be saved with "
            "this attention: call register(model), from flash_entmax.integrations.transformers"
        )
    if is_compiling:
        _note_traced(type(module).__name__)
    else:
        module.entmax_called = True


@torch.compiler.assume_constant_result
def _note_traced(name: str) -> bool:
    _traced.add(name)
    return True


def _called(module: nn.Module) -> bool:
    return "entmax_called" in vars(module) or type(module).__name__ in _traced


def check_use(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """After the first forward pass of an outermost model whose config asks for entmax: refuse it if none was called."""
    if torch.compiler.is_compiling():
        return
    attention = declared_attention(model.config)
    if attention is None:
        return
    check_loaded(model)
    if not any(_called(module) for module in model.modules()):
        raise RuntimeError(
            f"{type(model).__name__} ran without a call of its attention function: attn_implementation={attention!r} "
            "has no effect, as it computes its own attention, or none. Use attn_implementation='eager', its own softmax"
        )
    declare(model.config)
    _unwatch(model)


def _unwatch(module: nn.Module) -> None:
    handle = vars(module).pop("entmax_check", None)
    if handle is not None:
        handle.remove()
