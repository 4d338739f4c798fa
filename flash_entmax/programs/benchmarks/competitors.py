"""Who is measured: ours and its peers. Each says why it cannot run a case, and how it is made ready for one.

Every competitor is called on the same tensors, (batch, heads, length, dim), causal, at the default scale.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention

from .cases import BenchCase
from .measure import Attend, step
from .settings import ADASPLASH, ALPHA, OURS, BenchSettings

Inputs = tuple[Tensor, Tensor, Tensor]
FLEX_BLOCK = 128
ADASPLASH_HEAD_SIZES = (16, 32, 64, 128, 256)
ADASPLASH_SHORTEST, ADASPLASH_LONGEST = 128, 32768
KEPT_CONFIGS = 2
DENSE_LONGEST = 8192
# How many float32 buffers (batch, heads, length, length) a step of dense entmax holds: scores, sorted scores, their
# 64-bit indices, the running sums of the sort, probabilities, and gradients of these.
DENSE_BUFFERS = 14


@dataclass(frozen=True)
class Ready:
    """A competitor that is ready for the cases of one shape.

    attend: the call that is timed, inside ``context()``.
    note: what a reader of its numbers must know.
    """

    attend: Attend
    note: str = ""
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Competitor:
    """``alpha`` says what it computes: 1 is softmax.

    ``why_not`` says why it cannot run a case, or nothing. ``prepare`` makes it ready for the shape of a case.
    """

    name: str
    alpha: float
    why_not: Callable[[BenchCase, BenchSettings], str]
    prepare: Callable[[BenchCase, Inputs], Ready]


def contestants(settings: BenchSettings) -> list[Competitor]:
    return [competitor for competitor in COMPETITORS if competitor.name in settings.names]


def nothing_against(case: BenchCase, settings: BenchSettings) -> str:
    return ""


def needs_cuda(case: BenchCase, settings: BenchSettings) -> str:
    return "" if settings.on_cuda else f"runs on NVIDIA GPUs, this run is on {settings.device.type}"


def prepare_ours(case: BenchCase, inputs: Inputs) -> Ready:
    return Ready(partial(entmax_attention, alpha=ALPHA, is_causal=True))


def prepare_softmax(case: BenchCase, inputs: Inputs, backend: str | None = None) -> Ready:
    """SDPA by one backend. If that refuses grouped heads, the timed call repeats keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context = nullcontext if backend is None else partial(sdpa_kernel, getattr(SDPBackend, backend))
    shared = case.group > 1
    attend = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=shared)
    if shared and not runs(attend, inputs, context):
        note = f"repeats keys and values {case.group} times inside the call: the backend refuses grouped heads"
        return Ready(partial(softmax_of_repeated, group=case.group), note, context)
    return Ready(attend, "", context)


def softmax_of_repeated(query: Tensor, key: Tensor, value: Tensor, group: int) -> Tensor:
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def runs(attend: Attend, inputs: Inputs, context: Callable[[], AbstractContextManager]) -> bool:
    """Whether a training step raises no RuntimeError."""
    with warnings.catch_warnings(), context():
        warnings.simplefilter("ignore")  # PyTorch warns of every reason that excludes a backend
        try:
            step(attend, inputs, torch.ones_like(inputs[0]))
        except RuntimeError:
            return False
    return True


def why_not_plain_sdpa(case: BenchCase, settings: BenchSettings) -> str:
    return "its backends are measured one by one on a GPU" if settings.on_cuda else ""


def why_not_flex(case: BenchCase, settings: BenchSettings) -> str:
    if reason := needs_cuda(case, settings):
        return reason
    if case.length % FLEX_BLOCK:
        return f"its causal block mask is built for lengths in multiples of {FLEX_BLOCK}, got {case.length}"
    return "" if find_spec("triton") else "the package triton is not installed"


def prepare_flex(case: BenchCase, inputs: Inputs) -> Ready:
    """Compiled for this one shape. Earlier graphs are dropped, because PyTorch compiles only so many of a function."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    mask = causal_block_mask(case.length, inputs[0].device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return Ready(partial(compiled, block_mask=mask, enable_gqa=case.group > 1), "compiled for each shape")


def causal_block_mask(length: int, device: torch.device):
    """The BlockMask of create_block_mask for the causal mask, without its length x length intermediate.

    In row i of blocks, the mask cuts block i, and blocks 0 to i - 1 are full.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = length // FLEX_BLOCK
    numbers = torch.arange(blocks, dtype=torch.int32, device=device)
    partial_count = torch.ones_like(numbers)
    partial_blocks = numbers.unsqueeze(-1).expand(blocks, blocks)
    full_blocks = numbers.expand(blocks, blocks)
    return BlockMask.from_kv_blocks(
        partial_count[None, None],
        partial_blocks[None, None].contiguous(),
        numbers[None, None],
        full_blocks[None, None].contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_visible,
        seq_lengths=(length, length),
    )


