"""How evenly the two layouts of context parallelism share the work of a trained model's attention.

python benchmarks/imbalance.py FILES takes a few minutes on a CPU, and needs no group. Each file is one that
`flash-entmax bench --inputs` reads; the attention is causal, alpha 1.5, of the default scale. The work is counted, not
timed, for the whole sequence, and given to the ranks by their tiles of queries:

    visible  tiles that the queries see: the scan goes through them, but for those that a bound rules out
    live     tiles that hold a positive probability
    keys     keys that the queries of a tile attend to together: what the solve, the output and the gradient run over

A number is the work of the busiest rank over that of a mean rank. 1 is even, and a group waits for its busiest rank.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_entmax import Support, entmax_attention
from flash_entmax.distributed.layout import chunks, split

RANKS = 2, 4, 8
LAYOUTS = "contiguous", "balanced"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--length", type=int, help="only so many tokens, from the first")
    args = parser.parse_args()
    print("| inputs | ranks | layout | visible tiles | live tiles | keys |\n|---|---|---|---|---|---|")
    for file in args.files:
        tensors = {key.rpartition("."): tensor for key, tensor in load_file(file).items()}
        for name in sorted({name for name, _, _ in tensors}):
            inputs = [tensors[name, ".", role][:, :, : args.length].float() for role in ("query", "key", "value")]
            support = entmax_attention(*inputs, is_causal=True, return_support=True)[1]
            heads = inputs[0].shape[1]
            label = f"{name}, {heads} {'heads' if heads > 1 else 'head'}, {inputs[0].shape[2]:,} tokens"
            print_rows(label, support, inputs[0].shape[2])


def print_rows(label: str, support: Support, length: int) -> None:
    for ranks in RANKS:
        for layout in LAYOUTS:
            if length % (support.tile_shape[0] * len(chunks(ranks, layout)[0]) * ranks):
                raise SystemExit(f"{label}: tiles of {support.tile_shape[0]} queries do not fill {ranks} ranks evenly")
            ratios = [busiest_over_mean(work, ranks, layout) for work in work_of_tiles(support).values()]
            print(f"| {label} | {ranks} | {layout} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def work_of_tiles(support: Support) -> dict[str, Tensor]:
    """What each tile of queries has to do, of all heads."""
    tiles, (query_tile, key_tile) = support.tiles, support.tile_shape
    last_query = (torch.arange(tiles.shape[2]) + 1) * query_tile - 1
    return {
        "visible": (last_query // key_tile + 1).clamp_max(tiles.shape[3]).double(),
        "live": tiles.sum((0, 1, 3)).double(),
        "keys": support.keys.sum((0, 1)).double(),
    }


def busiest_over_mean(work: Tensor, ranks: int, layout: str) -> float:
    own = torch.stack([part.sum() for part in split(work, 0, ranks, layout)])
    return (own.max() / own.mean()).item()


if __name__ == "__main__":
    main()
