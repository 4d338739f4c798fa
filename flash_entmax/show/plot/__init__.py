"""Pictures of sparse attention. Needs matplotlib: pip install ".[plot]", from a clone."""

from .calls import map_figure, sparsity_figure, support_figure
from .passage import LINE_LENGTH, attention_figure, save_attention
from .shared import require_matplotlib, save_figure
from .writes import writes_figure

__all__ = [
    "LINE_LENGTH",
    "attention_figure",
    "map_figure",
    "require_matplotlib",
    "save_attention",
    "save_figure",
    "sparsity_figure",
    "support_figure",
    "writes_figure",
]
