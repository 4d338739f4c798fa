"""Modules: an attention layer, an activation, a loss.

::

    layer = EntmaxAttention(512, 8, learn_alpha=True)
    output = layer(x)  # (batch, length, 512)
"""

from .alpha import AlphaParameter, WithAlpha
from .attention import TEMPERATURES, EntmaxAttention
from .cache import KeyValueCache
from .positions import POSITIONS, rotate, rotation_of
from .rows import Entmax, EntmaxLoss
from .temperature import AdaptiveTemperature

__all__ = [
    "POSITIONS", "TEMPERATURES", "AdaptiveTemperature", "AlphaParameter", "Entmax", "EntmaxAttention", "EntmaxLoss",
    "KeyValueCache", "WithAlpha", "rotate", "rotation_of",
]  # fmt: skip
