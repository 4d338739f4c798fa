"""Annealing alpha: the way it goes, and that a moving alpha is only a number."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch

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


def test_held_then_geometric_then_at_rest():
    """1 / (alpha - 1) falls by the same factor at each step that moves, from 100 to 2."""
    annealing = AlphaAnnealing(4, shape="geometric", hold=3)
    values = [annealing.alpha.item(), *(annealing.step() for _ in range(annealing.last_step + 2))]
    assert values[:4] == pytest.approx([1.01] * 4)
    assert values[7:] == pytest.approx([1.5] * 3)
    gaps = [1 / (alpha - 1) for alpha in values[3:8]]
    assert [before / after for before, after in pairwise(gaps)] == pytest.approx([50**0.25] * 4, rel=1e-5)
    again = AlphaAnnealing(4, shape="geometric", hold=3)
    again.load_state_dict(annealing.state_dict() | {"taken": 5})
    assert again.alpha.item() == pytest.approx(values[5])
    assert annealing.is_at_rest
    assert not again.is_at_rest
    assert "geometric, held for 3, step 5 of 7" in repr(again)


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
    assert second.step() == first.step()
    second.load_state_dict({"taken": 4})
    assert second.step() == first.alpha


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 3}, "steps 10 for 3"),
        ({"start": 1.1}, r"start 1\.01 for 1\.1"),
        ({"end": 2}, r"end 1\.5 for 2\.0"),
        ({"shape": "linear", "end": 1.7}, r"end 1\.5 for 1\.7, shape 'cosine' for 'linear'"),
    ],
)
def test_a_state_with_other_arguments_is_refused(other, message):
    """Its steps would not lead to where they led."""
    state = AlphaAnnealing(10).state_dict()
    annealing = AlphaAnnealing(**{"steps": 10} | other)
    with pytest.raises(ValueError, match=message):
        annealing.load_state_dict(state)
    assert annealing.taken == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"taken": 11}, "taken must be an integer from 0 to 10, got 11"),
        ({"taken": -1}, "taken must be an integer from 0 to 10, got -1"),
        ({"taken": 2.0}, r"taken must be an integer from 0 to 10, got 2\.0"),
        ({}, "a state must hold taken"),
        ({"taken": 2, "step": 3}, "a state must hold taken"),
    ],
)
def test_a_wrong_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        AlphaAnnealing(10).load_state_dict(state)


def test_a_copy_has_a_tensor_of_its_own():
    annealing = AlphaAnnealing(10)
    for copied in (copy.copy(annealing), copy.deepcopy(annealing), pickle.loads(pickle.dumps(annealing))):
        assert copied.alpha == annealing.alpha
        value = copied.step()
        assert annealing.alpha != value
        assert copied.state_dict() == annealing.state_dict() | {"taken": copied.taken}


def test_one_made_under_inference_mode_moves_outside():
    with torch.inference_mode():
        annealing = AlphaAnnealing(2)
    assert annealing.step() > 1.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer of at least 1, got 2.5"),
        ({"steps": True}, "steps must be an integer of at least 1, got True"),
        ({"steps": 3, "hold": -1}, "hold must be an integer of at least 0, got -1"),
        ({"steps": 3, "hold": 0.5}, "hold must be an integer of at least 0, got 0.5"),
        ({"steps": 3, "start": 1.0}, r"start must be in \[1.01, 2\].*, got 1.0"),
        ({"steps": 3, "end": 2.5}, r"end must be in \[1.01, 2\].*, got 2.5"),
        ({"steps": 3, "shape": "sigmoid"}, "shape must be one of 'linear', 'cosine', 'geometric', got 'sigmoid'"),
        ({"steps": 3, "shape": ["linear"]}, r"shape must be one of .*, got \['linear'\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlphaAnnealing(**arguments)


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("number", ["1.2", True, None, torch.tensor(1.2)])
def test_ends_are_numbers(name, number):
    with pytest.raises(TypeError, match=rf"{name} must be a number in \[1.01, 2\], got "):
        AlphaAnnealing(3, **{name: number})
