"""flash-entmax: exact, differentiable, data-dependent sparse attention for PyTorch."""

from importlib.metadata import version

from .functional import entmax_attention
from .problem import Impl, Support

__version__ = version("flash-entmax")
__all__ = ["Impl", "Support", "__version__", "entmax_attention"]
