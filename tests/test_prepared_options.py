"""Calls with tensors among their options: they launch from notes too, each with its own alpha, scale, slopes."""

import pytest
import torch
from conftest import HAS_CUDA

pytest.importorskip("triton", minversion="3.6", reason="launches are direct with Triton 3.6 and later")
if HAS_CUDA:
    pytest.skip("as if there were a GPU; test_cuda.py launches on one", allow_module_level=True)

from prepared_steps import attend, bits, by_notes, forward, given, not_by_notes, prepare, step

from flash_entmax.operators import dispatch

OWN = {
    "alpha": (torch.tensor([1.2, 1.6]), torch.tensor([1.9, 1.3])),
    "scale": (torch.tensor(0.1), torch.tensor(0.7)),
    "alibi_slopes": (torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.1])),
}


@pytest.mark.parametrize("way", [forward, step])
@pytest.mark.parametrize("name", OWN)
def test_notes_take_the_tensors_of_each_call(name, way, launches):
    """Of alpha, scale and slopes, beside intervals of its own."""
    tensors, (first, other) = given(), ({name: own, "window_size": (20, 0)} for own in OWN[name])
    launches.are_run = True
    expected = way(tensors, **other)
    dispatch.kept.clear()
    prepare(way, given, **first)
    results = by_notes(launches, way, tensors, **other)
    assert all(map(torch.equal, bits(results), bits(expected)))


@pytest.mark.parametrize("name", OWN)
def test_a_learned_tensor_finds_the_operator(name, launches):
    options = {name: OWN[name][0]}
    prepare(step, given, **options)
    learned = {name: OWN[name][0].clone().requires_grad_()}
    launches.are_run = True
    not_by_notes(launches, step, given(), **learned)
    attend(given(), **learned).sum().backward()
    assert learned[name].grad.isfinite().all()
    launches.are_run = False
    with torch.no_grad():
        attend(given(), **options)
    by_notes(launches, step, given(), **options)
