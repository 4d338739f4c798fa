"""What a recurrent model would have to remember: which facts attention writes to its state, evicts, and keeps.

    python examples/what_attention_remembers.py

A stream of facts says where each of four people is; they move. Four queries ask where they are in the end. A key is a
name, a value is a place, and an ALiBi slope prefers late facts, so that a fact evicts an earlier one about the same
person. Needs matplotlib: pip install ".[plot]", from a clone.
"""

# %% The stream: who is where, one fact after the other.
from pathlib import Path

import torch

from flash_entmax import entmax_attention, linear_form, writes
from flash_entmax.show import plot

NAMES = ["Ada", "Bob", "Eve", "Kim"]
PLACES = ["Bonn", "Cork", "Lima", "Oslo", "Pisa", "Rome"]
FACTS, ALPHA, MATCH, SLOPE = 32, 2.0, 6.0, 0.3  # a match of names counts as much as MATCH / SLOPE steps of distance

torch.manual_seed(3)
torch.set_default_dtype(torch.float64)
who, where = torch.randint(len(NAMES), (FACTS,)), torch.randint(len(PLACES), (FACTS,))
key, value = torch.eye(len(NAMES))[who][None, None], torch.eye(len(PLACES))[where][None, None]
query = MATCH * torch.eye(len(NAMES))[None, None]
options = {
    "alpha": ALPHA,
    "scale": 1.0,
    "alibi_slopes": torch.tensor([SLOPE]),
    "query_positions": torch.full((len(NAMES),), FACTS),  # all of them ask after the last fact
}
facts = [f"{NAMES[name]} {PLACES[place]}" for name, place in zip(who.tolist(), where.tolist(), strict=True)]
print(f"{FACTS} facts: {', '.join(facts)}\n")

# %% The recurrence of each query: what it wrote, what later facts evicted, what is left.
record = writes(query, key, **options)
for row, name in enumerate(NAMES):
    wrote, evicted = record.wrote[0, 0, row].sum(), record.evicted[0, 0, row].sum()
    left = ", ".join(facts[t] for t in record.support[0, 0, row].nonzero().flatten())
    print(f"{name}: {wrote} of {FACTS} facts wrote, {evicted} were evicted, left: {left}")
    figure = plot.writes_figure(record, f"Where is {name}?", query=row, labels=facts)
    plot.save_figure(figure, Path("out/what_attention_remembers") / f"{name}.png")
kept, together = record.support.sum(), record.support.any(2).sum()
print(f"\nthe four queries keep {kept} facts, {together} different ones")

# %% Reading the states is attention, exactly. The states of another query are of no use.
support, states, output = linear_form(query, key, value, **options)
attention = entmax_attention(query, key, value, **options)
x = torch.cat((query * (ALPHA - 1), torch.full((1, 1, len(NAMES), 1), -(ALPHA - 1) * SLOPE)), -1)
turned = states.read(x.roll(1, 2))
print(f"reading the own state differs from attention by {(output - attention).abs().max():.0e}")
print(f"reading another query's state differs from it by {(turned - attention.roll(1, 2)).abs().max():.1f}")
print("pictures are in out/what_attention_remembers")
