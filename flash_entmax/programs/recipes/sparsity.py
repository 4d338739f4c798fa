"""How sparse is the attention of models that were trained with entmax, by layer, head and length?

AdaSplash-2 (arXiv 2604.15180) says that block sparsity of 60 % and more "often occurs" at long context. This looks at
the models of the recipe language-model on held-out text: the share of visible 64 x 64 tiles without any probability,
which is what the kernels skip, and the keys that a query attends to. The queries, keys and values of one model are
written to files, which `flash-entmax bench --inputs FILE` times beside its own.
"""

from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from flash_entmax import inspection

from ..demo.text import even_windows
from ..demo.train import precision
from ..errors import CommandError
from . import Options, language_model, training
from .report import over_seeds
from .results import conditions, load, save
from .runs import Run, chosen_runs

NAME = "language-model"
LENGTHS = {"toy": (64, 128), "small": (256, 512, 1024, 2048), "full": (2048, 4096, 8192, 16_384, 32_768)}
WINDOWS = {"toy": 2, "small": 4, "full": 4}
CAPTURED = "entmax 1.5, RoPE"  # no bias on its scores: the benchmark's peers can take its queries and keys
CAPTURED_LENGTHS = {"toy": (128,), "small": (2048,), "full": (8192, 32_768)}


def run(options: Options) -> None:
    console = Console(highlight=False)
    found = {
        each.key: {str(length): sparsity_of(each, length) for length in LENGTHS[options.size]}
        for each in trained(options)
        if "entmax" in each.arm.lower()
    }
    path = options.out / f"sparsity-{options.size}.json"
    captured = [capture(options, length) for length in CAPTURED_LENGTHS[options.size]]
    save(path, {"conditions": conditions("sparsity", options), "models": found})
    for quantity, title, shown in (
        ("block_sparsity", "block sparsity, %", lambda value: f"{100 * value:.0f}"),
        ("keys_per_query", "keys per query", lambda value: f"{value:.1f}"),
    ):
        console.print(table(found, quantity, title, shown))
    console.print(f"{path}, {draw(found, path.with_suffix('.png'))}", soft_wrap=True)
    console.print(f"to time these: flash-entmax bench --inputs {' '.join(map(str, captured))}", soft_wrap=True)


def trained(options: Options) -> list[Run]:
    """The models of the recipe language-model at their best learning rates, all seeds."""
    path = options.out / f"{NAME}-{options.size}.json"
    results = load(path, conditions(NAME, options))
    if "chosen" not in results:
        raise CommandError(f"{path} has no trained models yet: flash-entmax recipe {NAME} comes first")
    return chosen_runs(NAME, options, results["best"])


def model_of(each: Run) -> torch.nn.Module:
    if not each.path.exists():
        raise CommandError(f"{each.path} is not there: flash-entmax recipe {NAME} writes it")
    model = each.model()
    training.restore(each.path, model)
    return model.eval()


def held_out(each: Run, count: int, length: int) -> Tensor:
    size = language_model.SIZES[each.size]
    return even_windows(language_model.corpus_for(each, size).validation, count, length).to(each.device)


@torch.no_grad()
def sparsity_of(each: Run, length: int) -> dict[str, list[list[float]] | int]:
    """Means over windows of (layers, heads) numbers, and the extent of a tile."""
    model, parts = model_of(each), []
    for window in held_out(each, WINDOWS[each.size], length).split(1):
        with precision(window.device), inspection.record(model, keep_inputs=False) as calls:
            model(window)
        parts.append(torch.stack([torch.stack((c.block_sparsity, c.keys_per_query)).cpu() for c in calls]))
    blocks, keys = torch.stack(parts).mean(0).unbind(1)
    tile = calls[0].support.tile_shape[0]
    return {"block_sparsity": blocks.tolist(), "keys_per_query": keys.tolist(), "tile": tile}


@torch.no_grad()
def capture(options: Options, length: int) -> Path:
    """Every layer's query, key and value of one held-out window, (1, heads, length, head size) each, in a file."""
    each = next(each for each in trained(options) if each.arm == CAPTURED)
    model, values = model_of(each), []
    hooks = [
        block.attention.value.register_forward_hook(lambda module, inputs, output: values.append(output))
        for block in model.blocks
    ]
    window = held_out(each, 1, length)
    with precision(window.device), inspection.record(model) as calls:
        model(window)
    for hook in hooks:
        hook.remove()
    tensors = {}
    for number, (call, value) in enumerate(zip(calls, values, strict=True)):
        query, key = call.inputs
        value = value.unflatten(-1, (call.problem.key_heads, -1)).transpose(1, 2)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            tensors[f"layer{number}.{name}"] = tensor.contiguous()
    path = options.out / f"{NAME}-{options.size}" / f"inputs-{length}.safetensors"
    save_file(tensors, path, {"source": f"{each.key}, {length:,} bytes of held-out text"})
    return path


def table(found: dict, quantity: str, title: str, shown) -> Table:
    """Means over windows and heads: of all layers, with the standard deviation of the seeds, and of each layer."""
    arms: dict[str, list[dict]] = {}
    for key, by_length in found.items():
        arms.setdefault(key.partition(" |")[0], []).append(by_length)
    result = Table(title=f"{title}: mean and deviation over seeds, and by layer", title_justify="left")
    first = next(iter(found.values()))
    layers = len(next(iter(first.values()))[quantity])
    for heading in ("attention", "length", "all layers", *(str(layer + 1) for layer in range(layers))):
        result.add_column(heading, justify="left" if heading == "attention" else "right")
    for arm, seeds in arms.items():
        for length in first:
            means = [[mean(heads) for heads in by_length[length][quantity]] for by_length in seeds]
            overall = [mean(layers) for layers in means]
            by_layer = (mean(layer) for layer in zip(*means, strict=True))
            result.add_row(arm, f"{int(length):,}", over_seeds(overall, shown), *map(shown, by_layer))
    return result


def draw(found: dict, path: Path) -> Path:
    """One map for each arm's first seed and each length: layers by heads."""
    from matplotlib.figure import Figure

    shown = {key: by_length for key, by_length in found.items() if "| seed 0 |" in key}
    lengths = list(next(iter(shown.values())))
    layers = next(iter(shown.values()))[lengths[0]]["block_sparsity"]
    size = 2.3 * len(lengths), (0.8 + 1.8 * len(layers) / len(layers[0])) * len(shown)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shown), len(lengths), squeeze=False)
    for row, (key, by_length) in zip(grid, shown.items(), strict=True):
        for axes, length in zip(row, lengths, strict=True):
            values = [[100 * value for value in heads] for heads in by_length[length]["block_sparsity"]]
            image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
            average = mean(map(mean, values))
            axes.set_title(f"{int(length):,} bytes: {average:.0f} %", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks(range(len(values)), [str(layer + 1) for layer in range(len(values))], fontsize=7)
        row[0].set_ylabel(f"{key.partition(' |')[0]}\nlayer", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="block sparsity of each head, %")
    figure.savefig(path, dpi=150, facecolor="white")
    return path
