"""The text around what is asked: sentences of our own that repeat, or prose; and how sentences are hidden in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

from ...errors import CommandError
from ..documents import english_documents

SENTENCES = (
    "The ferry leaves the pier when the last bus has come.",
    "A gardener waters the beans before the sun is high.",
    "Two children count the boats, and lose count again.",
    "The baker sweeps the floor while the bread cools.",
    "It has rained since noon, and the road is empty.",
    "An old dog sleeps in front of the post office.",
    "The clock in the hall is late, as it always was.",
    "Somebody left a blue coat on the bench by the door.",
    "The carpenter planes a board and whistles to himself.",
    "In the evening the windows shine across the water.",
    "A teacher wipes the board, and the chalk dust settles.",
    "The train stops in the valley, though nobody gets off.",
    "There is soup on the stove and a letter on the table.",
    "The wind turns north, and the laundry dries slowly.",
)
SENTENCE_ENDS = ".", "!", "?"
FEWEST_ENDS = 0.01  # sentences for each word of prose; a list of names has fewer
CHARACTERS = 8_000_000  # of prose that are read at most


@dataclass(frozen=True)
class Haystack:
    """Words in their order. Those that ``repeat`` have no end."""

    words: Sequence[str]
    repeat: bool

    @property
    def most(self) -> float:
        return math.inf if self.repeat else len(self.words)

    @property
    def hash(self) -> str:
        return sha256(" ".join(self.words).encode()).hexdigest()[:16]

    def first(self, count: int, start: int) -> list[str]:
        """``count`` words from the word ``start`` on; behind the last word comes the first."""
        start %= len(self.words)
        rounds = -(-(start + count) // len(self.words))
        return (list(self.words) * rounds)[start : start + count]


NOISE = Haystack(" ".join(SENTENCES).split(), repeat=True)


def prose(path: Path) -> Haystack:
    """The documents of a file or folder. CommandError if they are no sentences."""
    words = " ".join(english_documents(CHARACTERS, path)).split()
    ends = sum(word.endswith(SENTENCE_ENDS) for word in words)
    if not ends or ends < FEWEST_ENDS * len(words):
        raise CommandError(f"--text {path}: {ends} sentences in {len(words):,} words are no prose to hide needles in")
    return Haystack(words, repeat=False)


def hidden(sentences: Sequence[str], depths: Sequence[float], pieces: Sequence[str]) -> str:
    """The pieces of a text, with each sentence behind one that ends there, or at the very beginning.

    A depth from 0 to 1 counts these places, so that even depths are even places. Sentences of one place keep their
    order.
    """
    places = [0, *(place for place, piece in enumerate(pieces, 1) if piece.endswith(SENTENCE_ENDS))]
    there: dict[int, list[str]] = {}
    for sentence, depth in zip(sentences, depths, strict=True):
        there.setdefault(places[int(depth * len(places))], []).append(sentence)
    text = list(there.get(0, []))
    for place, piece in enumerate(pieces, 1):
        text += [piece, *there.get(place, [])]
    return " ".join(text)


def even_depths(draw: Random, count: int) -> list[float]:
    return [draw.random() for _ in range(count)]
