"""The transformer of the recipes that compare arms by length: gated MLP, and norms behind the branches."""

from torch import nn

from ..demo.model import Transformer

BETA_BIAS = -2.97  # softplus of it is 0.05, so ASEntmax multiplies scores by 1.05 at first


def transformer(layers: int, width: int, heads: int, **options) -> Transformer:
    """With an RMSNorm behind attention and MLP as well (sandwich norm), unless ``options`` say otherwise.

    All projections start as normal(0, 0.02).
    """
    usual = {"zero_branches": False, "gated_mlp": True, "sandwich_norm": True}
    model = Transformer(layers, width, heads, **usual | options)
    for block in model.blocks:
        if block.attention.temperature is not None:
            nn.init.constant_(block.attention.temperature.beta.bias, BETA_BIAS)
    return model
