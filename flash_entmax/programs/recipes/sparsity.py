"""How sparse is the attention of models that were trained with entmax, by layer, head and length?

AdaSplash-2 (arXiv 2604.15180) says that block sparsity of 60 % and more "often occurs" at long context. This recipe
measures the models of the recipe language-model on held-out text. It counts the visible 64 x 64 tiles without any
probability, which are what the kernels skip, and the keys that a query attends to. It also writes the queries, keys and
values of one model to files, which `flash-entmax bench --inputs FILE` times.
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
from ..files import write_json
from .language_model import RECIPE, corpus_for
from .recipe import Run
from .report import over_seeds
from .results import conditions, load
from .runs import chosen_runs, trained_model
from .settings import RecipeSettings

LENGTHS = {"toy": (64, 128), "small": (256, 512, 1024, 2048), "full": (2048, 4096, 8192, 16_384, 32_768)}
WINDOWS = {"toy": 2, "small": 4, "full": 4}
# The first one that is trained. Their scores have no bias, so the peers of the benchmark can run on their inputs.
CAPTURED = "entmax 1.5, RoPE", "entmax 1.5 from softmax, RoPE"
CAPTURED_LENGTHS = {"toy": (128,), "small": (2048,), "full": (8192, 32_768)}


def run(settings: RecipeSettings) -> None:
    console = Console(highlight=False, markup=False)
    models = trained(settings)
    sparse = [run for run in models if "entmax" in run.arm.lower()]
    if not sparse:
        raise CommandError(f"no model with entmax is trained: flash-entmax recipe {RECIPE.name} trains all arms")
    found = {run.key: {str(length): sparsity_of(run, length) for length in LENGTHS[settings.size]} for run in sparse}
    path = settings.out / f"sparsity-{settings.size}.json"
    write_json(path, {"conditions": conditions("sparsity", settings), "models": found})
    for quantity, title, shown in (
        ("block_sparsity", "block sparsity, %", lambda value: f"{100 * value:.0f}"),
        ("keys_per_query", "keys per query", lambda value: f"{value:.1f}"),
    ):
        console.print(table(found, quantity, title, shown))
    console.print(f"{path}, {draw(found, path.with_suffix('.png'))}", soft_wrap=True)
    if not any(run.arm in CAPTURED for run in models):
        console.print(f"no inputs are written: they are of {' or '.join(map(repr, CAPTURED))}", soft_wrap=True)
        return
    captured = [capture(first(models, *CAPTURED), length) for length in CAPTURED_LENGTHS[settings.size]]
    console.print(f"to time these: flash-entmax bench --inputs {' '.join(map(str, captured))}", soft_wrap=True)


def trained(settings: RecipeSettings) -> list[Run]:
    """The models of the recipe language-model at their best learning rates, all seeds."""
    path = settings.out / f"{RECIPE.name}-{settings.size}.json"
    results = load(path, conditions(RECIPE.name, settings, RECIPE.sizes[settings.size]))
    if "chosen" not in results:
        raise CommandError(f"{path} has no trained models yet: flash-entmax recipe {RECIPE.name} comes first")
    return chosen_runs(RECIPE, settings, results["best"], len(next(iter(results["chosen"].values()))))


def first(models: list[Run], *arms: str) -> Run:
    """The training with seed 0 of the first of these arms that is trained. CommandError if none is."""
    for arm in arms:
        for run in models:
            if run.arm == arm:
                return run
    raise CommandError(
        f"no model {' or '.join(map(repr, arms))} is trained: flash-entmax recipe {RECIPE.name} trains all arms"
    )


def held_out(run: Run, count: int, length: int) -> Tensor:
    """(windows, length) int64: bytes of held-out text, evenly spaced."""
    return even_windows(corpus_for(run, RECIPE.sizes[run.size]).validation, count, length).to(run.device)


@torch.no_grad()
def sparsity_of(run: Run, length: int) -> dict[str, list[list[float]] | int]:
    """Means over the windows, each (layers, heads), and the number of queries and of keys in a tile."""
    model, parts = trained_model(RECIPE, run), []
    for window in held_out(run, WINDOWS[run.size], length).split(1):
        with precision(window.device), inspection.record(model, keep_inputs=False) as calls:
            model(window)
        measured = [torch.stack((call.block_sparsity, call.keys_per_query)).cpu() for call in calls]
        dense = [of_softmax(measured[0], length)] if model.first_layer_alpha == 1.0 else []  # softmax is not recorded
        parts.append(torch.stack(dense + measured))
    blocks, keys = torch.stack(parts).mean(0).unbind(1)
    tile = calls[0].support.tile_shape[0]
    return {"block_sparsity": blocks.tolist(), "keys_per_query": keys.tolist(), "tile": tile}


def of_softmax(like: Tensor, length: int) -> Tensor:
    """No tile is skipped, and a query attends to all keys that it sees."""
    return torch.stack((torch.zeros_like(like[0]), torch.full_like(like[1], (length + 1) / 2)))


@torch.no_grad()
def capture(run: Run, length: int) -> Path:
    """Write the query, key and value of every layer, each (1, heads, length, head size), for one held-out window."""
    model, values = trained_model(RECIPE, run), []
    hooks = [
        block.attention.value.register_forward_hook(lambda module, inputs, output: values.append(output))
        for block in model.blocks
    ]
    window = held_out(run, 1, length)
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
    path = run.folder / f"inputs-{length}.safetensors"
    save_file(tensors, path, {"source": f"{run.key}, {length:,} bytes of held-out text"})
    return path


def table(found: dict, quantity: str, title: str, shown) -> Table:
    """Means over windows and heads: of all layers, with the deviation over the seeds, then of each layer."""
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
    """A map of layers by heads for each arm, with its first seed, and each length."""
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
