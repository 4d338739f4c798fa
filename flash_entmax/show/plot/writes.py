"""A picture of one query's recurrence: which keys wrote to its state, how long they stayed, and the threshold."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...inspection.recorded import check_place
from ...recurrence import Writes
from .calls import add_titles
from .shared import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAYS, LEAVES, PASSES, TAU = "#b10026", "#f08a24", "#9aa0a6", "#1257c4"
BELOW = 1.5  # of z shown below the final tau, at least


def writes_figure(
    record: Writes,
    title: str,
    batch: int = 0,
    head: int = 0,
    query: int = -1,
    labels: Sequence[str] | None = None,
) -> "Figure":
    """The keys of one query from left to right, by their z, with tau as a staircase that only rises.

    A key that wrote is a dot with a line: as long as it was in the state. Orange ones were evicted, red ones are in the
    support at the end. Grey keys never wrote. Keys far below the threshold are drawn at the lower edge.

    Args:
        record: what :func:`flash_entmax.writes` returned.
        title: one line.
        batch, head, query: whose recurrence this is; query -1 is the last one.
        labels: a short text for each key, shown at those that wrote.
    """
    count, queries, keys = record.z.shape[1:]
    check_place(batch, head, record.z.shape[0], count)
    if not -queries <= query < queries:
        raise IndexError(f"query must be from {-queries} to {queries - 1}, got {query}")
    if labels is not None and len(labels) != keys:
        raise ValueError(f"labels must have a text for each of the {keys} keys, got {len(labels)}")
    require_matplotlib()
    from matplotlib.figure import Figure

    z, tau, wrote, evicted_by = (field[batch, head, query].cpu() for field in record)
    visible = z > -torch.inf
    stays = record.support[batch, head, query].cpu()
    width, height = 8.2, 4.2
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.75 / width, 0.85 / height, 1 - 0.95 / width, 1 - 1.65 / height))
    tau = tau.masked_fill(tau == -torch.inf, torch.nan)  # before the first visible key
    known = tau[tau.isfinite()]
    low = min(float(known[-1]) - BELOW, float(known[0])) if len(known) else 0.0
    number = torch.arange(keys)
    for chosen, colour, name in (
        (visible & ~wrote, PASSES, "never wrote"),
        (wrote & ~stays, LEAVES, "wrote, and was evicted"),
        (stays, STAYS, "wrote, and is in the support"),
    ):
        end = torch.where(evicted_by >= 0, evicted_by, keys)[chosen]
        if colour != PASSES:
            axes.hlines(z[chosen].tolist(), number[chosen].tolist(), end.tolist(), color=colour, linewidth=1.6)
        axes.plot(number[chosen].tolist(), z[chosen].clamp_min(low).tolist(), "o", color=colour, ms=4, label=name)
    axes.step([*range(keys), keys], [*tau.tolist(), tau[-1].item()], where="post", color=TAU, lw=1.2, label="tau")
    for key in wrote.nonzero().flatten().tolist() if labels is not None else ():
        place = key, z[key].item()
        axes.annotate(labels[key], place, (2, 4), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set(xlabel="key, in the order of arrival", ylabel="z", xlim=(-0.5, keys + 0.5))
    axes.set_ylim(bottom=low - 0.1)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="lower center", ncols=4, frameon=False, fontsize=9)
    evicted, left = int((wrote & ~stays).sum()), int(stays.sum())
    add_titles(
        figure, title, f"Of {int(visible.sum())} keys {int(wrote.sum())} wrote, {evicted} were evicted, {left} are left"
    )
    return figure
