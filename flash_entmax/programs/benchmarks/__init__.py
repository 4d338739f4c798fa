"""What `flash-entmax bench` does: compare time and memory with peers; measure cold start, host time, refinement steps.

Needs matplotlib and rich: pip install ".[bench]", from a clone.
"""

import time
from typing import TYPE_CHECKING

from ..errors import make_folder, require
from ..files import write_json
from .settings import BenchSettings

if TYPE_CHECKING:
    from rich.console import Console


def run(settings: BenchSettings) -> bool:
    """Run the parts that were asked for and write their files. False if ours was wrong or failed on a case."""
    require("bench", "matplotlib", "rich")
    from rich.console import Console

    from .report import print_conditions

    start = time.perf_counter()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    make_folder(settings.out)
    print_conditions(console, settings)
    is_right = run_cases(console, settings) if settings.measures_cases else True
    if "cold-start" in settings.parts:
        run_cold_start(console, settings)
    if "host" in settings.parts:
        run_host(console, settings)
    if "refinement" in settings.parts:
        run_refinement(console, settings)
    console.print(f"\n{time.perf_counter() - start:.0f} s in all; results are in {settings.out}", soft_wrap=True)
    return is_right


def run_cases(console: "Console", settings: BenchSettings) -> bool:
    """Write speed.json after each case, so that an interrupted run keeps its results. True if ours was right."""
    from . import figures, measure, report, roofline, speed
    from .conditions import conditions_of

    if "memory" in settings.parts and not settings.on_cuda:
        console.print("peak memory: not measured: PyTorch counts it on CUDA only")
    rate = measure.matrix_rate(settings) if "roofline" in settings.parts else None
    content = {"conditions": conditions_of(settings), "results": []}
    if rate is not None:
        content["conditions"] |= {"matrix_flop_per_second": rate, "floor": roofline.FORMULA}
    lines = report.Lines(console)

    def finished(result: dict) -> None:
        content["results"].append(result)
        write_json(settings.out / "speed.json", content)
        lines.show(result)

    is_right = speed.measure_cases(settings, rate, finished)
    report.print_speed(console, content)
    if path := figures.save_speed(content, settings.out / "speed.png"):
        console.print(f"the picture is {path}", soft_wrap=True)
    return is_right


def run_cold_start(console: "Console", settings: BenchSettings) -> None:
    from . import cold_start, report
    from .conditions import conditions_of

    if reason := cold_start.why_not(settings):
        console.print(f"\ncold start: not measured: {reason}", soft_wrap=True)
        content = {"why_not": reason}
    else:
        content = {name: cold_start.measure(name) for name in cold_start.names_of(settings)}
        report.print_cold_start(console, content)
    write_json(settings.out / "cold_start.json", {"conditions": conditions_of(settings), "results": content})


def run_host(console: "Console", settings: BenchSettings) -> None:
    from . import host, report
    from .conditions import conditions_of

    if reason := host.why_not(settings):
        console.print(f"\nhost time: not measured: {reason}", soft_wrap=True)
        content = {"why_not": reason}
    else:
        content = host.measure(settings)
        report.print_host(console, content)
    timing = f"median of {host.CALLS} calls by the host's clock"
    conditions = conditions_of(settings) | {"inputs": "randn, seed 0", "shape": host.SHAPE, "timing": timing}
    write_json(settings.out / "host.json", {"conditions": conditions, "results": content})


def run_refinement(console: "Console", settings: BenchSettings) -> None:
    from . import figures, refinement, report
    from .conditions import conditions_of

    results = refinement.measure(settings.grid.refinement_lengths, settings.device)
    methods = {
        method.name: {"title": method.title, "passes_before": method.passes_before} for method in refinement.METHODS
    }
    content = {
        "conditions": conditions_of(settings) | {"dtype": "float64", "timing": "nothing is timed: steps are counted"},
        "tolerance": refinement.TOLERANCE,
        "methods": methods,
        "results": results,
    }
    write_json(settings.out / "refinement.json", content)
    report.print_refinement(console, content)
    path = figures.save_refinement(content, settings.out / "refinement.png")
    console.print(f"the picture is {path}", soft_wrap=True)
