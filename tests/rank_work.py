"""What the ranks of tests of flash_entmax.distributed do: each function runs on every rank, with its group first."""

import os
import time

import torch
from rank_pool import RANKS, TIMEOUT
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from flash_entmax.distributed import context_parallel_attention, decode_sharded, positions, shard, unshard

INPUTS = "query", "key", "value", "grad_output"
SHARDED = "query", "key", "value", "key_mask"
LEARNED = "query", "key", "value", "alpha", "scale", "alibi_slopes"


def leaves(tensors: dict) -> dict:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def attention(group, tensors: dict, options: dict, combinations) -> list[dict]:
    """Own positions, own part of the output, and gradients; for each (method, layout)."""
    return [one_attention(group, tensors, {**options, "method": m, "layout": n}) for m, n in combinations]


def one_attention(group, tensors: dict, options: dict) -> dict:
    layout = options["layout"]
    parts = {name: shard(tensors[name], 2, group, layout) for name in INPUTS}
    options = dict(options)
    if "key_mask" in options:
        options["key_mask"] = shard(options["key_mask"], 1, group, layout)
    attend = context_parallel_attention
    if backend := options.pop("compiled", None):
        torch._dynamo.reset()
        attend = torch.compile(attend, backend=backend, fullgraph=True)
    learned = {name: option for name, option in options.items() if name in LEARNED and torch.is_tensor(option)}
    own = leaves({name: parts[name] for name in LEARNED[:3]} | learned)
    output = attend(**own, **{k: o for k, o in options.items() if k not in own}, group=group)
    output.backward(parts["grad_output"])
    gradients = {name: tensor.grad for name, tensor in own.items()}
    length = tensors["query"].shape[2]
    return {"positions": positions(length, group, layout), "output": output.detach(), **gradients}


def forward(group, by_rank: list[dict] | None = None, **options) -> torch.Tensor:
    """A call on inputs of ones, whose options a rank may have otherwise."""
    options = {"length": 8, "heads": 4, "dtype": torch.float32} | options
    options |= by_rank[distributed.get_rank(group)] if by_rank else {}
    heads = options.pop("heads")
    shape, dtype = (1, heads, options.pop("length"), 4), options.pop("dtype")
    query = torch.ones(shape, dtype=dtype)
    key = options.pop("key", query)
    if "mesh" in options:
        group = DeviceMesh("cpu", options.pop("mesh"))
    return context_parallel_attention(query, key, query, group=options.pop("group", group), **options)


def called(group, tensors: dict, is_checkpoint: bool) -> dict:
    """Output and gradients of the same call: as it is, or in a checkpoint."""

    def run(query, key, value):
        return 2 * context_parallel_attention(query + 0, key, value, group=group, is_causal=True)

    own = leaves({name: shard(tensors[name], 2, group) for name in LEARNED[:3]})
    output = checkpoint(run, *own.values(), use_reentrant=False) if is_checkpoint else run(*own.values())
    output.backward(shard(tensors["grad_output"], 2, group))
    return {"output": output.detach(), **{name: tensor.grad for name, tensor in own.items()}}


def layouts(group, length: int) -> dict:
    return {layout: positions(length, group, layout) for layout in ("balanced", "contiguous")}


def round_trip(group, whole: torch.Tensor, dim: int, layout: str):
    """The whole again, the gradient of the whole through `shard`, and that of the part through `unshard`."""
    rank = distributed.get_rank(group)
    back = unshard(shard(whole, dim, group, layout), dim, group, layout)
    if not whole.is_floating_point():
        return back, None, None, positions(whole.shape[dim], group, layout)
    leaf = whole.clone().requires_grad_()
    shard(leaf, dim, group, layout).sum().backward()
    part = shard(whole, dim, group, layout).requires_grad_()
    (unshard(part, dim, group, layout) * whole * (rank + 1)).sum().backward()
    return back, leaf.grad, part.grad, positions(whole.shape[dim], group, layout)


def sum_of(group, numbers: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of one number from each, as a gradient."""
    part = torch.ones(1, dtype=numbers.dtype, requires_grad=True)
    (unshard(part, 0, group, "contiguous") * numbers[distributed.get_rank(group)]).sum().backward()
    return part.grad


def dtypes_of(group, tensors: dict, dtype: torch.dtype, under_autocast: bool, method: str):
    """Output and gradients of inputs of this dtype, or of float32 inputs under autocast."""
    own = {name: shard(tensor, 2, group).to(torch.float32 if under_autocast else dtype) for name, tensor in
           tensors.items()}  # fmt: skip
    grad_output = own.pop("grad_output").to(dtype)
    own = leaves(own)
    with torch.autocast("cpu", dtype, enabled=under_autocast):
        output = context_parallel_attention(**own, group=group, method=method, is_causal=True)
    output.backward(grad_output)
    return {"output": output.detach(), **{name: tensor.grad for name, tensor in own.items()}}


def decode(
    group, tensors: dict, options: dict, edges: list[int] | None = None, overlap: int = 0
) -> torch.Tensor:  # fmt: skip
    """The output of the whole query against this rank's keys: those between its edges, or its chunk."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    length, options = tensors["key"].shape[2], dict(options)
    edges = edges or [length * r // size for r in range(size + 1)]
    own = slice(edges[rank], edges[rank + 1] + overlap)
    if "first_key" in options:
        options["first_key"] = own.start
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][:, own]
    key, value = tensors["key"][:, :, own], tensors["value"][:, :, own]
    return decode_sharded(tensors["query"], key, value, group=group, **options)


def refused_decode(group, **options):
    query = torch.ones(1, 4, 1, 4, requires_grad=options.pop("requires_grad", False))
    return decode_sharded(query, query[:, :, :0], query[:, :, :0], group=group, **options)


def one_missing(group, how: str, check_ranks: bool) -> float | None:
    """The last rank raises, sleeps, or ends instead of its call: seconds until the others have an error."""
    impatient = distributed.new_group(list(range(RANKS)), timeout=TIMEOUT)
    begin = time.perf_counter()
    if distributed.get_rank() == RANKS - 1:
        if how == "raises":
            raise ZeroDivisionError("before its call")
        if how == "sleeps":
            time.sleep(2 * TIMEOUT.total_seconds())
            return None
        os._exit(1)
    try:
        forward(impatient, check_ranks=check_ranks)
    except RuntimeError:
        return time.perf_counter() - begin
    return None
