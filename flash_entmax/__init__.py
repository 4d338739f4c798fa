"""flash-entmax: exact, differentiable, data-dependent sparse attention for PyTorch."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .activations import entmax, entmax15, sparsemax
from .backends import Impl
from .budget import budget_sparsemax
from .core.call import KeySummary, Support
from .functional import entmax_attention, entmax_attention_varlen, summarise_keys
from .key_summaries import KeySummaries
from .linear_attention import LinearForm, LinearStates, linear_form
from .losses import entmax15_loss, entmax_loss, linear_entmax_loss, sparsemax_loss
from .normmax import normmax, normmax_loss
from .operators.flops import register_flop_formulas
from .paged import entmax_attention_paged
from .recurrence import Writes, writes

if "torch.utils.flop_counter" in sys.modules:
    register_flop_formulas()

# Imported by whoever first asks for one: they need more of torch, or other packages.
MODULES = "adapt", "anneal", "distributed", "inspection", "integrations", "nn", "show", "variational"

if TYPE_CHECKING:
    from . import adapt as adapt
    from . import anneal as anneal
    from . import distributed as distributed
    from . import inspection as inspection
    from . import integrations as integrations
    from . import nn as nn
    from . import show as show
    from . import variational as variational
else:

    def __getattr__(name):
        if name in MODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *MODULES})


__version__ = "0.2.0"  # pyproject.toml reads it here
__all__ = [
    "Impl",
    "KeySummaries",
    "KeySummary",
    "LinearForm",
    "LinearStates",
    "Support",
    "Writes",
    "__version__",
    "budget_sparsemax",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_attention",
    "entmax_attention_paged",
    "entmax_attention_varlen",
    "entmax_loss",
    "linear_entmax_loss",
    "linear_form",
    "normmax",
    "normmax_loss",
    "register_flop_formulas",
    "sparsemax",
    "sparsemax_loss",
    "summarise_keys",
    "writes",
]
