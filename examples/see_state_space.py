"""Where does a state-space model look? Mamba-2 and a transformer with entmax attention learn to copy, side by side.

    python examples/see_state_space.py           # a minute or two on two CPU cores
    python examples/see_state_space.py 1         # another seed
    python examples/see_state_space.py 0 10 5    # 10 steps with sources of 5 tokens: seconds, and little is learned

A text is a source of random tokens, a separator, and the source again. Each token of the answer has one true source. Of
each layer we see which tokens an output is made of: the share of a token is the length of the vector that it
contributes. Recall at k says how often the true source is among the k tokens with the largest shares. Needs
transformers and matplotlib: pip install ".[transformers,plot]", from a clone.
"""

# %% The task, and two models of two layers that differ in what mixes the tokens.
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config
from transformers.utils import logging

from flash_entmax import inspection
from flash_entmax.integrations import state_space
from flash_entmax.integrations.transformers import register
from flash_entmax.show import page, plot

register()
logging.set_verbosity_error()  # it says that Mamba's own kernels are not installed
SEED, STEPS, LENGTH = (int(number) for number in (*sys.argv[1:], *("0", "600", "10")[len(sys.argv) - 1 :]))
OUT = Path("out/see_state_space")
VOCABULARY, BATCH, TESTS = 16, 32, 64
SIZES = {"vocab_size": VOCABULARY + 1, "hidden_size": 64, "num_hidden_layers": 2}
SIZES |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "entmax": LlamaConfig(num_attention_heads=4, intermediate_size=128, initializer_range=0.1, **SIZES),
    "Mamba-2": Mamba2Config(num_heads=4, head_dim=32, state_size=32, n_groups=1, chunk_size=2 * LENGTH, **SIZES),
}


def texts(count, seed):
    """(count, 2 LENGTH + 1): source, separator, the source again."""
    source = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return torch.cat((source, torch.full((count, 1), VOCABULARY), source), 1)


def train(config):
    torch.manual_seed(SEED)
    attention = {"attn_implementation": "entmax15"} if isinstance(config, LlamaConfig) else {}
    model = AutoModelForCausalLM.from_config(config, **attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / STEPS))
    for step in range(STEPS):
        data = texts(BATCH, STEPS * SEED + step)
        logits = model(data[:, :-1], use_cache=False).logits[:, LENGTH:]
        loss = cross_entropy(logits.flatten(0, 1), data[:, LENGTH + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


# %% Both layers as one kind of map. Attention mixes values by its probabilities, and the heads by the output's weight.
def shares_of(call, model, inputs):
    """(texts, output tokens, input tokens), rows that sum to 1."""
    if isinstance(call, state_space.RecordedMixer):
        return call.shares()
    layer, heads = model.get_submodule(call.name), range(call.problem.heads)
    maps = [torch.stack([call.rows(text, head).to_dense() for head in heads]) for text in range(TESTS)]
    value = layer.v_proj(inputs[call.name]).unflatten(-1, (len(heads), -1))
    weight = layer.o_proj.weight.unflatten(1, (len(heads), -1))
    of_heads = torch.einsum("tkhs,whs->tkhw", value, weight)
    size = torch.einsum("thik,tkhw->tikw", torch.stack(maps), of_heads).norm(dim=-1)
    return size / size.sum(-1, keepdim=True)


def recall(shares, k):
    """In how many of the answer's tokens, of 1, the true source is among the k tokens with the largest shares."""
    true = torch.arange(LENGTH).view(1, LENGTH, 1)  # token LENGTH + i predicts what stood at i
    return (shares[:, LENGTH:].topk(k).indices == true).any(-1).float().mean().item()


def read(model, data):
    """The recorded calls, the inputs of attention by name, and how many tokens of the answer are right, of 1."""
    inputs = {}
    for name, layer in model.named_modules():
        if name.endswith("self_attn"):
            layer.register_forward_pre_hook(
                lambda _, arguments, given, name=name: inputs.update({name: given["hidden_states"]}), with_kwargs=True
            )
    with torch.no_grad(), inspection.record(model, layers=state_space.recorder()) as calls:
        logits = model(data[:, :-1], use_cache=False).logits[:, LENGTH:]
    return calls, inputs, (logits.argmax(-1) == data[:, LENGTH + 1 :]).float().mean().item()


# %% Train, look, compare. The texts of the test are none of those in training.
data = texts(TESTS, 10**9)
names = [f"{token:x} " if token < VOCABULARY else "| " for token in data[0, :-1].tolist()]
print(f"seed {SEED}, {STEPS} steps, sources of {LENGTH} tokens")
print("model    right  layer  keys  recall at 1  at 4")
for arm, config in MODELS.items():
    start = time.process_time()
    model = train(config)
    seconds = time.process_time() - start
    calls, inputs, right = read(model, data)
    with torch.no_grad():
        for call in calls:
            shares = shares_of(call, model, inputs)
            numbers = f"{call.keys_per_query.mean():4.1f}  {recall(shares, 1):11.3f}  {recall(shares, 4):.3f}"
            print(f"{arm:7}  {right:5.3f}  {call.number:5}  {numbers}")
    title = f"{arm}, layer 1: a source of {LENGTH} tokens and its copy"
    plot.save_figure(plot.map_figure(calls[-1], title), OUT / f"map-{arm.lower()}.png")
    page.save_page(OUT / f"{arm.lower()}.html", names, calls, title=f"{arm} copies", note=f"right: {right:.3f}")
    print(f"         trained in {seconds:.0f} s of processor time")
print(f"\nmaps of the last layers, and a page of each model, are in {OUT}")
