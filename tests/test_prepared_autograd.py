"""Training steps from notes, as autograd asks for them: some gradients, again, with hooks, modes and threads."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import HAS_CUDA

pytest.importorskip("triton", minversion="3.6", reason="launches are direct with Triton 3.6 and later")
if HAS_CUDA:
    pytest.skip("as if there were a GPU; test_cuda.py launches on one", allow_module_level=True)

from prepared_steps import (
    Given,
    all_rows_first,
    attend,
    by_notes,
    forward,
    given,
    named,
    not_by_notes,
    other_gradient,
    prepare,
    step,
    unaligned,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_entmax.backends.triton import launch, prepared_backward, prepared_forward
from flash_entmax.backends.triton.stages import BACKWARD, FORWARD
from flash_entmax.operators import dispatch


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_asked_for_come(needed, launches):
    prepare(step, given)
    tensors = Given(*(tensor.detach() for tensor in given()))
    inputs = [tensors[index].requires_grad_() for index in needed]
    opened = launches.opened
    attend(tensors).backward(tensors.grad_output)
    assert launches.opened == opened
    assert all(tensor.grad is not None for tensor in inputs)
    assert sum(tensor.grad is not None for tensor in tensors) == len(needed)


def test_a_backward_may_be_repeated(launches):
    prepare(step, given)
    tensors = given()
    output, opened = attend(tensors), launches.opened
    gradients = [torch.autograd.grad(output, tensors[:3], tensors.grad_output, retain_graph=True) for _ in range(3)]
    assert launches.opened == opened
    assert len({gradient.data_ptr() for three in gradients for gradient in three}) == 9
    torch.autograd.grad(output, tensors[:3], tensors.grad_output)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, tensors[:3], tensors.grad_output)


def test_what_was_changed_in_place_is_refused(launches):
    prepare(step, given)
    tensors = given()
    output = attend(tensors)
    with torch.no_grad():
        tensors.key.zero_()
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(output, tensors[:3], tensors.grad_output)


def test_a_second_derivative_is_refused(launches):
    prepare(step, given)
    tensors = given()
    gradients = torch.autograd.grad(attend(tensors), tensors[:3], tensors.grad_output, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 130])])
def test_a_checkpoint_finds_what_it_saved_whichever_way_a_call_goes(lengths, calls, launches):
    for _ in range(calls):
        step(given(), key_lengths=lengths)
    tensors = given()
    checkpoint(attend, tensors, use_reentrant=False, key_lengths=lengths).backward(tensors.grad_output)
    assert all(tensor.grad is not None for tensor in tensors[:3])


def test_what_hooks_of_autograd_give_may_have_other_strides(launches):
    prepare(step, all_rows_first)
    tensors = all_rows_first()

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous() if tensor.shape == tensors.query.shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        output = attend(tensors)
    launches.direct.clear()
    torch.autograd.grad(output, tensors[:3], tensors.grad_output)
    query = named(launches.direct, "gradient_query_kernel")["query"]
    assert query[1:] == given().query.stride()[:3]


def test_modes_batches_and_tangents_find_the_operator(launches, monkeypatch):
    prepare(step, given)
    tensors = given()
    output = attend(tensors)
    monkeypatch.setattr(prepared_backward.PreparedBackward, "__call__", None)
    with FlopCounterMode(display=False):
        torch.autograd.grad(output, tensors[:3], tensors.grad_output, retain_graph=True)
    batch = torch.stack([tensors.grad_output] * 2)
    torch.autograd.grad(output, tensors[:3], batch, is_grads_batched=True, retain_graph=True)
    with pytest.raises(TypeError):
        torch.autograd.grad(output, tensors[:3], tensors.grad_output)
    monkeypatch.setattr(prepared_forward.PreparedForward, "__call__", None)
    torch.func.grad(lambda query: attend(tensors._replace(query=query)).float().sum())(tensors.query)
    with pytest.raises(TypeError):
        attend(tensors)


def test_gradients_and_none_take_turns(launches):
    prepare(step, given)
    prepare(forward, given)
    for way in (forward, step, forward, step):
        results = by_notes(launches, way, given())
        assert results[0].requires_grad == (way is step)
    with torch.inference_mode():
        assert attend(given()).is_inference()


def test_nothing_is_launched_before_all_kernels_are_compiled(launches, monkeypatch):
    monkeypatch.setattr(launch.Recording, "add", lambda *_: None)
    for _ in range(4):
        not_by_notes(launches, step, given())


def test_threads_take_the_same_notes(launches):
    """Each has results of its own; the first calls of a kind meet."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        step(given())
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(take_steps, range(2)))
    finally:
        sys.setswitchinterval(interval)
    (call,) = dispatch.kept.values()
    assert call.record.args[0].forward.stage.written
    launches.direct.clear()
    by_notes(launches, step, given())
    assert len(launches.direct) == len(FORWARD) + 1 + len(BACKWARD)


def take_steps(thread: int) -> None:
    for number in range(20):
        tensors = given() if number % 2 else other_gradient()
        assert len(step(tensors)) == 4


def test_what_is_empty_or_unaligned_is_not_prepared(launches):
    narrow = Given(*(tensor[..., :12].detach().requires_grad_() for tensor in given()))
    for tensors in (given(queries=0), narrow, given()._replace(value=unaligned(given().value))):
        for _ in range(3):
            not_by_notes(launches, forward, tensors) if tensors.query.numel() else forward(tensors)
            step(tensors)
    assert [(call.compute, call.record) for call in dispatch.kept.values()] == [(None, None)] * 3


def test_launches_go_to_the_device_of_the_tensors(launches, monkeypatch):
    prepare(step, given)
    (call,) = dispatch.kept.values()
    stage = call.record.args[0].forward.stage
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert stage.is_open(SimpleNamespace(is_cuda=True, get_device=lambda: 1)) == (current == 1)
