"""What the questions are made of: pairs of words, coined words, numbers and names of variables, drawn at random."""

from random import Random
from string import ascii_uppercase

from . import vocabulary

ADJECTIVES, NOUNS = vocabulary.ADJECTIVES.split(), vocabulary.NOUNS.split()
PAIRS = len(ADJECTIVES) * len(NOUNS)
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def pairs(draw: Random, count: int) -> list[str]:
    """Different pairs, such as "quiet-harbor"; at most PAIRS."""
    places = (divmod(place, len(NOUNS)) for place in draw.sample(range(PAIRS), count))
    return [f"{ADJECTIVES[first]}-{NOUNS[second]}" for first, second in places]


def coined_words(draw: Random, count: int) -> list[str]:
    """Different words of six letters that mean nothing, such as "bikola"."""
    size = len(SYLLABLES)
    places = draw.sample(range(size**3), count)
    return [SYLLABLES[at // size**2] + SYLLABLES[at // size % size] + SYLLABLES[at % size] for at in places]


def numbers(draw: Random, count: int, digits: int) -> list[str]:
    """Different numbers, each of so many digits."""
    return [str(number) for number in draw.sample(range(10 ** (digits - 1), 10**digits), count)]


def variable_names(draw: Random, count: int) -> list[str]:
    """Different names of five capitals."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(ascii_uppercase, k=5))] = None
    return list(names)
