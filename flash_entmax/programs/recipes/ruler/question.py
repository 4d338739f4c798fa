"""One question on a text of any length."""

from collections.abc import Callable
from dataclasses import dataclass

MOST_PIECES = 10_000_000


@dataclass(frozen=True)
class Question:
    """What is asked, and its answers. Only the filling of the text depends on the length.

    Attributes:
        message: what is said to the model, by the number of pieces that fill the text. It gives the same text again.
        start: the first words of the answer, behind which the model goes on.
        answers: what it should write, in any order.
        fewest, most: pieces.
    """

    message: Callable[[int], str]
    start: str
    answers: tuple[str, ...]
    fewest: int = 0
    most: float = MOST_PIECES


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
