"""What a call takes in memory beyond its inputs, output and gradients, by length.

python benchmarks/scratch.py takes seconds, and no GPU: sizes follow from the plan of a call. MiB of causal attention of
one batch row in bfloat16: in a forward pass without gradients, kept from the forward pass for the backward, and the
most in a training step. Beside them, what FlashAttention keeps: the logarithm of a sum for each query of each head, in
float32.

Where there is a GPU, the last three columns are measured, up to 131,072 tokens, on random inputs: the peak of a
training step, the same of scaled_dot_product_attention by cuDNN, and what that keeps.
"""

from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention
from flash_entmax.backends.triton.config import Outline
from flash_entmax.backends.triton.plan import Plan
from flash_entmax.backends.triton.reach import reach_shapes
from flash_entmax.core.call import Problem, ScoreOptions, VisibilityArgs
from flash_entmax.testing import iid_inputs

HEADS = (8, 8, 64), (32, 8, 128)  # heads, key heads, head size
LENGTHS = 8_192, 32_768, 131_072, 524_288, 1_048_576
LONGEST_MEASURED = 131_072
DTYPE, MIB = torch.bfloat16, 2**20
COLUMNS = "forward pass alone", "kept for the backward", "most in a step", "FlashAttention keeps"
MEASURED = "peak of a step", "peak of cuDNN's", "cuDNN keeps"


def main() -> None:
    columns = COLUMNS + MEASURED * torch.cuda.is_available()
    print("| heads | tokens | " + " | ".join(columns) + " |")
    print((len(columns) + 2) * "|---" + "|")
    for heads, key_heads, dim in HEADS:
        for length in LENGTHS:
            sizes = [*memory(heads, key_heads, dim, length), 4 * heads * length]
            if torch.cuda.is_available() and length <= LONGEST_MEASURED:
                peaks = [measured(call, heads, key_heads, dim, length) for call in (entmax, softmax)]
                sizes += [peaks[0][1], peaks[1][1], peaks[1][0]]
            name = f"{heads} of {dim}" if heads == key_heads else f"{heads}, {key_heads} of keys, of {dim}"
            print(f"| {name} | {length:,} | " + " | ".join(f"{size / MIB:,.0f}" for size in sizes) + " |", flush=True)


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


entmax = partial(entmax_attention, is_causal=True)


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def measured(call, heads: int, key_heads: int, dim: int, length: int) -> tuple[int, int]:
    """Bytes on the GPU beyond inputs, output and gradients: kept for the backward, and the most in a step."""
    inputs = iid_inputs(1, heads, length, dim, key_heads=key_heads, dtype=DTYPE, device="cuda")
    query, key, value = (tensor.requires_grad_() for tensor in inputs)
    grad_output = torch.randn_like(query)
    for _ in range(2):  # what the first call loads stays
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = call(query, key, value)
        kept = torch.cuda.memory_allocated() - before - output.nbytes
        gradients = torch.autograd.grad(output, (query, key, value), grad_output)
        most = torch.cuda.max_memory_allocated() - before
        most -= output.nbytes + sum(gradient.nbytes for gradient in gradients)
        del output, gradients
    return kept, most


if __name__ == "__main__":
    main()
