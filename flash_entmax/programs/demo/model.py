"""A small transformer whose attention is entmax attention."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from flash_entmax.nn import EntmaxAttention, KeyValueCache

BYTES = 256


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). With ``sandwich_norm`` x + norm(attention(norm(x))) and
    x + norm(mlp(norm(x))), as in Gemma 2 (arXiv 2408.00118).

    The MLP is narrow(gelu(widen(x))); with ``gated_mlp`` narrow(gelu(gate(x)) * widen(x)) (arXiv 2002.05202).
    """

    def __init__(
        self, width: int, heads: int, *, sandwich_norm: bool = False, gated_mlp: bool = False, **attention
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = EntmaxAttention(width, heads, output_norm=sandwich_norm, **attention)
        self.mlp_norm = nn.RMSNorm(width)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)
        self.gate = nn.Linear(width, 4 * width, bias=False) if gated_mlp else None
        self.mlp_output_norm = nn.RMSNorm(width) if sandwich_norm else nn.Identity()

    def forward(self, x: Tensor, alpha: float | Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), alpha=alpha, cache=cache)
        return x + self.mlp_output_norm(self.mlp(self.mlp_norm(x)))

    def mlp(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.narrow(gelu(self.widen(x)))
        return self.narrow(gelu(self.gate(x)) * self.widen(x))


class Transformer(nn.Module):
    """Every layer gets the options ``block`` of :class:`Block`: ``sandwich_norm``, ``gated_mlp``, and those of
    :class:`flash_entmax.nn.EntmaxAttention`.

    ``zero_branches``: every branch starts at zero. If it is False, all projections and the MLPs start as normal(0,
    0.02), as in GPT-2 and Gemma. So they must with ``sandwich_norm``: a norm of zeros has no useful gradient.

    ``first_layer_alpha`` is the alpha of the first layer at all times, whose own alpha is then not used. None: the
    first layer is like the others.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        *,
        vocabulary: int = BYTES,
        zero_branches: bool = True,
        first_layer_alpha: float | None = None,
        **block,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.first_layer_alpha = first_layer_alpha
        self.blocks = nn.ModuleList(Block(width, heads, **block) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.predict = nn.Linear(width, vocabulary, bias=False)
        if zero_branches and block.get("sandwich_norm"):
            raise ValueError("zero_branches=True has no use with sandwich_norm=True: pass zero_branches=False")
        self.initialise(zero_branches)

    def initialise(self, zero_branches: bool) -> None:
        """The untrained model finds all tokens about equally likely."""
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.predict.weight, std=0.02)
        for block in self.blocks:
            if zero_branches:
                nn.init.zeros_(block.attention.out.weight)
                nn.init.zeros_(block.narrow.weight)
                continue
            attention = block.attention
            for linear in (attention.query, attention.key, attention.value, attention.out, block.widen, block.narrow):
                nn.init.normal_(linear.weight, std=0.02)
            if block.gate is not None:
                nn.init.normal_(block.gate.weight, std=0.02)

    def compile(self, **options) -> None:
        """Compile block by block with ``options`` of torch.compile. Blocks are alike, so one compilation serves all."""
        for block in self.blocks:
            block.compile(**options)

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """An empty cache for each layer."""
        return [block.attention.new_cache(batch, capacity) for block in self.blocks]

    def forward(self, data: Tensor, alpha: Tensor | None = None, caches: list[KeyValueCache] | None = None) -> Tensor:
        """(batch, length) tokens -> (batch, length, vocabulary) logits of the next token.

        ``alpha`` replaces the alpha of the layers, for a training in which it moves, but not ``first_layer_alpha``.
        With ``caches`` the tokens follow those that were read before.
        """
        x = self.embed(data)
        for layer, block in enumerate(self.blocks):
            layer_alpha = self.first_layer_alpha if layer == 0 and self.first_layer_alpha is not None else alpha
            x = block(x, layer_alpha, None if caches is None else caches[layer])
        return self.predict(self.norm(x))
