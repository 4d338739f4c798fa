"""What the terminal shows: a line when a case ends, then the tables."""

from rich import box
from rich.console import Console
from rich.table import Table

from .conditions import conditions_of
from .host import SHAPE
from .refinement import TOLERANCE, WATCHED_STEPS
from .roofline import FORMULA
from .settings import NAMES, OURS, TITLES, BenchSettings


def print_conditions(console: Console, settings: BenchSettings) -> None:
    facts = conditions_of(settings)
    versions = f"torch {facts['torch']}, triton {facts['triton']}, python {facts['python']}"
    console.print(f"{facts['device']}, {versions}, {facts['dtype']}, causal, alpha {facts['alpha']}")
    console.print(f"times: {facts['timing']}; clocks {facts['clocks']}", soft_wrap=True)
    if settings.measures_cases:
        console.print(f"{len(settings.cases)} cases; inputs: {facts['inputs']}", soft_wrap=True)
        if facts["grouped_heads"]:
            console.print(f"grouped heads: {facts['grouped_heads']}", soft_wrap=True)
        console.print()


class Lines:
    """Prints a line when a case ends. A competitor's reason or note is printed once."""

    def __init__(self, console: Console) -> None:
        self.console, self.said = console, set()

    def show(self, result: dict) -> None:
        parts = []
        if "support_failed" in result:
            self.console.print(f"  support not measured: {result['support_failed']}", soft_wrap=True)
        for name, entry in result["competitors"].items():
            for kind, prefix in (("why_not", "not run: "), ("note", ""), ("failed", "failed: "), ("wrong", "WRONG: ")):
                if kind in entry and (name, entry[kind]) not in self.said:
                    self.said.add((name, entry[kind]))
                    self.console.print(f"  {TITLES[name]}: {prefix}{entry[kind]}", soft_wrap=True)
            if "step_ms" in entry:
                parts.append(f"{TITLES[name]} {times(entry)}")
            elif "memory_mib" in entry:
                parts.append(f"{TITLES[name]} {memory(entry)}")
        self.console.print(f"{place(result)}: {', '.join(parts) or 'nothing measured'}", soft_wrap=True)


def place(result: dict) -> str:
    label = f"{result['inputs']}, " if result["captured"] else ""
    live, reached = densities(result)
    return f"{label}{tokens(result)} x {heads(result)}, live tiles {live}, keys reached {reached}"


def densities(result: dict) -> tuple[str, str]:
    """The share of the visible tiles that are live, and that of the visible keys that a tile of queries reaches."""
    sparsity = result["block_sparsity"]
    return known(None if sparsity is None else 1 - sparsity, ".2f"), known(result["key_density"], ".3f")


