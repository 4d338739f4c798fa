"""A small byte-level transformer whose attention is entmax attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from flash_entmax import entmax_attention

from .settings import Settings

BYTES = 256


class Attention(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.head_size, self.alpha = settings.head_size, settings.alpha
        self.mix = nn.Linear(settings.width, 3 * settings.width, bias=False)
        self.out = nn.Linear(settings.width, settings.width, bias=False)

    def heads(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, length, width) -> query, key and value, (batch, heads, length, head size) each, in one dtype."""
        query, key, value = self.mix(x).unflatten(-1, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)
        return rotate(query, rotation).to(value.dtype), rotate(key, rotation).to(value.dtype), value

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        mixed = entmax_attention(*self.heads(x, rotation), alpha=self.alpha, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.width)
        self.attention = Attention(settings)
        self.mlp_norm = nn.RMSNorm(settings.width)
        self.widen = nn.Linear(settings.width, 4 * settings.width, bias=False)
        self.narrow = nn.Linear(4 * settings.width, settings.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.narrow(gelu(self.widen(self.mlp_norm(x))))


class Transformer(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.predict = nn.Linear(settings.width, BYTES, bias=False)
        self.register_buffer("rotation", rotation_of(settings.context, settings.head_size), persistent=False)
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
            x = block(x, self.rotation[:, : data.shape[1]])
        return self.predict(self.norm(x))

    @torch.no_grad()
    def heads_by_layer(self, data: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The query, key and value of each layer, (batch, heads, length, head size) each."""
        layers, x = [], self.embed(data)
        rotation = self.rotation[:, : data.shape[1]]
        for block in self.blocks:
            layers.append(block.attention.heads(block.attention_norm(x), rotation))
            x = block(x, rotation)
        return layers


def rotation_of(length: int, head_size: int) -> Tensor:
    """(2, length, head size / 2): cosine and sine of the rotary angles (Su et al. 2021, arXiv 2104.09864)."""
    speed = 10_000.0 ** -(torch.arange(0, head_size, 2) / head_size)
    angle = torch.arange(length).unsqueeze(-1) * speed
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (x_j, x_{j + head size / 2}) of each position by its angles."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
