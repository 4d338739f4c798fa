"""A line on the terminal that says how far the work is."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Progress:
    """One line on stderr. New words replace it, and the end clears it. Nothing is written if stderr is no terminal.

    ``with Progress() as progress: progress("opening the model")``
    """

    def __init__(self) -> None:
        self.is_shown = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.clear()

    def __call__(self, words: str) -> None:
        self._write(f"\r\x1b[K{words} ...")

    def clear(self) -> None:
        self._write("\r\x1b[K")

    def count(self, items: Sequence[Item], words: str) -> Iterator[Item]:
        """Yield the items; the line shows the words and the number of the item."""
        for number, item in enumerate(items, 1):
            self(f"{words} {number} of {len(items)}")
            yield item

    def _write(self, text: str) -> None:
        if self.is_shown:
            sys.stderr.write(text)
            sys.stderr.flush()
