"""What a call takes in memory beyond its inputs, output and gradients, by length.

python benchmarks/scratch.py takes seconds, and no GPU: sizes follow from the plan of a call. MiB of causal attention of
one batch row in bfloat16: in a forward pass without gradients, kept from the forward pass for the backward, and the
most in a training step. Beside them, what FlashAttention keeps: the logarithm of a sum for each query of each head, in
float32.
"""

from math import prod

import torch

from flash_entmax.backends.triton.plan import Plan
from flash_entmax.backends.triton.reach import reach_shapes
from flash_entmax.backends.triton.schedule import Outline
from flash_entmax.core.call import Problem, ScoreOptions, VisibilityArgs

HEADS = (8, 8, 64), (32, 8, 128)  # heads, key heads, head size
LENGTHS = 8_192, 32_768, 131_072, 524_288, 1_048_576
DTYPE, MIB = torch.bfloat16, 2**20


def main() -> None:
    print("| heads | tokens | forward pass alone | kept for the backward | most in a step | FlashAttention keeps |")
    print(6 * "|---" + "|")
    for heads, key_heads, dim in HEADS:
        for length in LENGTHS:
            sizes = (*memory(heads, key_heads, dim, length), 4 * heads * length)
            name = f"{heads} of {dim}" if heads == key_heads else f"{heads}, {key_heads} of keys, of {dim}"
            print(f"| {name} | {length:,} | " + " | ".join(f"{size / MIB:,.0f}" for size in sizes) + " |")


def memory(heads: int, key_heads: int, dim: int, length: int) -> tuple[int, int, int]:
    """Bytes: of a forward pass alone, kept for the backward, and the most in a step."""
    query, value = (torch.Size((1, n, length, dim)) for n in (heads, key_heads))
    visibility = VisibilityArgs(None, None, None, is_causal=True, max_visible_span=length)
    problem = Problem.of(query, value, ScoreOptions(1.5, dim**-0.5), visibility)
    alone, step = (Plan(Outline.of(problem, DTYPE, needs_backward)) for needs_backward in (False, True))
    words = 4 * sum(map(prod, reach_shapes(problem, DTYPE)))
    kept = heads * length * (dim * DTYPE.itemsize + 8) + words  # O1, maximum and offset; what is reached
    most = max(step.forward_scratch.size + 4 * step.chunk_words, step.backward_scratch.size)
    return alone.forward_scratch.size + 4 * alone.chunk_words, kept, kept + most


if __name__ == "__main__":
    main()
