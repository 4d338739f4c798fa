"""Entmax attention in the models of Transformers, version 5.17 and later.

::

    from flash_entmax.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="entmax15")

``"entmax15"`` is alpha 1.5, ``"sparsemax"`` alpha 2, and ``"entmax"`` takes alpha from ``config.entmax_alpha``, which
:func:`set_alpha` sets. A saved model keeps its attention and its alpha: a plain ``from_pretrained(folder)`` after
``register()`` builds the same model. Without ``register()``, Transformers raises an error.

The model's own masks decide what a query sees, exactly as with ``"eager"``: padding on either side, packed sequences,
windows, any cache. Causal, bidirectional, windowed and packed attention become options of
:func:`entmax_attention`, which skips what they hide and works inside ``torch.compile``. Any other mask (chunks, image
blocks, functions of a user, 4-D masks) is evaluated densely into a FlexAttention ``BlockMask``. This is exact as well,
but works outside of ``torch.compile`` only.

A query that sees no key, such as left padding, gets output 0.
"""

from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from .config import IMPLEMENTATIONS, saved_attention
from .construction import prepare_built, watch_construction
from .layer_call import HARMLESS, attention
from .masks import Mask, mask
from .setting import set_alpha

__all__ = [
    "HARMLESS", "Mask", "attention", "context_parallel", "mask", "register", "saved_attention", "set_alpha",
]  # fmt: skip

OLDEST = 5, 17  # older versions describe masks differently, and load what was saved as softmax
INSTALL = 'this integration needs transformers 5.17 or later, {}: pip install ".[transformers]", from a clone'


def register(*models: nn.Module) -> None:
    """Make ``attn_implementation="entmax15"``, ``"sparsemax"`` and ``"entmax"`` known to Transformers.

    Calling it again changes nothing. From then on, the ``config.json`` of a saved model says which of them it has, and
    ``"attn_implementation": null`` if it has none.

    Args:
        models: models that were built before this call, and that get one of these by ``set_attn_implementation``.

    Raises:
        ImportError: Transformers 5.17 or later is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
    except ImportError as error:
        raise ImportError(INSTALL.format("it is missing or older")) from error
    if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST:
        raise ImportError(INSTALL.format(f"got {__version__}"))
    for name, alpha in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(attention, alpha=alpha))
        AttentionMaskInterface.register(name, mask)
    watch_construction()
    for model in models:
        prepare_built(model)


LATER = {"AnnealAlpha": "annealing", "context_parallel": "sharding"}


def __getattr__(name: str) -> Any:
    """Import at its first use what needs more: `AnnealAlpha` a class of Transformers, the other torch.distributed."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{LATER[name]}", __name__), name)
    return globals()[name]
