"""Steps on captured and on synthetic inputs beside cuDNN, and the time of every kernel.

python benchmarks/keys.py FILES takes a minute on a GPU. Each file is one that `flash-entmax bench --inputs` reads. One
head is taken ten times, and eight times beside itself as a head of twice the size, whose scores are the same. Synthetic
inputs are those of the benchmark, sparse by tile. Milliseconds are medians of 20 by CUDA events: of a step as a CUDA
graph and as called, and of a forward pass without gradients as a graph. There is a line for each input; all of it goes
to FOLDER/keys.json with --out FOLDER.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from derivatives import milliseconds
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from flash_entmax import entmax_attention
from flash_entmax.testing import iid_inputs, topic_inputs

TOPICS = 0, 2, 4, 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    conditions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(conditions, flush=True)
    rows = {}
    for file in args.files:
        for name, inputs, scale in captured(file):
            rows[name] = measured(name, inputs, scale)
    for topics in TOPICS:
        sizes, made = (1, 8, 32_768, 64), {"dtype": torch.bfloat16, "device": "cuda"}
        inputs = topic_inputs(*sizes, topics, **made) if topics else iid_inputs(*sizes, **made)
        name = f"{topics or 'no'} topics, 8 heads of 64, 32768 tokens"
        rows[name] = measured(name, inputs, None)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "keys.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))


def captured(file: Path) -> list[tuple[str, list[Tensor], float | None]]:
    """(name, query, key and value, scale) of what is made of one file."""
    tensors = load_file(file, "cuda")
    name = next(iter(tensors)).rpartition(".")[0]
    inputs = [tensors[f"{name}.{part}"].to(torch.bfloat16) for part in ("query", "key", "value")]
    length, dim = inputs[0].shape[2:]
    if inputs[0].shape[1] > 1:
        return [(f"{name}, {inputs[0].shape[1]} heads of {dim}, {length} tokens", inputs, None)]
    made = []
    for tokens in (length, length // 4):
        copies = [tensor[:, :, :tokens].expand(-1, 10, -1, -1).contiguous() for tensor in inputs]
        made.append((f"{name}, 10 copies of a head of {dim}, {tokens} tokens", copies, None))
    wide = [torch.cat((tensor, tensor), -1).expand(-1, 8, -1, -1).contiguous() for tensor in inputs]
    made.append((f"{name}, 8 copies of a head of {2 * dim}, {length} tokens", wide, 0.5 * dim**-0.5))
    return made


def measured(name: str, inputs: list[Tensor], scale: float | None) -> dict:
    """Times of both, densities, and the milliseconds of each kernel of a step."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    grad_output = torch.randn_like(query)

    def ours() -> Tensor:
        return entmax_attention(query, key, value, is_causal=True, scale=scale)

    def cudnn() -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)

    def step_of(attend: Callable[[], Tensor]) -> Callable[[], tuple]:
        return lambda: torch.autograd.grad(attend(), (query, key, value), grad_output)

    row = {}
    for label, attend in (("ours", ours), ("cudnn", cudnn)):
        row[label] = {"called": milliseconds(step_of(attend)), "graph": milliseconds(graphed(step_of(attend)))}
        with torch.no_grad():
            row[label]["forward"] = milliseconds(graphed(attend))
    row["ratio"] = {kind: row["ours"][kind] / row["cudnn"][kind] for kind in row["ours"]}
    row |= densities(query, key, value, scale) | {"kernels": kernels(step_of(ours))}
    times = (
        f"{kind} {ours:.3f}/{row['cudnn'][kind]:.3f}={row['ratio'][kind]:.3f}" for kind, ours in row["ours"].items()
    )
    print(f"{name}: tiles {row['tiles']:.3f} keys {row['keys']:.4f}  {'  '.join(times)}", flush=True)
    print("    " + " ".join(f"{kernel} {ms:.3f}" for kernel, ms in row["kernels"].items()), flush=True)
    return row


def densities(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> dict[str, float]:
    """Shares of the visible tiles that are live, and of the visible keys that the queries of a tile reach."""
    with torch.no_grad():
        _, support = entmax_attention(query, key, value, is_causal=True, scale=scale, return_support=True)
    keys = support.tile_shape[1]
    tiles = support.tiles.shape[2]
    visible = torch.arange(1, tiles + 1, dtype=torch.float64).sum().item() * support.tiles.shape[1]
    return {
        "tiles": support.tiles.sum().item() / visible,
        "keys": support.keys.sum().item() / (visible * keys),
        "keys_per_query": support.size.double().mean().item(),
    }


def kernels(step: Callable[[], tuple], steps: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel in a step, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / (1e3 * steps) for event in profiler.key_averages()}
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {name.removesuffix("_kernel"): ms for name, ms in ordered if name.endswith("_kernel")}


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """The function as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


if __name__ == "__main__":
    main()
