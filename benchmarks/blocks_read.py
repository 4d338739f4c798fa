"""How many blocks of keys a new token must read, where a bound of each block's scores is kept beside the cache.

python benchmarks/blocks_read.py FILES takes a minute on a CPU. Each file is one that `flash-entmax bench --inputs`
reads: query, key and value of trained attention. At each length, the last 64 queries stand for new tokens. A block is
read if its bound is above the query's threshold tau, which is taken as known: no order of reading can read less. Two
bounds are counted, and the blocks that do hold support:

    centre and radius   score <= scale (q c + |q| r)                              the one that KeySummaries keeps
    extremes            score <= scale sum_d max(q_d lowest_d, q_d highest_d)     of each dimension
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_entmax.core.threshold import threshold_by_sort

ALPHA, QUERIES, BLOCKS, SHORTEST = 1.5, 64, (16, 64), 1024
HEAD = "| input | keys | keys of a block | by centre and radius | by extremes | with support |\n" + 6 * "|---" + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(HEAD)
    rows = []
    for file in args.files:
        tensors = load_file(file)
        name = next(iter(tensors)).rpartition(".")[0]
        query, key = (tensors[f"{name}.{part}"].double() for part in ("query", "key"))
        length = SHORTEST
        while length <= key.shape[2]:
            for size in BLOCKS:
                rows.append({"input": name, "keys": length, "block": size} | shares(query, key, length, size))
                print(line(rows[-1]), flush=True)
            length *= 2
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "blocks_read.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


def shares(query: Tensor, key: Tensor, length: int, size: int) -> dict[str, float]:
    """Of the blocks that a query sees, the part that it reads: by each bound, and because of its support."""
    q = query[:, :, length - QUERIES : length]
    k = key[:, :, :length].repeat_interleave(query.shape[1] // key.shape[1], 1)
    factor = (ALPHA - 1) * query.shape[-1] ** -0.5
    seen = torch.ones(QUERIES, length, dtype=torch.bool).tril(length - QUERIES)
    z = (factor * q @ k.mT).masked_fill(~seen, -torch.inf)
    maximum, offset = threshold_by_sort(z, ALPHA)
    tau = (maximum - offset).unsqueeze(-1)
    blocks = k.unflatten(2, (-1, size))
    centre = blocks.mean(3)
    radius = (blocks - centre.unsqueeze(3)).norm(dim=-1).amax(-1)
    highest, lowest = blocks.amax(3), blocks.amin(3)
    bounds = {
        "centre and radius": q @ centre.mT + q.norm(dim=-1, keepdim=True) * radius.unsqueeze(2),
        "extremes": q.clamp_min(0) @ highest.mT + q.clamp_max(0) @ lowest.mT,
    }
    seen = seen.unflatten(1, (-1, size)).any(-1).expand_as(bounds["extremes"])
    read = {name: factor * bound > tau for name, bound in bounds.items()}
    read["support"] = (z > tau).unflatten(-1, (-1, size)).any(-1)
    assert not (read["support"] & ~(read["extremes"] & read["centre and radius"])).any()
    return {name: (marks & seen).sum().item() / seen.sum().item() for name, marks in read.items()}


def line(row: dict) -> str:
    numbers = " | ".join(f"{100 * row[name]:.1f} %" for name in ("centre and radius", "extremes", "support"))
    return f"| {row['input']} | {row['keys']:,} | {row['block']} | {numbers} |"


if __name__ == "__main__":
    main()
