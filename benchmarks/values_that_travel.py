"""How many values would have to travel, if those of keys to which no query of a rank attends stayed where they are.

python benchmarks/values_that_travel.py FILES takes minutes on a CPU, and needs no group. Each file is one that
`flash-entmax bench --inputs` reads; the attention is causal, alpha 1.5, of the default scale. Context parallelism that
gathers sends every value to every rank. A value must travel to a rank if one of its queries, of any head that shares
the key head, gives the key a positive probability.

    values   share of the values of other ranks that a mean rank must have
    busiest  the same, of the rank that must have most
    forward  bytes received, over those of gathering all keys and values: all keys, the values that must travel, and one
             bit for each key, head and pair of ranks to ask for them; 16-bit elements
    backward bytes received, over those of exchanging all gradients: only keys with a positive probability have one
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_entmax import entmax_attention
from flash_entmax.distributed.layout import split

RANKS = 2, 4, 8
LAYOUTS = "contiguous", "balanced"
ROWS = 512  # queries at a time
ELEMENT = 16  # bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--length", type=int, help="only so many tokens, from the first")
    args = parser.parse_args()
    print("| inputs | ranks | layout | values | busiest | forward | backward |\n|---|---|---|---|---|---|---|")
    for file in args.files:
        tensors = {key.rpartition("."): tensor for key, tensor in load_file(file).items()}
        for name in sorted({name for name, _, _ in tensors}):
            inputs = [tensors[name, ".", role][:, :, : args.length].float() for role in ("query", "key", "value")]
            (_, heads, length, _), key_heads = inputs[0].shape, inputs[1].shape[1]
            label = f"{name}, {heads} heads, {key_heads} of keys, {length:,} tokens"
            print_rows(label, reached(*inputs), inputs[1].shape[3], inputs[2].shape[3])


def reached(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(key heads, groups of ROWS queries, keys) bool: whether some query of the group attends to the key."""
    support = entmax_attention(query, key, value, is_causal=True, return_support=True)[1]
    (_, heads, length, size), key_heads = query.shape, key.shape[1]
    found = torch.zeros(key_heads, length // ROWS, length, dtype=torch.bool)
    for head in range(heads):
        own = key[0, head // (heads // key_heads)]
        for first in range(0, length, ROWS):
            rows = slice(first, first + ROWS)
            z = query[0, head, rows] @ own[: first + ROWS].T * (0.5 * size**-0.5)
            z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(first + 1), -torch.inf)
            above = (z > support.tau[0, head, rows, None]).any(0)
            found[head // (heads // key_heads), first // ROWS, : first + ROWS] |= above
    return found


def print_rows(label: str, found: Tensor, key_size: int, value_size: int) -> None:
    length = found.shape[2]
    for ranks in RANKS:
        for layout in LAYOUTS:
            groups = split(torch.arange(found.shape[1]), 0, ranks, layout)
            tokens = split(torch.arange(length), 0, ranks, layout)
            shares = []
            for rank in range(ranks):
                others = torch.cat([own for other, own in enumerate(tokens) if other != rank])
                shares.append(found[:, groups[rank]].any(1)[:, others].double().mean().item())
            mean = sum(shares) / ranks
            sizes = key_size + value_size
            forward, backward = (key_size + mean * value_size + 1 / ELEMENT) / sizes, mean + 1 / ELEMENT / sizes
            figures = " | ".join(f"{figure:.2f}" for figure in (mean, max(shares), forward, backward))
            print(f"| {label} | {ranks} | `{layout}` | {figures} |", flush=True)


if __name__ == "__main__":
    main()
