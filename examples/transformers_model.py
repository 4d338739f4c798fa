"""A Llama of Transformers with entmax attention: train it on Python's own source, see what it attends to, generate.

Any model that takes an `attn_implementation` works like this one. This takes fifteen seconds on one CPU core.

pip install ".[transformers]", from a clone
python examples/transformers_model.py
"""

import argparse
import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_entmax import inspection
from flash_entmax.anneal import AlphaAnnealing
from flash_entmax.integrations.transformers import register, set_alpha

STEPS, BATCH, LENGTH = 100, 6, 128

register()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM._from_config(config, attn_implementation="entmax")
text = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "replace")))

# One tensor is the alpha of all layers. It moves from almost softmax to 1.5 over the first half of the training. A
# Trainer does the same with callbacks=[AnnealAlpha(model, steps=STEPS // 2)], from the module of `register`.
# model.save_pretrained(folder) saves this alpha, and LlamaForCausalLM.from_pretrained(folder) finds it again.
annealing = AlphaAnnealing(STEPS // 2)
set_alpha(model, annealing.alpha)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(1, STEPS + 1):
    starts = torch.randint(len(text) - LENGTH, (BATCH,)).tolist()
    ids = torch.stack([text[start : start + LENGTH] for start in starts])
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    alpha = annealing.step()
    if step % 25 == 0:
        print(f"step {step}: alpha {alpha:.2f}, loss {loss:.2f}")

model.eval()
part = text[None, 9000 : 9000 + LENGTH]
for name in ("entmax15", "sparsemax"):
    model.set_attn_implementation(name)
    with torch.no_grad(), inspection.record(model) as calls:
        loss = model(input_ids=part, labels=part).loss
    print(f"\n{name}: loss {loss:.2f}; of {calls[0].visible_per_query:.0f} keys on average, a query attends to")
    for call in calls:
        print(f"  {call.keys_per_query.mean():.1f} in {call.name}")

# Prompts of different lengths are padded on the left. No token attends to padding.
prompts = ["def add_argument(self", "import "]
rows = [torch.tensor(list(prompt.encode())) for prompt in prompts]
longest = max(len(row) for row in rows)
ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
model.set_attn_implementation("entmax15")
output = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=40, do_sample=False)
print()
for row in output:
    print(repr(bytes(row[row != 0].tolist()).decode()))
