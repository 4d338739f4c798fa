"""Tasks that look something up: needles in a haystack, and variables whose values are names of others."""

from collections.abc import Callable
from random import Random

from .haystack import Haystack, even_depths, hidden
from .question import Question, listed
from .words import PAIRS, numbers, pairs, variable_names

DIGITS = 7
HOPS = 4


def needle(key: str, number: str) -> str:
    return f"The secret number of {key} is {number}."


def needles(draw: Random, haystack: Haystack, keys: int = 1, values: int = 1, asked: int = 1) -> Question:
    """``keys`` names have ``values`` numbers each, at places of their own; asked are the numbers of some names."""
    names, start = pairs(draw, keys), draw.getrandbits(32)
    given = numbers(draw, keys * values, DIGITS)
    of_name = {name: given[values * place : values * (place + 1)] for place, name in enumerate(names)}
    sentences = [needle(name, number) for name in names for number in of_name[name]]
    depths = even_depths(draw, len(sentences))
    return about_numbers(
        {name: of_name[name] for name in names[:asked]},
        lambda pieces: hidden(sentences, depths, haystack.first(pieces, start)),
        haystack.most,
    )


def needle_among_needles(draw: Random, haystack: Haystack) -> Question:
    """One needle as in ``needles``; the text around it consists of needles with other names."""
    name, *others = pairs(draw, PAIRS)
    number, *wrong = numbers(draw, PAIRS, DIGITS)
    depths = even_depths(draw, 1)
    pieces = [needle(*each) for each in zip(others, wrong, strict=True)]
    hide = [needle(name, number)]
    return about_numbers({name: [number]}, lambda count: hidden(hide, depths, pieces[:count]), len(pieces))


def about_numbers(of_name: dict[str, list[str]], text: Callable[[int], str], most: float) -> Question:
    """What are the numbers of these names?"""
    answers = tuple(number for numbers in of_name.values() for number in numbers)
    several = len(answers) > 1
    subject = f"secret number{'s' if several else ''} of {listed(list(of_name))}"
    asked = f"What {'are all the' if several else 'is the'} {subject} in the text?"

    def message(pieces: int) -> str:
        return f"A text names secret numbers. Remember them.\n\n{text(pieces)}\n\n{asked}"

    return Question(message, f"The {subject} in the text {'are' if several else 'is'}", answers, most=most)


def variables(draw: Random, haystack: Haystack) -> Question:
    """One variable has a number. Each of HOPS others has the value of the one before, in the order of the text."""
    names, (number,), start = variable_names(draw, HOPS + 1), numbers(draw, 1, 5), draw.getrandbits(32)
    values = [number, *(f"VAR {name}" for name in names)]
    sentences = [f"VAR {name} = {value}." for name, value in zip(names, values, strict=False)]
    depths = sorted(even_depths(draw, len(sentences)))

    def message(pieces: int) -> str:
        text = hidden(sentences, depths, haystack.first(pieces, start))
        return (
            f"A text assigns values to variables. Follow the assignments.\n\n{text}\n\n"
            f"Which variables have the value {number}, directly or through other variables? "
            f"There are {len(names)}: name them all."
        )

    start_of_answer = f"The {len(names)} variables with the value {number} are VAR"
    return Question(message, start_of_answer, tuple(names), most=haystack.most)
