"""What `flash-entmax inspect` does: run a model on a text, and show what its attention looks at.

Needs matplotlib, and, for a model that is not the demo's, transformers: pip install "flash-entmax[plot,transformers]".
"""

from pathlib import Path

import torch

from ..command import CommandError
from .demo_model import demo_checkpoint, open_demo
from .loss import alpha_of, loss_line, read, softmax_loss
from .progress import Progress
from .results import table, write
from .transformers_model import open_transformers
from .wanted import Wanted, check, check_against, numbers_of

__all__ = ["Wanted", "run"]


def run(wanted: Wanted) -> None:
    """Print a table, write the pictures and the page. Raises a CommandError."""
    check(wanted)
    with Progress() as progress:
        progress("opening the model")
        subject = open_demo(wanted) if demo_checkpoint(wanted.model) else open_transformers(wanted)
        try:
            calls, loss = read(subject, progress)
            if not calls:
                raise CommandError(
                    f"{wanted.model} made no call of entmax attention (alpha 1 is softmax, not recorded)"
                )
            check_against(wanted, len(calls), max(call.problem.heads for call in calls))
            alpha = alpha_of(calls)
            loss = loss_line(subject, alpha, loss, softmax_loss(subject, progress))
        except (ValueError, TypeError, IndexError, torch.OutOfMemoryError) as error:
            raise CommandError(f"{wanted.model}: {error}") from error
        chosen = [call for call in calls if call.number in numbers_of(wanted.layers, len(calls))]
        rows = table(chosen, progress)
        progress.clear()
        attention = f"entmax attention, {alpha}, {subject.origin}"
        print(f"{wanted.model}: {attention}; {subject.read}\n{loss}\n")
        print(*rows, sep="\n")
        name = f"{Path(wanted.model).name}, {subject.read_briefly}"
        paths = write(wanted, chosen, subject, name, f"{attention}; {loss}", progress)
    print("\npictures:", *paths[:-1], f"\npage, to be opened in a browser: {paths[-1]}")
