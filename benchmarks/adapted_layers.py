"""What the attention of adapted models costs beside cuDNN: every layer, and whole training steps, at several lengths.

python benchmarks/adapted_layers.py MODEL [MODEL ...] --out FOLDER, on a GPU, after `flash-entmax recipe adapt`. Each
MODEL is a folder that the recipe saved with entmax, of a model whose layers are called as Llama's. Layers are timed on
what they attend to in one window of held-out prose. A training step is that of the recipe, of one window: forward,
backward, clipping, and AdamW with a rate of 0. Softmax has the same weights, and the two take turns, ROUNDS times. The
median of all is shown, and the medians of the rounds say how steady it is. At short lengths a step waits for the host.
Lengths beyond those that the model was made for show how time grows, not what a model for such lengths attends to.
Lines are printed as they come, and FOLDER/adapted-layers.json has all of them. On a CPU it takes the tiny models of
`--size toy`, with --lengths 64 128.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from statistics import mean, median

import layer_times
import torch
import triton
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_entmax import __version__, inspection
from flash_entmax.integrations.transformers import register
from flash_entmax.programs.demo.text import HOLD_OUT
from flash_entmax.programs.demo.train import precision
from flash_entmax.programs.recipes.adapt.settings import SIZES
from flash_entmax.programs.recipes.adapt.training import add_gradients
from flash_entmax.programs.recipes.documents import english_documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CUDA = DEVICE == "cuda"
ROUNDS = 3
LEFT_OUT = "tile_density_by_head", "key_density_by_head"


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, help="prose, as for the recipe; default: documents of this machine")
    parser.add_argument(
        "--characters", type=int, default=26_000_000, help="of prose that are read (default: %(default)s)"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2_048, 8_192, 32_768], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=9, help="of each time; medians are shown (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="which ones are timed (default: all)")
    parser.add_argument("--no-steps", action="store_true", help="layers alone, no training steps")
    parser.add_argument("--out", type=Path, default=Path("out/adapted-layers"), metavar="FOLDER")
    args = parser.parse_args(arguments)
    register()
    found = {"conditions": conditions(args), "models": {}}
    print(found["conditions"], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in args.models:
        model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
        alpha, rows = model.config.entmax_alpha, found["models"].setdefault(str(folder), {})
        ids = held_out(args, AutoTokenizer.from_pretrained(folder))
        for length in args.lengths:
            rows[length] = {"alpha": alpha, **measured(model, ids[:length], args)}
            print(f"{folder} {length}: {words(rows[length])}", flush=True)
            (args.out / "adapted-layers.json").write_text(json.dumps(found, indent=1))
        del model
    return found


def conditions(args: argparse.Namespace) -> dict:
    return {
        "device": torch.cuda.get_device_name() if ON_CUDA else "cpu",
        "flash-entmax": __version__, "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(), "text": str(args.text), "repeats": args.repeats,
    }  # fmt: skip


def held_out(args: argparse.Namespace, tokenizer) -> Tensor:
    """(tokens,) int64 of documents that the recipe holds out."""
    ids: list[int] = []
    for text in english_documents(args.characters, args.text)[HOLD_OUT - 1 :: HOLD_OUT]:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= max(args.lengths):
            return torch.tensor(ids, device=DEVICE)
    raise SystemExit(f"the held-out prose has {len(ids):,} tokens, and {max(args.lengths):,} are needed (--text)")


def measured(model: nn.Module, ids: Tensor, args: argparse.Namespace) -> dict:
    layers = {}
    for number, (density, inputs) in captured(model, ids, args.layers).items():
        layers[number] = density | layer_times.timed(inputs, model.config.entmax_alpha, args.repeats)
    rows = list(layers.values())
    quantities = "keys_per_query", "tile_density", "key_density"
    found = {
        "means": {quantity: mean(row[quantity] for row in rows) for quantity in quantities},
        "summary": layer_times.summary(rows),
        "kernels_ms": sums(row.get("kernels", {}) for row in rows),
    }
    if not args.no_steps:
        found["step_ms"] = steps(model, ids, args.repeats)
    return found | {"layers": layers}


def sums(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of all layers, by kernel, the longest first."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row)
    return dict(total.most_common())


def steps(model: nn.Module, ids: Tensor, repeats: int) -> dict[str, dict]:
    """{"entmax" and "softmax": {"median": milliseconds, "rounds": medians of the rounds}}, softmax by cuDNN."""
    times: dict[str, list[list[float]]] = {"entmax": [], "softmax": []}
    model.train()
    for _ in range(ROUNDS):
        times["entmax"].append(step_times(model, ids, repeats))
        model.set_attn_implementation("sdpa")
        with layer_times.cudnn(ON_CUDA):
            times["softmax"].append(step_times(model, ids, repeats))
        model.set_attn_implementation("entmax")
    model.eval()
    return {
        name: {"median": median(chain(*rounds)), "rounds": [median(each) for each in rounds]}
        for name, rounds in times.items()
    }


@torch.no_grad()
def captured(model: nn.Module, ids: Tensor, only: list[int] | None) -> dict[int, tuple[dict, tuple[Tensor, ...]]]:
    """{layer: (densities, (query, key, value) in bfloat16)}; tensors (1, heads, length, head size)."""
    attention = {f"model.layers.{number}.self_attn": number for number in range(len(model.model.layers))}
    wanted = {name for name, number in attention.items() if only is None or number in only}
    values: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).v_proj.register_forward_hook(
            lambda module, inputs, output, name=name: values.__setitem__(name, output)
        )
        for name in wanted
    ]
    with precision(ids.device), inspection.record(model, only=wanted.__contains__) as calls:
        model.model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {}
    for call in calls:
        value = values[call.name].unflatten(-1, (call.problem.key_heads, -1)).transpose(1, 2)
        density = {name: number for name, number in layer_times.densities(call).items() if name not in LEFT_OUT}
        found[attention[call.name]] = density, tuple(tensor.contiguous() for tensor in (*call.inputs, value))
    return found


def step_times(model: nn.Module, ids: Tensor, repeats: int) -> list[float]:
    """Milliseconds of whole training steps, after four that do not count; the weights stay as they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    times = []
    for _ in range(repeats + 4):
        start = time.perf_counter()
        optimizer.zero_grad()
        add_gradients(model, ids[None], SIZES["full"], None)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ON_CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    optimizer.zero_grad()
    return times[4:]


def words(row: dict) -> str:
    shown = [f"alpha {row['alpha']:g}"] + [f"{name} {number:.4g}" for name, number in row["means"].items()]
    shown += [f"{kind} {m['of_sums']:.3f} (worst {m['worst']:.3f})" for kind, m in row["summary"].items()]
    shown += [f"{kernel} {ms:.2f} ms" for kernel, ms in list(row["kernels_ms"].items())[:6]]
    if "step_ms" in row:
        ours, theirs = (row["step_ms"][name]["median"] for name in ("entmax", "softmax"))
        shown.append(f"training step {ours:.1f} / {theirs:.1f} = {ours / theirs:.3f}")
    return ", ".join(shown)


if __name__ == "__main__":
    main()
