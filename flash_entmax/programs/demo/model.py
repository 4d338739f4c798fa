"""A small transformer whose attention is entmax attention."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from flash_entmax.nn import EntmaxAttention, KeyValueCache

BYTES = 256


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, **attention) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = EntmaxAttention(width, heads, **attention)
        self.mlp_norm = nn.RMSNorm(width)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, alpha: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), alpha=alpha, cache=cache)
        return x + self.narrow(gelu(self.widen(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Every layer gets the options ``attention`` of :class:`flash_entmax.nn.EntmaxAttention`."""

    def __init__(self, layers: int, width: int, heads: int, *, vocabulary: int = BYTES, **attention) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, **attention) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.predict = nn.Linear(width, vocabulary, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Every branch starts at zero, and the untrained model finds all tokens about equally likely."""
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.predict.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.narrow.weight)

    def compile(self, **options) -> None:
        """Compile block by block with ``options`` of torch.compile. Blocks are alike, so one compilation serves all."""
        for block in self.blocks:
            block.compile(**options)

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """An empty cache for each layer."""
        return [block.attention.new_cache(batch, capacity) for block in self.blocks]

    def forward(self, data: Tensor, alpha: Tensor | None = None, caches: list[KeyValueCache] | None = None) -> Tensor:
        """(batch, length) tokens -> (batch, length, vocabulary) logits of the next token.

        ``alpha`` replaces the alpha of the layers, for a training in which it moves. With ``caches`` the tokens follow
        those that were read before.
        """
        x = self.embed(data)
        for layer, block in enumerate(self.blocks):
            x = block(x, alpha, None if caches is None else caches[layer])
        return self.predict(self.norm(x))
