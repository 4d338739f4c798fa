"""Facts in a text: four letters that name one and four that follow, drawn at random, in slots of eight bytes."""

import torch
from torch import Tensor

SLOT = 8
NAME = VALUE = 4
LETTERS = range(ord("a"), ord("z") + 1)
DEPTHS = (0, 25, 50, 75, 100)  # where facts of tests stand, in per cent of the text up to where it asks for them


def plant(data: Tensor, slots: Tensor, draw: torch.Generator) -> Tensor:
    """Write a fact into each of the slots (batch, facts, times) of data, over what stood there.

    Returns the places (batch, facts, VALUE) of what follows the name, in the last of each fact's slots.
    """
    shape = *slots.shape[:2], 1, NAME + VALUE
    facts = torch.randint(LETTERS.start, LETTERS.stop, shape, generator=draw, device=data.device)
    places = SLOT * slots.unsqueeze(-1) + torch.arange(NAME + VALUE, device=data.device)
    data.scatter_(1, places.flatten(1), facts.expand(places.shape).flatten(1))
    return places[:, :, -1, NAME:]


def slots_of_training(count: int, length: int, facts: int, times: int, draw: torch.Generator) -> Tensor:
    """(count, facts, times): anywhere in texts of a length."""
    slots = torch.rand(count, length // SLOT, generator=draw, dtype=torch.float32, device=draw.device).argsort(1)
    return slots[:, : facts * times].unflatten(1, (facts, times))


def slots_of_test(count: int, length: int, asked: int, draw: torch.Generator) -> Tensor:
    """(count, facts, 2): where each stands, ``asked`` in a row at each depth, and again at the end, in any order."""
    device, facts = draw.device, len(DEPTHS) * asked
    before = length // SLOT - facts
    starts = torch.tensor([depth * (before - asked) // 100 for depth in DEPTHS], device=device)
    planted = (starts.unsqueeze(1) + torch.arange(asked, device=device)).flatten()
    again = before + torch.rand(count, facts, generator=draw, dtype=torch.float32, device=device).argsort(1)
    return torch.stack((planted.expand(count, facts), again), -1)
