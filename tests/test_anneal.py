"""Annealing alpha: the way it goes, and that a moving alpha is only a number."""

import math
from itertools import pairwise

import pytest

from flash_entmax import entmax_attention
from flash_entmax.anneal import AlphaAnnealing
from flash_entmax.testing import iid_inputs


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_way_from_start_to_end(shape):
    annealing = AlphaAnnealing(10, 1.01, 1.5, shape)
    values = [annealing.alpha.item(), *(annealing.step() for _ in range(10))]
    assert values[0] == pytest.approx(1.01)
    assert values[5] == pytest.approx((1.01 + 1.5) / 2)
    assert values[10] == pytest.approx(1.5)
    assert all(before < after for before, after in pairwise(values))
    assert annealing.step() == annealing.step() == pytest.approx(1.5), "it stays at the end"
    early = values[1] - values[0]
    assert early == pytest.approx(0.049 if shape == "linear" else 0.49 * (1 - math.cos(math.pi / 10)) / 2)


def test_alpha_is_one_tensor_all_along():
    """A call that holds the tensor sees it move."""
    annealing = AlphaAnnealing(4)
    inputs = iid_inputs(1, 2, 40, 8)
    held = annealing.alpha
    sizes = []
    for _ in range(5):
        sizes.append(entmax_attention(*inputs, alpha=held, return_support=True)[1].size.float().mean().item())
        annealing.step()
    assert held is annealing.alpha
    assert sizes[0] == 40, "at alpha 1.01 every key has a probability"
    assert sizes[-1] < 20
    assert sizes == sorted(sizes, reverse=True)


def test_it_continues_where_it_stopped():
    first, second = AlphaAnnealing(10), AlphaAnnealing(10)
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.alpha == first.alpha
    short = AlphaAnnealing(3)
    short.load_state_dict(first.state_dict())
    assert short.alpha.item() == pytest.approx(1.5), "beyond its steps it is at its end"
    assert second.step() == first.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer of at least 1, got 2.5"),
        ({"steps": 3, "start": 1.0}, r"start must be in \[1.01, 2\].*, got 1.0"),
        ({"steps": 3, "end": 2.5}, r"end must be in \[1.01, 2\].*, got 2.5"),
        ({"steps": 3, "shape": "sigmoid"}, "shape must be one of 'linear', 'cosine', got 'sigmoid'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlphaAnnealing(**arguments)
