"""An attention layer learns to look things up: it reads key-value pairs, then a key, and answers with its value.

The heads have no positions, a temperature that grows with the length, and an alpha each (ASEntmax, arXiv 2506.16640).
Training sees 16 pairs, and the test up to 256. This takes half a minute on two CPU cores.

python examples/attention_layer.py [STEPS]
"""

import sys

import torch
from torch import nn

from flash_entmax import inspection
from flash_entmax.nn import EntmaxAttention

KEYS, VALUES, WIDTH, HEADS = 512, 16, 64, 2
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400
BATCH, PAIRS = 64, 16


class Lookup(nn.Module):
    """Every token holds a key and a value. The last token holds a key alone."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
        self.attention = EntmaxAttention(
            WIDTH, HEADS, position="none", temperature="adaptive", learn_alpha=True, is_causal=True
        )
        self.predict = nn.Linear(WIDTH, VALUES)

    def forward(self, keys, values):
        x = self.key(keys) + self.value(values)
        return self.predict(self.attention(x)[:, -1])


def batch(pairs: int, count: int = BATCH):
    """Different keys with random values, then one of the keys again; and the value that belongs to it."""
    keys = torch.rand(count, KEYS).argsort(-1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs))
    asked = torch.randint(pairs, (count, 1))
    blank = torch.full((count, 1), VALUES)
    answer = values.gather(1, asked).squeeze(1)
    return torch.cat((keys, keys.gather(1, asked)), 1), torch.cat((values, blank), 1), answer


torch.manual_seed(0)
model = Lookup()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(1, STEPS + 1):
    keys, values, answer = batch(PAIRS)
    loss = nn.functional.cross_entropy(model(keys, values), answer)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        alphas = ", ".join(f"{alpha:.2f}" for alpha in model.attention.alpha.tolist())
        print(f"step {step}: loss {loss.item():.3f}, alpha by head {alphas}")

print("\npairs   right   keys that the last token attends to, by head")
for pairs in (16, 64, 256):
    keys, values, answer = batch(pairs)
    with torch.no_grad(), inspection.record(model) as calls:
        right = (model(keys, values).argmax(-1) == answer).float().mean()
    attended = calls[0].support.size[:, :, -1].float().mean(0)
    print(f"{pairs:5} {100 * right:6.0f} %   {', '.join(f'{size:.1f}' for size in attended.tolist())} of {pairs + 1}")
