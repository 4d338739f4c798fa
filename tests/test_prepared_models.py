"""Calls as models make them launch from notes too: under autocast, and with intervals that are given."""

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="launches are direct with Triton 3.6 and later")

from prepared_steps import WAYS, Given, by_notes, given, prepare

from flash_entmax import functional
from flash_entmax.core.call import ScoreOptions
from flash_entmax.core.visibility import Visibility
from flash_entmax.operators import dispatch


def under_autocast(way, dtype=torch.float16):
    """The call under autocast, which trains in `dtype` whatever the weights' dtype is."""

    def run(tensors: Given, **options) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype):
            return way(tensors, **options)

    return run


def as_under_autocast() -> Given:
    """As a model has them: positions leave queries and keys in float32, values come in 16 bits."""
    query, key, value, grad_output = given()
    wide = (tensor.detach().float().requires_grad_() for tensor in (query, key))
    return Given(*wide, value, grad_output)


@pytest.mark.parametrize("name", WAYS)
def test_autocast_launches_from_notes(name, launches):
    """And gives the bits of the same call on tensors in its dtype."""
    way, launches.are_run = WAYS[name], True
    prepare(under_autocast(way), as_under_autocast, is_causal=True)
    tensors = as_under_autocast()
    results = by_notes(launches, under_autocast(way), tensors, is_causal=True)
    narrow = (tensor.detach().half().requires_grad_() for tensor in tensors[:3])
    wanted = way(Given(*narrow, tensors.grad_output), is_causal=True)
    assert results[0].dtype == torch.float16
    for result, other in zip(results, wanted, strict=True):
        assert torch.equal(result, other.to(result.dtype))


def attend_within(intervals: torch.Tensor, tensors: Given) -> torch.Tensor:
    """As a layer of Transformers does: intervals are made once for all layers, from padding and positions."""
    visibility = Visibility(window_size=(-1, 0), known_intervals=intervals)
    return functional.attend(*tensors[:3], ScoreOptions(1.5, None), visibility, "triton", False)


@pytest.mark.parametrize("queries", [70, 5])
def test_given_intervals_are_taken_from_notes(queries, launches):
    """Forward pass and step, of many queries and of few, with other intervals each time."""
    launches.are_run = True
    tensors = given(queries)
    intervals = [
        Visibility(True, key_lengths=torch.tensor(n)).intervals(tensors.query, 130) for n in ((130, 7), (3, 90))
    ]

    def both(own: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            alone = attend_within(own, tensors)
        output = attend_within(own, tensors)
        return [alone, output, *torch.autograd.grad(output, tensors[:3], tensors.grad_output)]

    fresh = []
    for own in intervals:
        dispatch.kept.clear()
        fresh.append(both(own))
    for _ in range(2):
        both(intervals[0])
    for own, expected in zip(intervals, fresh, strict=True):
        opened = launches.opened
        results = both(own)
        assert launches.opened == opened
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
