"""Tasks that count: the words that a list has most often. Every word of the list matters, so little can be left out."""

from collections.abc import Callable
from math import pi
from random import Random

from .haystack import Haystack
from .question import Question
from .words import PAIRS, coined_words, pairs

COMMON, TIMES = 5, 10
FREQUENT = 3
FEWEST = 30  # words of a list; from here on the third is more frequent than the fourth
COINED = 10_000  # more than a list of ten million words has
LARGEST_SHARE = 6 / pi**2  # 1 / (1 + 1/4 + 1/9 + ...)


def common_words(draw: Random, haystack: Haystack) -> Question:
    """COMMON words stand TIMES times in a list, all others once: at least as many others, more in a longer list."""
    words, order = pairs(draw, PAIRS), draw.getrandbits(32)
    common, others = words[:COMMON], words[COMMON:]

    def text(count: int) -> str:
        return shuffled(TIMES * common + others[:count], order)

    return about_words(text, common, f"{TIMES} times each", fewest=COMMON, most=len(others))


def frequent_words(draw: Random, haystack: Haystack) -> Question:
    """The k-th word of a list stands there 1/k² as often as the first, and asked are the first three."""
    words, order = coined_words(draw, COINED), draw.getrandbits(32)

    def text(count: int) -> str:
        often = often_of(count)
        repeated = [word for word, times in zip(words, often, strict=False) for _ in range(times)]
        return shuffled(repeated, order)

    return about_words(text, words[:FREQUENT], "most often", fewest=FEWEST)


def often_of(count: int) -> list[int]:
    """How often each word of a list of ``count`` stands there, by rank. Rounding leaves room for words that do once."""
    often: list[int] = []
    while times := int(LARGEST_SHARE * count / (len(often) + 1) ** 2):
        often.append(times)
    return often + [1] * (count - sum(often))


def shuffled(words: list[str], order: int) -> str:
    Random(order).shuffle(words)
    return ", ".join(words)


def about_words(text: Callable[[int], str], answers: list[str], how_often: str, **pieces) -> Question:
    """Which words does the list have so often?"""
    asked = f"{len(answers)} words"

    def message(count: int) -> str:
        return (
            f"Some words of this list stand there more often than others. Count them.\n\n{text(count)}.\n\n"
            f"Which {asked} does the list have {how_often}?"
        )

    return Question(message, f"The {asked} that the list has {how_often} are", tuple(answers), **pieces)
