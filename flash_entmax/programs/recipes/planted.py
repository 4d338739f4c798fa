"""Facts in a text, in slots of eight bytes: four letters that name a fact, and four that follow, drawn at random."""

import torch
from torch import Tensor

SLOT = 8
NAME = VALUE = 4
LETTERS = range(ord("a"), ord("z") + 1)
DEPTHS = (0, 25, 50, 75, 100)  # of tested facts: per cent of the text in front of the questions


def plant(data: Tensor, slots: Tensor, draw: torch.Generator) -> Tensor:
    """Write facts into data (batch, length), over its own bytes. slots (batch, facts, times) are those of each fact.

    Returns places (batch, facts, VALUE): the bytes that follow the name, in the last slot of each fact.
    """
    shape = *slots.shape[:2], 1, NAME + VALUE
    facts = torch.randint(LETTERS.start, LETTERS.stop, shape, generator=draw, device=data.device)
    places = SLOT * slots.unsqueeze(-1) + torch.arange(NAME + VALUE, device=data.device)
    data.scatter_(1, places.flatten(1), facts.expand(places.shape).flatten(1))
    return places[:, :, -1, NAME:]


def slots_of_training(count: int, length: int, facts: int, times: int, draw: torch.Generator) -> Tensor:
    """(count, facts, times) int64: different slots, at random places of a text of ``length`` bytes."""
    slots = torch.rand(count, length // SLOT, generator=draw, dtype=torch.float32, device=draw.device).argsort(1)
    return slots[:, : facts * times].unflatten(1, (facts, times))


def slots_of_test(count: int, length: int, asked: int, draw: torch.Generator) -> Tensor:
    """(count, facts, 2) int64: the slot of each fact, then the slot at the end of the text that asks for it.

    At each depth ``asked`` facts stand in a row. The end asks for all of them in random order.
    """
    device, facts = draw.device, len(DEPTHS) * asked
    first_question = length // SLOT - facts
    starts = torch.tensor([depth * (first_question - asked) // 100 for depth in DEPTHS], device=device)
    planted = (starts.unsqueeze(1) + torch.arange(asked, device=device)).flatten()
    questions = first_question + torch.rand(count, facts, generator=draw, dtype=torch.float32, device=device).argsort(1)
    return torch.stack((planted.expand(count, facts), questions), -1)
