"""Modules: an attention layer, an activation, a loss.

::

    layer = EntmaxAttention(512, 8, learn_alpha=True)
    output = layer(x)  # (batch, length, 512)
"""

from .alpha import AlphaParameter, WithAlpha
from .attention import TEMPERATURES, EntmaxAttention
from .cache import KeyValueCache
from .positions import POSITIONS, rotate, rotation_of
from .rows import BudgetSparsemax, Entmax, EntmaxLoss, Normmax, NormmaxLoss
from .temperature import AdaptiveTemperature

__all__ = [
    "POSITIONS", "TEMPERATURES", "AdaptiveTemperature", "AlphaParameter", "BudgetSparsemax", "Entmax",
    "EntmaxAttention", "EntmaxLoss", "KeyValueCache", "Normmax", "NormmaxLoss", "WithAlpha", "rotate", "rotation_of",
]  # fmt: skip
