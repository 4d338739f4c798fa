"""A language model is trained by the recipe, and its attention is timed beside cuDNN: layers, and whole training steps.

python benchmarks/trained_layers.py --out FOLDER takes two minutes on an H200. Parts, each of which prints its lines at
once and then writes FOLDER/trained-layers.json: training; layers at 32,768 tokens; layers at 8,192; whole training
steps; layers at 131,072. With --tiny all of it runs on a CPU, in seconds and against PyTorch's own softmax attention.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import layer_times
import torch

from flash_entmax import inspection
from flash_entmax.programs.demo.train import parameter_groups, precision
from flash_entmax.programs.recipes import training
from flash_entmax.programs.recipes.language_model import RECIPE, corpus_for
from flash_entmax.programs.recipes.recipe import Run
from flash_entmax.programs.recipes.runs import new_model
from flash_entmax.programs.recipes.sparsity import held_out
from flash_entmax.programs.recipes.training_speed import seconds_of_step

BEGIN = time.perf_counter()
options = argparse.ArgumentParser()
options.add_argument("--tiny", action="store_true", help="on the CPU, in seconds")
options.add_argument("--steps", type=int)
options.add_argument("--train-seconds", type=float, default=120.0, help="training stops after this long")
options.add_argument("--seconds", type=float, default=200.0, help="the extra layers at 131,072 begin before this")
options.add_argument("--compiled", action="store_true", help="also whole steps of models whose blocks are compiled")
options.add_argument("--out", type=Path, default=Path("out/trained-layers"))
args = options.parse_args()

TINY = args.tiny
DEVICE = "cpu" if TINY else "cuda"
SIZE = "toy" if TINY else "full"
STEPS = args.steps or (3 if TINY else RECIPE.sizes["full"].steps)
LONG, SHORT, LONGEST = (256, 128, 512) if TINY else (32_768, 8_192, 131_072)
REPEATS = 3 if TINY else 15
LAYER = 1 if TINY else 2  # measured first at the longest length
RATE = 3e-3 if TINY else 6e-4
ENTMAX, SOFTMAX = "entmax 1.5, RoPE", "softmax, RoPE"
ALPHA = 1.5
PEER = partial(layer_times.cudnn, not TINY)

folder = tempfile.TemporaryDirectory()
run = Run(RECIPE.name, SIZE, ENTMAX, RATE, 0, STEPS, Path(folder.name), DEVICE, None)
size = RECIPE.sizes[SIZE]
figures = {"errors": []}


class TimeIsUpError(Exception):
    """The training has had its seconds."""


def say(*words):
    print(f"[{time.perf_counter() - BEGIN:5.1f}s]", *words, flush=True)


def write():
    figures["elapsed"] = time.perf_counter() - BEGIN
    (args.out / "trained-layers.json").write_text(json.dumps(figures, indent=1))


def guarded(name, function, *arguments):
    """The result; None, and the error printed and kept, where it fails."""
    try:
        return function(*arguments)
    except Exception as error:
        figures["errors"].append(f"{name}: {error!r}"[:600])
        say("ERROR", name, repr(error)[:300])
        print(traceback.format_exc()[-1200:], flush=True)
    finally:
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()


def synchronize():
    if not TINY:
        torch.cuda.synchronize()


# Training


def train():
    """The recipe's own training: AdamW, warm-up and cosine, alpha from 1.01 to 1.5, planted facts, CUDA graphs."""
    corpus = corpus_for(run, size)
    say("text:", corpus.origin)
    model, last = new_model(RECIPE, run), torch.zeros((), device=DEVICE)
    seen = {"steps": 0, "losses": {}}

    def loss(*arguments):
        value = RECIPE.loss(*arguments)
        last.copy_(value.detach())  # inside the graph as well
        return value

    def show(step, steps):
        seen["steps"] = step
        if step in (1, 2) or step % (1 if TINY else 100) == 0 or step == steps:
            seen["losses"][step] = last.item()
            say(f"step {step}/{steps} loss {seen['losses'][step]:.3f}")
        if time.perf_counter() - begin > args.train_seconds and step < steps:
            raise TimeIsUpError

    begin = time.perf_counter()
    try:
        training.fit(model, lambda step: RECIPE.batch(step, run, size), loss, STEPS, RATE, run.path, show)
    except TimeIsUpError:
        say(f"CUT at step {seen['steps']} of {STEPS}: the rate and alpha had not come to their ends")
    synchronize()
    seen["seconds"] = time.perf_counter() - begin
    model.eval()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        seen["validation"] = RECIPE.validate(model, run, size)
    say(f"trained: {seen['steps']} steps in {seen['seconds']:.1f} s, validation {seen['validation']:.3f}")
    figures["training"] = {**seen, "of": STEPS, "origin": corpus.origin}
    if not math.isfinite(seen["validation"]):
        raise ValueError(f"the model is broken: validation loss {seen['validation']}")
    return model


# Layers


