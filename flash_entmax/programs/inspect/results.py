"""The table, the pictures and the page."""

from collections.abc import Sequence
from pathlib import Path

from ...inspection import Recorded
from ...show import page, plot
from ..errors import CommandError
from .progress import Progress
from .settings import InspectSettings, heads_of
from .subject import Subject


def table(calls: Sequence[Recorded], progress: Progress) -> list[str]:
    """Two lines of titles, then a line for each layer."""
    tile = calls[0].tile
    rows = [
        ("", "", "keys", "sparsest to", "keys per", "of those", "visible", f"empty {tile} x {tile}"),
        ("layer", "module", "per query", "densest head", "64 queries", "visible", "per query", "tiles"),
    ]
    for call in progress.count(calls, "counting the keys: layer"):
        size = call.keys_per_query
        columns = (
            f"{size.mean():.1f}",
            f"{size.min():.1f} to {size.max():.1f}",
            f"{call.keys_per_64_queries.mean():.1f}",
            percent(1 - call.key_sparsity.mean()),
            f"{call.visible_per_query:.1f}",
            percent(call.block_sparsity.mean()),
        )
        rows.append((str(call.number), call.name, *columns))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    alignments = (str.rjust, str.ljust, *[str.rjust] * 6)
    return ["  ".join(align(*cell) for align, *cell in zip(alignments, row, widths, strict=True)) for row in rows]


def percent(share: float) -> str:
    """A share from 0 to 1 in per cent, with one decimal below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def write(
    settings: InspectSettings, calls: Sequence[Recorded], subject: Subject, name: str, note: str, progress: Progress
) -> list[Path]:
    """Write all files; returns the paths of the pictures, then that of the page."""
    progress("drawing")
    heads = chosen_heads(settings, calls)
    figures = {
        "support.png": plot.support_figure(calls, f"Support size: {name}"),
        "sparsity.png": plot.sparsity_figure(calls, f"Block sparsity: {name}"),
    }
    for call, head in heads:
        title = f"Layer {call.number}, head {head}: {name}"
        figures[f"map-{call.number}-{head}.png"] = plot.map_figure(call, title, head=head)
    start = (heads[0][0].number, heads[0][1]) if settings.heads else (calls[0].number, 0)

    def steps(calls):
        return progress.count(calls, "writing the page: layer")

    try:
        paths = [plot.save_figure(figure, settings.out / file) for file, figure in figures.items()]
        path = settings.out / "attention.html"
        web = page.save_page(path, subject.tokens, calls, title=name, note=note, start=start, progress=steps)
    except OSError as error:
        raise CommandError(f"--out {settings.out}: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(f"{error} (--layers, --tokens)") from error
    return [*paths, web]


def chosen_heads(settings: InspectSettings, calls: Sequence[Recorded]) -> list[tuple[Recorded, int]]:
    """The heads of --head; without it, the one head whose mean support size is the median of all heads."""
    by_number = {call.number: call for call in calls}
    asked = [(calls[0] if layer is None else by_number[layer], head) for layer, head in heads_of(settings)]
    for call, head in asked:
        if head >= call.problem.heads:
            raise CommandError(f"--head {head}: layer {call.number} has the heads 0 to {call.problem.heads - 1}")
    if asked:
        return asked
    sizes = [call.keys_per_query.tolist() for call in calls]
    heads = [(size, index, head) for index, row in enumerate(sizes) for head, size in enumerate(row)]
    _, index, head = sorted(heads)[len(heads) // 2]
    return [(calls[index], head)]
