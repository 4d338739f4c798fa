"""flash-entmax: exact, differentiable, data-dependent sparse attention for PyTorch."""

import sys
from importlib.metadata import version

from .flops import register_flop_formulas
from .functional import entmax_attention, entmax_attention_varlen
from .problem import Impl, Support

if "torch.utils.flop_counter" in sys.modules:
    register_flop_formulas()

__version__ = version("flash-entmax")
__all__ = [
    "Impl",
    "Support",
    "__version__",
    "entmax_attention",
    "entmax_attention_varlen",
    "register_flop_formulas",
]
