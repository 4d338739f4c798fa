"""See which tokens each token attends to: record a model, print its numbers, draw them, write a page to point at.

    python examples/see_attention.py

The model is small and was not trained. Queries and keys come from the same embedding, so that words attend to earlier
occurrences of themselves. The ALiBi slope of a head says how much it prefers near ones. Any model that calls entmax
attention can take its place. Needs matplotlib: pip install ".[plot]", from a clone.
"""

# %% A model of three layers with four heads, and its text: this file, split into words.
import re
from pathlib import Path

import torch
from torch import nn

from flash_entmax import entmax_attention, inspection
from flash_entmax.show import page, plot

OUT = Path("out/see_attention")
WIDTH, HEADS = 256, 4
SHARPNESS = 0.4, 0.55, 0.7  # one for each layer; larger scores make attention sparser


class Attention(nn.Module):
    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.query, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        nn.init.orthogonal_(self.query.weight, gain=sharpness)
        self.register_buffer("alibi_slopes", torch.tensor([1 / 4, 1 / 16, 1 / 64, 0.0]))

    def forward(self, x):
        query, value = (mix(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for mix in (self.query, self.value))
        heads = entmax_attention(query, query, value, is_causal=True, alibi_slopes=self.alibi_slopes)
        return x + heads.transpose(1, 2).flatten(2)


torch.manual_seed(0)
tokens = re.findall(r"\w+|\s+|[^\w\s]", Path(__file__).read_text())
numbers = {word: number for number, word in enumerate(dict.fromkeys(tokens))}
model = nn.Sequential(nn.Embedding(len(numbers), WIDTH), *map(Attention, SHARPNESS))
ids = torch.tensor([[numbers[token] for token in tokens]])

# %% Record one pass. Nothing in the model changes, and all options of the calls are taken into account.
with torch.no_grad(), inspection.record(model) as calls:
    model(ids)

for call in calls:
    sizes = ", ".join(f"{size:.1f}" for size in call.keys_per_query)
    print(f"layer {call.number}: {sizes} keys per query by head, of {call.visible_per_query:.0f} visible;")
    print(f"         {100 * call.block_sparsity.mean():.0f} % of the visible tiles are empty;")
    print(f"         64 queries together attend to {call.keys_per_64_queries.mean():.0f} keys")

# %% The keys of one query, exactly: a row of a sparse matrix.
query = max(n for n, token in enumerate(tokens) if token == "attention")
rows = calls[0].rows(batch=0, head=1)
row = slice(rows.crow_indices()[query], rows.crow_indices()[query + 1])
print(f"\nin layer 0, head 1, token {query} ({tokens[query]!r}) attends to")
for key, probability in zip(rows.col_indices()[row].tolist(), rows.values()[row].tolist(), strict=True):
    print(f"  {probability:.4f}  token {key:4}  {tokens[key]!r}")

# %% Pictures, and the page.
title = f"{len(tokens)} tokens of {Path(__file__).name}"
plot.save_figure(plot.support_figure(calls, f"Support size: {title}"), OUT / "support.png")
plot.save_figure(plot.sparsity_figure(calls, f"Block sparsity: {title}"), OUT / "sparsity.png")
plot.save_figure(plot.map_figure(calls[1], f"Layer 1, head 3: {title}", head=3), OUT / "map.png")
written = page.save_page(OUT / "attention.html", tokens, calls, title=title, note="A model that was not trained")
print(f"\npictures and a page are in {OUT}; open {written} in a browser and point at a word")
