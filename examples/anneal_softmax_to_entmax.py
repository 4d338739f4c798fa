"""Turn a softmax model into an entmax model: alpha rises from 1.01 to 1.5 while training goes on.

A small byte-level transformer learns PyTorch's sources with softmax attention. Then training goes on twice, with the
same batches: with softmax, and with an annealed alpha. The losses stay close. Half a minute on two CPU cores.

python examples/anneal_softmax_to_entmax.py [STEPS]
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from flash_entmax.anneal import AlphaAnnealing
from flash_entmax.nn import EntmaxAttention

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 128, 8
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 120


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = EntmaxAttention(WIDTH, HEADS)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, alpha):
        x = x + self.attention(self.norms[0](x), alpha=alpha)
        return x + self.narrow(gelu(self.widen(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.predict = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, data, alpha):
        x = self.embed(data)
        for block in self.blocks:
            x = block(x, alpha)
        return self.predict(self.norm(x))


sources = sorted((Path(torch.__file__).parent / "nn").rglob("*.py"))
text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
train, held_out = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]


def windows(data, seed, count=BATCH):
    starts = torch.randint(len(data) - CONTEXT - 1, (count, 1), generator=torch.Generator().manual_seed(seed))
    window = data[starts + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, 1:]


def loss_of(model, alpha, data, seed, count=BATCH):
    inputs, targets = windows(data, seed, count)
    return cross_entropy(model(inputs, alpha).flatten(0, 1), targets.flatten())


def train_on(model, steps, alpha, annealing=None, first=0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        loss = loss_of(model, alpha, train, first + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if annealing is not None:
            annealing.step()


@torch.no_grad()
def validation(model, alpha):
    return loss_of(model, alpha, held_out, seed=1_000_000, count=64).item()


torch.manual_seed(0)
softmax = Model()
train_on(softmax, STEPS, alpha=1.0)
print(f"after {STEPS} steps with softmax:           validation loss {validation(softmax, 1.0):.3f}")
print(f"    at once with alpha 1.01:              {validation(softmax, 1.01):.3f}")
print(f"    at once with alpha 1.5:               {validation(softmax, 1.5):.3f}")

entmax = copy.deepcopy(softmax)
train_on(softmax, STEPS, alpha=1.0, first=STEPS)
annealing = AlphaAnnealing(steps=2 * STEPS // 3)
train_on(entmax, STEPS, annealing.alpha, annealing, first=STEPS)
print(f"{STEPS} steps more with softmax:            validation loss {validation(softmax, 1.0):.3f}")
print(f"{STEPS} steps more, alpha annealed to 1.5:  validation loss {validation(entmax, annealing.alpha):.3f}")
