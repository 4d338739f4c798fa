"""flash-entmax: exact, differentiable, data-dependent sparse attention for PyTorch."""

import sys

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
