"""Decoding beside scaled_dot_product_attention: one query a head against many keys, without gradients.

python benchmarks/decode.py takes a minute. Inputs are those of testing.decoding_inputs: each query attends to 10 to 400
keys, far above the others. On a CPU, calls of both take turns, in two threads. On a GPU, both are CUDA graphs of
several calls, and scaled_dot_product_attention is the fastest of its backends; the time of the host to call each is
beside it, and the time of the same call on keys and values in pages of 16, in a random order. Milliseconds are medians.
The GB/s are the bytes of keys and values over the time: for flash-entmax, which reads few values, they are no
bandwidth. All of it goes to FOLDER/decode.json and FOLDER/decode.md with --out FOLDER.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from derivatives import host_microseconds, milliseconds
from keys import graphed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention, entmax_attention_paged
from flash_entmax.testing import decoding_inputs

INPUTS = "testing.decoding_inputs: 10 to 400 planted keys for each query, random keys and values otherwise"
THREADS = 2
BEYOND_CACHES = 2**28  # bytes
PAGE = 16  # keys
SDPA_BACKENDS = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


class Sizes(NamedTuple):
    """Of one row of the table."""

    batch: int
    keys: int
    heads: int = 32
    key_heads: int = 8
    dim: int = 128
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16


ON_CUDA = (Sizes(1, 8192), Sizes(1, 32_768), Sizes(1, 131_072), Sizes(16, 8192), Sizes(16, 32_768))
ON_CPU = tuple(
    Sizes(batch, 8192, 8, key_heads, 64, queries, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for batch, key_heads, queries in ((2, 8, 1), (1, 8, 1), (2, 2, 1), (2, 8, 16))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    name = torch.cuda.get_device_name() if args.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    conditions = {"device": name, "threads": THREADS, "torch": torch.__version__, "inputs": INPUTS}
    print(conditions, flush=True)
    rows = []
    for sizes in ON_CUDA if args.device == "cuda" else ON_CPU:
        rows.append(measured(sizes, args.device))
        print(line(rows[-1]), flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))
        head = "".join(f"{name}: {number}\n" for name, number in conditions.items())
        (args.out / "decode.md").write_text(f"{head}\n{HEAD}\n" + "\n".join(map(line, rows)) + "\n")


@torch.no_grad()
def measured(sizes: Sizes, device: str) -> dict:
    """Times of both, their quotient, and the keys that a query attends to."""
    batch, keys, heads, key_heads, dim, queries, dtype = sizes
    inputs = decoding_inputs(
        batch, heads, keys, dim, queries=queries, key_heads=key_heads, dtype=dtype, device=device, seed=1
    )
    size = entmax_attention(*inputs, return_support=True)[1].size.double()
    ours, theirs, *paged = (times_on_cuda if device == "cuda" else times_on_cpu)(*inputs)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in inputs[1:]) / 1e6
    return {
        **sizes._replace(dtype=str(dtype).removeprefix("torch."))._asdict(),
        "support": [size.min().item(), size.mean().item(), size.max().item()],
        "sdpa": theirs,
        "entmax": ours,
        "paged": paged[0] if paged else None,
        "quotient": ours / theirs,
        "sdpa_gb_per_s": moved / theirs,
        "entmax_gb_per_s": moved / ours,
        "host": [host_microseconds(partial(call, *inputs)) for call in (sdpa, entmax_attention) if device == "cuda"],
    }


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def times_on_cpu(query: Tensor, key: Tensor, value: Tensor, runs: int = 100) -> tuple[float, float]:
    """Median milliseconds of entmax_attention and of scaled_dot_product_attention, which take turns."""
    calls = [partial(function, query, key, value) for function in (entmax_attention, sdpa)]
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 5):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if run >= 5:
                own.append(1e3 * (time.perf_counter() - start))
    return median(times[0]), median(times[1])


def times_on_cuda(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, float, float]:
    """Median milliseconds of a call of entmax_attention in a CUDA graph, of the fastest SDPA, and of
    entmax_attention_paged.

    A graph has several calls, each on a copy of its own, as layers of a model have: no cache of the GPU holds them all.
    """
    size = 2 * key.numel() * key.element_size()
    copies = [tuple(tensor.clone() for tensor in (query, key, value)) for _ in range(max(1, BEYOND_CACHES // size))]
    theirs = []
    for backend in SDPA_BACKENDS:
        with suppress(RuntimeError), sdpa_kernel(backend):  # it has no kernel for these inputs
            theirs.append(time_of_graph(sdpa, copies))
    ours = time_of_graph(entmax_attention, copies)
    return ours, min(theirs), time_of_graph(entmax_attention_paged, [in_pages(*inputs) for inputs in copies])


def in_pages(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """(query, caches of keys and of values, block table, lengths): the same keys in pages, in a random order."""
    batch, heads, keys, dim = key.shape
    count = batch * keys // PAGE
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(key.device)
    caches = []
    for tensor in (key, value):
        pages = tensor.view(batch, heads, -1, PAGE, dim).permute(0, 2, 3, 1, 4).reshape(count, PAGE, heads, dim)
        caches.append(torch.empty_like(pages).index_copy_(0, order, pages))
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=key.device)
    return query, *caches, order.view(batch, -1).int(), lengths


def time_of_graph(attend: Callable[..., Tensor], copies: list[tuple[Tensor, ...]]) -> float:
    return milliseconds(graphed(lambda: [attend(*inputs) for inputs in copies])) / len(copies)


HEAD = (
    "| batch | keys | heads | head size | queries | dtype | keys of a query: least, mean, most | SDPA, ms | "
    "flash-entmax, ms | quotient | in pages, ms | SDPA, GB/s | flash-entmax, GB/s | host: SDPA, flash-entmax, us |\n"
    + 14 * "|---"
    + "|"
)


def line(row: dict) -> str:
    support = ", ".join(f"{number:.0f}" for number in row["support"])
    cells = (
        row["batch"], row["keys"], f"{row['heads']} / {row['key_heads']}", row["dim"], row["queries"], row["dtype"],
        support, f"{row['sdpa']:.3f}", f"{row['entmax']:.3f}", f"{row['quotient']:.2f}",
        "" if row["paged"] is None else f"{row['paged']:.3f}", f"{row['sdpa_gb_per_s']:.0f}",
        f"{row['entmax_gb_per_s']:.0f}", ", ".join(f"{number:.0f}" for number in row["host"]),
    )  # fmt: skip
    return "".join(f"| {cell} " for cell in cells) + "|"


if __name__ == "__main__":
    main()
