"""A small byte-level transformer whose attention is entmax attention."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from flash_entmax.nn import EntmaxAttention

from .settings import Settings

BYTES = 256


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.width)
        self.attention = EntmaxAttention(settings.width, settings.heads, alpha=settings.alpha)
        self.mlp_norm = nn.RMSNorm(settings.width)
        self.widen = nn.Linear(settings.width, 4 * settings.width, bias=False)
        self.narrow = nn.Linear(4 * settings.width, settings.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(gelu(self.widen(self.mlp_norm(x))))


class Transformer(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.predict = nn.Linear(settings.width, BYTES, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Every branch starts at zero; the untrained model finds all bytes about equally likely (8 bits per byte)."""
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.predict.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.narrow.weight)

    def forward(self, data: Tensor) -> Tensor:
        """(batch, length) bytes -> (batch, length, 256) logits of the next byte."""
        x = self.embed(data)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))