@torch.no_grad()
def captured(model, length, only=None):
    """[(number, densities, (query, key, value))] of layers on a held-out window; tensors (1, heads, length, 64)."""
    values = {}
    hooks = [
        block.attention.value.register_forward_hook(
            lambda module, inputs, output, number=number: values.__setitem__(number, output)
        )
        for number, block in enumerate(model.blocks)
        if only is None or number in only
    ]
    window = held_out(run, 1, length)
    number_of = {f"blocks.{number}.attention": number for number in range(len(model.blocks))}
    chosen = None if only is None else lambda name: number_of[name] in only
    with precision(window.device), inspection.record(model, only=chosen) as calls:
        model(window)
    for hook in hooks:
        hook.remove()
    layers = []
    for call in calls:
        number = number_of[call.name]
        query, key = call.inputs
        value = values.pop(number).unflatten(-1, (call.problem.key_heads, -1)).transpose(1, 2)
        layers.append((number, layer_times.densities(call), tuple(t.contiguous() for t in (query, key, value))))
    calls.clear()
    return layers


def measure_layers(model, length, repeats=REPEATS, only=None):
    rows = figures.setdefault("layers", {}).setdefault(str(length), {})
    for number, density, inputs in captured(model, length, only):
        say(
            f"layer {number} {length}: tiles {density['tile_density']:.3f} keys {density['key_density']:.3f} "
            f"keys/query {density['keys_per_query']:.1f} keys/tile {density['keys_per_tile']:.0f} "
            f"({density['tile']}, {density['impl']}, {density['dtype']})"
        )
        row = guarded(f"layer {number} at {length}", layer_times.timed, inputs, ALPHA, repeats)
        rows[number] = density | (row or {})
        if row:
            say(layer_times.line(number, row))
    means = layer_times.summary([row for row in rows.values() if "ratio" in row])
    figures.setdefault("summary", {})[str(length)] = means
    if only is None:
        for kind, m in means.items():
            say(f"{length} {kind}: mean ratio {m['mean']:.3f} worst {m['worst']:.3f} of sums {m['of_sums']:.3f}")


# Whole training steps


def seconds_of_graphed_step(model, data):
    """The recipe's step as one CUDA graph, with a learning rate of 0."""
    rate = torch.zeros((), dtype=torch.float32, device=DEVICE)
    groups = parameter_groups(model.train())
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=not TINY)
    training.give_state(optimizer)
    advance = (training.Eager if TINY else training.Graphed)(model, RECIPE.loss, optimizer)
    return layer_times.milliseconds(lambda: advance((data,)), REPEATS, not TINY) / 1e3


def softmax_of(model):
    """The same weights with softmax in place of entmax."""
    other = RECIPE.build(SOFTMAX, size).to(DEVICE)
    other.load_state_dict(model.state_dict())
    return other


def measure_training(entmax, softmax, label):
    speeds = figures.setdefault(label, {})
    for length in (LONG, SHORT):
        data = held_out(run, 1, length + 1)
        for kind, seconds in (
            ("called", lambda model, data: seconds_of_step(model, data, REPEATS)),
            ("graph", seconds_of_graphed_step),
        ):
            row = {}
            for name, model, context in (("entmax", entmax, nullcontext), ("cudnn", softmax, PEER)):
                with context():
                    took = guarded(f"{label} {name} {length} {kind}", seconds, model, data)
                for parameter in model.parameters():
                    parameter.grad = None
                if took:
                    row[name] = length / took
                    say(f"{label} {length} {kind} {name}: {row[name]:,.0f} bytes/s, {1e3 * took:.2f} ms")
            if len(row) == 2:
                row["quotient"] = row["entmax"] / row["cudnn"]
                say(f"{label} {length} {kind}: entmax over cuDNN {row['quotient']:.3f}")
            speeds[f"{length} {kind}"] = row


def measure_longest(model):
    repeats = 3 if TINY else 7
    for number in (LAYER, *(n for n in range(len(model.blocks)) if n != LAYER)):
        if number != LAYER and time.perf_counter() - BEGIN > args.seconds:
            say("no time for the other layers")
            break
        guarded(f"layer {number} at {LONGEST}", measure_layers, model, LONGEST, repeats, {number})
        write()


def main():
    args.out.mkdir(parents=True, exist_ok=True)
    where = "cpu" if TINY else torch.cuda.get_device_name()
    figures["conditions"] = {
        "device": where, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
        "repeats": REPEATS, "rate": RATE,
    }  # fmt: skip
    say(where, torch.__version__)
    model = guarded("training", train)
    write()
    if model is None:
        return 1
    for length in (LONG, SHORT):
        guarded(f"layers at {length}", measure_layers, model, length)
        write()
    softmax = softmax_of(model)
    guarded("training steps", measure_training, model, softmax, "train step")
    write()
    guarded(f"layers at {LONGEST}", measure_longest, model)
    write()
    if args.compiled:
        for each in (model, softmax):
            each.compile(dynamic=False)
        guarded("compiled training steps", measure_training, model, softmax, "compiled train step")
        write()
    say("done;", len(figures["errors"]), "errors")
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
