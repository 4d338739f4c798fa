"""Deliberate faults in launches from notes, with launches faked. mutants.py explains FAULTS."""

from functools import partial
from importlib.util import find_spec
from inspect import signature

import pytest
from conftest import HAS_CUDA
from mutants import Mutant, plant

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("as if there were a GPU", allow_module_level=True)

import test_prepared_autograd as of_autograd
import test_prepared_options as options
import test_prepared_steps as checks
from prepared_steps import forward, other_gradient, step

from flash_entmax.backends.triton import notes, prepared_backward, prepared_forward, written_stage
from flash_entmax.operators import dispatch, steps

CHECKS = {
    "forward": partial(checks.test_launches_from_notes_are_those_through_triton, "causal", forward),
    "step": partial(checks.test_launches_from_notes_are_those_through_triton, "another gradient", step),
    "a window": partial(checks.test_launches_from_notes_are_those_through_triton, "a window", step),
    "alpha": partial(options.test_notes_take_the_tensors_of_each_call, "alpha", step),
    "slopes": partial(options.test_notes_take_the_tensors_of_each_call, "alibi_slopes", step),
    "learned": partial(options.test_a_learned_tensor_finds_the_operator, "alpha"),
    "one tensor": checks.test_one_tensor_may_be_query_key_and_value,
    "scratch": partial(checks.test_scratch_is_that_of_each_call, step),
    "state": checks.test_state_is_zero_where_kernels_need_it,
    "gradients": checks.test_gradients_are_those_that_kernels_write,
    "unaligned": partial(checks.test_unaligned_tensors_go_another_way, "key"),
    "strides": partial(checks.test_other_strides_of_a_gradient_have_launches_of_their_own, other_gradient),
    "hooked strides": of_autograd.test_what_hooks_of_autograd_give_may_have_other_strides,
    "a hook": checks.test_a_hook_between_the_passes_is_told_of_the_second,
    "checkpoint": partial(of_autograd.test_a_checkpoint_finds_what_it_saved_whichever_way_a_call_goes, None, 1),
    "second": of_autograd.test_a_second_derivative_is_refused,
}

# Each with the check that must fail.
FAULTS = {
    "addresses of scratch are those of the first call": (
        notes.WrittenLaunches, "run", "map(first.__add__, self.starts)", "self.starts", "scratch",
    ),
    "every launch has the programs of the first": (
        notes.WrittenLaunches, "run", "run(programs, ...)", "run(self.steps[0][3], ...)", "forward",
    ),
    "the last launch is left out": (notes.WrittenLaunches, "run", "self.steps", "self.steps[:-1]", "step"),
    "alignment is not looked at": (
        notes.WrittenLaunches, "run", "reduce(or_, addresses, first) % ALIGNMENT", "False", "unaligned",
    ),
    "one tensor for three inputs has one place": (
        written_stage.WrittenStage, "write_down", "tuple(tensor.detach() for tensor in tensors)", "tensors",
        "one tensor",
    ),
    "bounds of intervals are not made": (
        written_stage.WrittenStage, "write_down", "launch_bounds(notes, ...)", "None", "a window",
    ),
    "alpha is that of the first call": (
        written_stage.WrittenStage, "run", "own_tensors(options, own.intervals)",
        "self.__dict__.setdefault('kept', own_tensors(options, own.intervals))", "alpha",
    ),
    "tensors change places": (
        written_stage.WrittenStage, "run", "(*tensors, *beside)", "(*tensors, *beside[::-1])", "alpha",
    ),
    "slopes are not those of a gradient": (
        steps.KeptAttention, "backward", "ctx.step.backward(grad_output, *saved, own)",
        "ctx.step.backward(grad_output, *saved, own._replace(alibi_slopes=0 * own.alibi_slopes))", "slopes",
    ),
    "a learned tensor gets no gradient": (
        dispatch, "attend_again", "is_direct and not is_learned", "is_direct", "learned",
    ),
    "hooks are not looked for": (
        written_stage.WrittenStage, "is_open", "not is_watched(self.watched)", "True", "a hook",
    ),
    "other strides take the notes of the first": (
        prepared_backward.PreparedBackward, "__call__", "self.layouts.get(strides)",
        "next(iter(self.layouts.values()), None)", "strides",
    ),
    "strides of what was saved are not looked at": (
        prepared_backward.PreparedBackward, "__call__", "query.stride()", "()", "hooked strides",
    ),
    "dK and dV change places": (
        prepared_backward.PreparedLayout, "__call__", "tuple(made[:3])", "(made[0], made[2], made[1])", "gradients",
    ),
    "words lie over the records": (
        prepared_forward.PreparedForward, "__call__", "reach.as_strided(*self.words)",
        "reach.as_strided(*self.words[:2])", "state",
    ),
    "what must be 0 is not": (
        prepared_forward.PreparedForward, "__call__", "torch.zeros(self.reach, **self.integers)",
        "torch.ones(self.reach, **self.integers)", "state",
    ),
    "a step saves in another order": (
        steps.KeptAttention, "forward", "ctx.save_for_backward(query, key, value, *state, *own)",
        "ctx.save_for_backward(query, key, value, *state[::-1], *own)", "checkpoint",
    ),
    "a second derivative is left out": (
        steps.KeptAttention, "backward", "torch.is_grad_enabled()", "False", "second",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_notes_is_seen(fault, launches, monkeypatch, tmp_path):
    *mutant, name = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    check, given = CHECKS[name], {"launches": launches}
    if "monkeypatch" in signature(check).parameters:
        given["monkeypatch"] = monkeypatch
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(**given)
