"""What `flash-entmax inspect` does: run a model on a text, and show what its attention looks at.

Needs matplotlib. A model of Transformers also needs transformers: pip install ".[plot,transformers]", from a clone.
"""

from pathlib import Path

from ..errors import CommandError
from .demo_model import demo_checkpoint, open_demo
from .layers import choose, state_space_words
from .loss import alpha_of, loss_line, read, softmax_loss
from .progress import Progress
from .results import table, write
from .settings import InspectSettings, check
from .transformers_model import open_transformers

__all__ = ["InspectSettings", "run"]


def run(settings: InspectSettings) -> None:
    """Print a table, and write the pictures and the page. Raises a CommandError."""
    check(settings)
    with Progress() as progress:
        progress("opening the model")
        subject = open_demo(settings) if demo_checkpoint(settings.model) else open_transformers(settings)
        try:
            calls, loss = read(subject, progress)
            chosen, not_shown = choose(settings, subject, calls)
            alpha = alpha_of(calls)
            loss = loss_line(subject, alpha, loss, softmax_loss(subject, progress))
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise CommandError(f"{settings.model}: {subject.in_words(error)}") from error
        rows = table(chosen, progress)
        progress.clear()
        attention = f"entmax attention, {alpha}, {subject.origin}" if alpha else "no entmax attention"
        facts = [words for words in (loss, state_space_words(chosen), not_shown) if words]
        print(f"{settings.model}: {attention}; {subject.read}", *facts, "", sep="\n")
        print(*rows, sep="\n")
        name = f"{Path(settings.model).name}, {subject.read_briefly}"
        paths = write(settings, chosen, subject, name, "; ".join([attention, *facts]), progress)
    print("\npictures:", *paths[:-1], f"\npage, to be opened in a browser: {paths[-1]}")
