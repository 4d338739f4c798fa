"""What every option costs, compared with the plain causal call: python benchmarks/options.py takes a minute on a GPU.

Topics of 32,768 tokens, 8 heads of 64, bfloat16. Medians of 15 calls; the forward pass runs without gradients. Times
under 3 ms are mostly those of the host, which launches the kernels.
"""

import torch
import triton

from flash_entmax import __version__, entmax_attention, entmax_attention_varlen
from flash_entmax.programs.benchmarks.measure import event_ms
from flash_entmax.testing import topic_inputs

LENGTH, HEADS, DIM = 32768, 8, 64


def median_ms(call) -> float:
    for _ in range(4):
        call()
    return sorted(event_ms(call) for _ in range(15))[7]


def row(name: str, attend, *leaves: torch.Tensor) -> None:
    """Print the time of a training step, with gradients of all leaves, and of the forward pass."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    grad_output = torch.randn_like(attend(*leaves))
    step = median_ms(lambda: torch.autograd.grad(attend(*leaves), leaves, grad_output))
    with torch.no_grad():
        forward = median_ms(lambda: attend(*leaves))
    print(f"{name:32} step {step:7.3f} ms   forward {forward:7.3f} ms", flush=True)


def rectangle(topics: int) -> None:
    """All options of a batch of equal lengths."""
    tensors = topic_inputs(1, HEADS, LENGTH, DIM, topics, dtype=torch.bfloat16, device="cuda")
    alibi_slopes = 2.0 ** -torch.arange(1, HEADS + 1, device="cuda")
    key_mask = torch.arange(LENGTH, device="cuda")[None] >= 1000
    options = {
        "causal": {},
        "causal, as intervals": {"query_positions": 0, "window_size": (LENGTH, -1)},
        "window 4096": {"window_size": (4096, -1)},
        "window 512": {"window_size": (512, -1)},
        "key mask": {"key_mask": key_mask},
        "softcap 50": {"softcap": 50.0},
        "alpha 1.49999": {"alpha": 1.49999},
        "alpha 1.1": {"alpha": 1.1},
        "alpha 1.75": {"alpha": 1.75},
        "alpha 2": {"alpha": 2.0},
    }
    print(f"block sparsity about {1 - 1 / topics:.2f}, causal")
    for name, option in options.items():
        row(name, lambda *qkv, option=option: entmax_attention(*qkv, is_causal=True, **option), *tensors)
    row(
        "ALiBi, learned",
        lambda *qkv: entmax_attention(*qkv[:3], is_causal=True, alibi_slopes=qkv[3]),
        *tensors,
        alibi_slopes,
    )
    alphas = torch.full((HEADS,), 1.5, device="cuda")
    row(
        "alpha by head, learned",
        lambda *qkv: entmax_attention(*qkv[:3], is_causal=True, alpha=qkv[3]),
        *tensors,
        alphas,
    )


def packed(length: int) -> None:
    """Packed sequences of one length, LENGTH tokens in all."""
    tensors = topic_inputs(1, HEADS, LENGTH, DIM, 1, dtype=torch.bfloat16, device="cuda")
    tensors = [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]
    boundaries = torch.arange(0, LENGTH + 1, length, dtype=torch.int32, device="cuda")
    sequences = boundaries, None, length, length
    row(
        f"packed, {LENGTH // length} x {length}",
        lambda *qkv: entmax_attention_varlen(*qkv, *sequences, is_causal=True),
        *tensors,
    )


def main() -> None:
    versions = f"flash-entmax {__version__}, torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, {LENGTH} tokens, {HEADS} heads of {DIM}, bfloat16")
    for topics in (1, 4, 20):
        rectangle(topics)
    print("every key attended to, causal")
    for length in (2048, 128):
        packed(length)
    batch = topic_inputs(LENGTH // 2048, HEADS, 2048, DIM, 1, dtype=torch.bfloat16, device="cuda")
    row("batch, 16 x 2048", lambda *qkv: entmax_attention(*qkv, is_causal=True), *batch)


if __name__ == "__main__":
    main()