def is_visible(batch, head, row, key):
    return row >= key


def why_not_adasplash(case: BenchCase, settings: BenchSettings) -> str:
    if reason := needs_cuda(case, settings):
        return reason
    if find_spec("adasplash") is None:
        return "the package adasplash is not installed"
    if case.length & (case.length - 1) or case.length < ADASPLASH_SHORTEST:
        return f"takes powers of two from {ADASPLASH_SHORTEST}, got length {case.length}"
    if case.length > ADASPLASH_LONGEST:
        return f"tunes for minutes at lengths over {ADASPLASH_LONGEST:,}, got {case.length:,}"
    if case.head_size not in ADASPLASH_HEAD_SIZES:
        return f"takes head sizes {', '.join(map(str, ADASPLASH_HEAD_SIZES))}, got {case.head_size}"
    wide_and_common = case.head_size == 128 and case.length not in settings.grid.shared_lengths
    if (case.group > 1 or wide_and_common) and ADASPLASH not in settings.asked:
        return f"compiles for half a minute at each shape; name it with --only to have it at {case.heads_by_size} too"
    return ""


def prepare_adasplash(case: BenchCase, inputs: Inputs) -> Ready:
    module = import_module("adasplash.adasplash_v2")
    return Ready(module.sparse_attn, prune(vars(module)))


def prune(names: dict[str, object]) -> str:
    """Leave KEPT_CONFIGS configurations to every tuned kernel of a module, and say so in words.

    Tuning over all of them takes minutes for each length.
    """
    from triton.runtime.autotuner import Autotuner

    kernels = {name: thing for name, thing in names.items() if isinstance(thing, Autotuner)}
    for kernel in kernels.values():
        kernel.offered = getattr(kernel, "offered", len(kernel.configs))
        kernel.configs = two_of(kernel.configs)
    by_count = {}
    for name, kernel in kernels.items():
        by_count.setdefault(kernel.offered, []).append(name)
    pruned = (f"{KEPT_CONFIGS} of {count} ({', '.join(found)})" for count, found in by_count.items())
    return f"configs pruned to {'; '.join(pruned)}"


def two_of(configs: list) -> list:
    """Those with 4 warps, 2 or 3 stages and tiles of 128 queries and 64 keys; the first two if fewer are like that."""
    tiles = {"BLOCK_M": 128, "BLOCK_N": 64}
    fitting = [
        config
        for config in configs
        if config.num_warps == 4
        and config.num_stages in (2, 3)
        and all(config.kwargs.get(name, size) == size for name, size in tiles.items())
    ]
    return (fitting if len(fitting) >= KEPT_CONFIGS else configs)[:KEPT_CONFIGS]


def why_not_dense(case: BenchCase, settings: BenchSettings) -> str:
    if find_spec("entmax") is None:
        return "the package entmax is not installed"
    if case.length > DENSE_LONGEST:
        return f"its dense scores are measured up to length {DENSE_LONGEST:,}, got {case.length:,}"
    needed, free = DENSE_BUFFERS * 4 * case.batch * case.heads * case.length**2, free_memory(settings.device)
    if needed > free:
        return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    if not settings.on_cuda:
        return ""
    if case.group > 1:
        return "repeats the keys of grouped heads, and so takes as long as without groups"
    first = next(other for other in settings.cases if other.shape == case.shape)
    return "" if case == first else f"takes the same time at any sparsity: measured with {first.inputs} only"


def free_memory(device: torch.device) -> float:
    """In bytes, with what PyTorch's allocator holds without using it. Infinite if it is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    import os

    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return float("inf")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def prepare_dense(case: BenchCase, inputs: Inputs) -> Ready:
    return Ready(dense_entmax, "scores in float32: rounded to 16 bits, they have another support")


def dense_entmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """entmax15 of the package entmax, which sorts exactly, over all scores."""
    from entmax import entmax15

    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query.float() @ key.float().mT) * query.shape[-1] ** -0.5
    return entmax15(scores.masked_fill_(hidden, -torch.inf), dim=-1).to(value.dtype) @ value


COMPETITORS = (
    Competitor(OURS, ALPHA, nothing_against, prepare_ours),
    Competitor(
        "flash-attention-2",
        1.0,
        needs_cuda,
        partial(prepare_softmax, backend="FLASH_ATTENTION"),
    ),
    Competitor("cudnn", 1.0, needs_cuda, partial(prepare_softmax, backend="CUDNN_ATTENTION")),
    Competitor("flex-attention", 1.0, why_not_flex, prepare_flex),
    Competitor(ADASPLASH, ALPHA, why_not_adasplash, prepare_adasplash),
    Competitor("sdpa", 1.0, why_not_plain_sdpa, prepare_softmax),
    Competitor("dense-entmax", ALPHA, why_not_dense, prepare_dense),
)