def known(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def tokens(result: dict) -> str:
    return f"{result['length']:,}" if result["batch"] == 1 else f"{result['batch']} x {result['length']:,}"


def heads(result: dict) -> str:
    shared = "" if result["heads"] == result["key_heads"] else f"/{result['key_heads']}"
    return f"{result['heads']}{shared} x {result['head_size']}{' wide' if result['wide_blocks'] else ''}"


def times(entry: dict) -> str:
    return f"{milliseconds(entry['forward_ms'])} / {milliseconds(entry['step_ms'])}"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def memory(entry: dict) -> str:
    return f"{entry['memory_mib']:,.0f} MiB"


def measured_names(results: list[dict], key: str) -> list[str]:
    """The competitors with this number for at least one case."""
    return [name for name in NAMES if any(key in result["competitors"].get(name, {}) for result in results)]


def print_speed(console: Console, content: dict) -> None:
    results = sorted(content["results"], key=order)
    if names := measured_names(results, "step_ms"):
        print_grid(console, results, names, "forward / training step, milliseconds", "step_ms", times)
        print_ratios(console, results, names)
    if names := measured_names(results, "graph_ms"):
        title = "training step as a CUDA graph, without the host's launches, milliseconds"
        print_grid(console, results, names, title, "graph_ms", lambda entry: milliseconds(entry["graph_ms"]))
    if names := measured_names(results, "memory_mib"):
        title = "peak memory of a step beyond inputs, output and gradients"
        print_grid(console, results, names, title, "memory_mib", memory)
    print_stages(console, results)
    print_roofline(console, results, content["conditions"])


def order(result: dict) -> tuple[int, ...]:
    """Sorts topics by shape, then captured inputs in the order in which they were measured."""
    if result["captured"]:
        return (1,)
    return 0, result["length"], result["head_size"], -result["key_heads"], result["topics"]


def print_cases(console: Console, title: str, columns: list[str], rows: list[tuple[dict, list[str]]]) -> None:
    """A row of cells for each result. A column names the inputs if some were captured."""
    named = any(result["captured"] for result, _ in rows)
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD)
    if named:
        table.add_column("inputs", no_wrap=True)
    for column in ("length", "heads x size", "live\ntiles", "keys\nreached", "keys per\nquery", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for result, cells in rows:
        size, label = known(result["support_size"], ".0f"), [result["inputs"]] if named else []
        table.add_row(*label, tokens(result), heads(result), *densities(result), size, *cells)
    console.print(table)


def print_grid(console: Console, results: list[dict], names: list[str], title: str, key: str, cell) -> None:
    rows = []
    for result in results:
        entries = [result["competitors"].get(name, {}) for name in names]
        cells = [cell(entry) if key in entry else "wrong" if "wrong" in entry else "-" for entry in entries]
        rows.append((result, cells))
    print_cases(console, title, [TITLES[name] for name in names], rows)


def print_ratios(console: Console, results: list[dict], names: list[str]) -> None:
    peers = [name for name in names if name != OURS]
    if OURS not in names or not peers:
        return
    rows = []
    for result in results:
        step = {name: result["competitors"].get(name, {}).get("step_ms") for name in names}
        ratios = [f"{step[OURS] / step[name]:.2f}" if step[OURS] and step[name] else "-" for name in peers]
        rows.append((result, ratios))
    print_cases(console, f"training step of {TITLES[OURS]} over that of", [TITLES[name] for name in peers], rows)


def print_stages(console: Console, results: list[dict]) -> None:
    stages = {}
    for result in results:
        stages |= result["competitors"].get(OURS, {}).get("stages_ms", {})
    if not stages:
        return
    rows = []
    for result in results:
        found = result["competitors"].get(OURS, {}).get("stages_ms", {})
        rows.append((result, [f"{found[stage]:.3f}" if stage in found else "-" for stage in stages]))
    title = f"training step of {TITLES[OURS]} by kernel, milliseconds"
    print_cases(console, title, [stage.replace("_", "\n") for stage in stages], rows)


def print_roofline(console: Console, results: list[dict], conditions: dict) -> None:
    if not any("roofline" in result for result in results):
        return
    rows = []
    for result in results:
        if "roofline" in result:
            floor, step = result["roofline"]["step_ms"], result["competitors"][OURS]["step_ms"]
            attained = f"{100 * result['roofline']['attained']:.0f} %"
            rows.append((result, [f"{milliseconds(floor)} ms", f"{milliseconds(step)} ms", attained]))
    rate = conditions["matrix_flop_per_second"] / 1e12
    title = f"how near to the floor that {rate:,.3g} Tflop/s of matrix products allow"
    print_cases(console, title, ["floor", "step", "attained"], rows)
    console.print(FORMULA, soft_wrap=True)


def print_cold_start(console: Console, content: dict) -> None:
    console.print("\ncold start: a new process with empty caches, bfloat16, 1 x 8 x 1,024 x 64, forward and backward")
    for name, entry in content.items():
        if "failed" in entry:
            console.print(f"  {TITLES[name]}: failed: {entry['failed']}", soft_wrap=True)
            continue
        first = f"{entry['total_s']:.1f} s from the start of the process (imports {entry['imports_s']:.1f}, CUDA "
        first += f"{entry['cuda_s']:.1f}, first step {entry['first_step_s']:.1f}); {entry['kernels']} kernels compiled"
        console.print(f"  {TITLES[name]}: {first}", soft_wrap=True)
        for later in entry["lengths"]:
            again = f"{later['length']:,} tokens: {later['kernels']} more kernels, {later['seconds']:.2f} s"
            console.print(f"    {again}", soft_wrap=True)


def print_host(console: Console, content: dict) -> None:
    """Microseconds by way to call and library; then what failed."""
    names = tuple(next(iter(content.values())))
    title = "\nhost time of a call, in microseconds: " + " x ".join(map(str, SHAPE))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("call", no_wrap=True)
    for name in names:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    for way, entries in content.items():
        times = (entries[name].get("microseconds") for name in names)
        table.add_row(way, *("failed" if time is None else f"{time:,.0f}" for time in times))
    console.print(table)
    for way, entries in content.items():
        for name, entry in entries.items():
            if "failed" in entry:
                console.print(f"  {TITLES[name]}, {way}: failed: {entry['failed']}", soft_wrap=True)


def print_refinement(console: Console, content: dict) -> None:
    """Over all distributions, by method and length: steps of a row, of a tile of 64 rows, and of the worst row."""
    lengths = list(dict.fromkeys(result["length"] for result in content["results"]))
    title = f"\nsteps until |sum p - 1| <= {TOLERANCE:g}: mean of rows, of tiles of 64 rows, and worst row"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    table.add_column("passes\nbefore", justify="right")
    for length in lengths:
        table.add_column(f"{length:,}\nkeys", justify="right", no_wrap=True)
    for step in WATCHED_STEPS:
        table.add_column(f"|sum p - 1|,\n{step} step{'s' * (step > 1)}", justify="right", no_wrap=True)
    for name, method in content["methods"].items():
        found = [result for result in content["results"] if result["method"] == name]
        cells = [steps_cell([result for result in found if result["length"] == length]) for length in lengths]
        worst = [max(result["residual_after"][str(step)] for result in found) for step in WATCHED_STEPS]
        table.add_row(method["title"], str(method["passes_before"]), *cells, *(f"{value:.0e}" for value in worst))
    console.print(table)
    console.print("|sum p - 1|: the largest of any row of any distribution and length", soft_wrap=True)


def steps_cell(results: list[dict]) -> str:
    row, tile = (sum(result[key] for result in results) / len(results) for key in ("mean_steps", "mean_steps_of_tile"))
    return f"{row:.1f} {tile:.1f} {max(result['worst_steps'] for result in results)}"
