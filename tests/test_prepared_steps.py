"""Forward passes and training steps like one before: launched from notes, they do what Triton would be asked to do."""

import pytest
import torch
from conftest import HAS_CUDA
from test_launch import shown

pytest.importorskip("triton", minversion="3.6", reason="launches are direct with Triton 3.6 and later")
if HAS_CUDA:
    pytest.skip("as if there were a GPU; test_cuda.py launches on one", allow_module_level=True)

from direct_launches import forget
from prepared_steps import (
    WAYS,
    Given,
    all_rows_first,
    attend,
    bits,
    by_notes,
    given,
    named,
    not_by_notes,
    other_gradient,
    prepare,
    rows_first,
    step,
    unaligned,
)
from triton import knobs

from flash_entmax.backends.triton import config, plan, prepared_backward
from flash_entmax.backends.triton.scratch import Scratch
from flash_entmax.backends.triton.stages import BACKWARD
from flash_entmax.operators import dispatch


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


CALLS = {
    "plain": (given, {}),
    "causal": (given, {"is_causal": True, "alpha": 1.3, "scale": 0.5, "softcap": 20.0}),
    "float32": (lambda: given(dtype=torch.float32), {}),
    "rows first": (all_rows_first, {"is_causal": True}),
    "another gradient": (other_gradient, {"is_causal": True}),
    "lengths": (given, {"is_causal": True, "key_lengths": torch.tensor([3, 130]), "query_positions": 60}),
    "a window": (given, {"window_size": (20, 0)}),
    "slopes": (given, {"is_causal": True, "scale": 0.5, "alibi_slopes": torch.tensor([0.5, 0.01])}),
    "slopes by row": (given, {"window_size": (20, 0), "alibi_slopes": torch.tensor([[0.5, 0.0], [0.1, 0.2]])}),
    "a moving alpha": (given, {"is_causal": True, "alpha": torch.tensor(1.3), "softcap": 20.0}),
    "alpha by head": (given, {"alpha": torch.tensor([1.3, 1.9]), "scale": torch.tensor([0.1, 0.5])}),
    "single keys": (lambda: given(70, 500, batch=1), {}),
    "more queries than keys": (lambda: given(130, 70), {"is_causal": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_from_notes_are_those_through_triton(name, way, launches):
    make, options = CALLS[name]
    first, asked = way(make(), **options), list(launches.all)
    prepare(way, make, **options)
    launches.direct.clear()
    results = by_notes(launches, way, make(), **options)
    assert [r.stride() for r in results] == [r.stride() for r in first]
    for wanted, direct in zip(asked, launches.direct, strict=True):
        assert wanted[:2] == direct[:2]
        *like, config = wanted[2]
        *addresses, same = direct[2]
        assert config is same
        assert shown(like, like) == shown(addresses, like)


RUN = {  # in Triton's interpreter, with the limits of plan.py that make them run in chunks
    "lengths": {},
    "rows first": {},
    "single keys": {"MAXIMA": 2**10, "LISTED": 16, "REACHING": 2**10, "FEWEST_SHARED": 1},
}


@pytest.mark.parametrize("name", RUN)
def test_what_notes_launch_gives_the_bits_of_the_first_call(name, way, launches, monkeypatch):
    for limit, number in RUN[name].items():
        monkeypatch.setattr(plan, limit, number)
    make, options = CALLS[name]
    tensors = make()
    launches.are_run = True
    expected = way(tensors, **options)
    launches.are_run = False
    if RUN[name]:
        assert names(launches.all).count("scan_kernel") > 1, "chunks"
    if RUN[name] and way is step:
        assert names(launches.all).count("gradient_query_kernel") > 1
        assert names(launches.all).count("gradient_key_value_kernel") > 1
        assert "add_parts_kernel" in names(launches.all)
    prepare(way, make, **options)
    launches.are_run = True
    assert all(map(torch.equal, bits(by_notes(launches, way, tensors, **options)), bits(expected)))


def test_steps_of_long_rows_find_their_words_again(launches, monkeypatch):
    """Beyond Config.STORED_TILES tiles of keys, no words are kept."""
    for tiles in (3, 2):
        monkeypatch.setattr(config, "reach_limits", lambda *_, tiles=tiles: (64, tiles))
        config._config.cache_clear()
        forget()
        dispatch.kept.clear()
        launches.all.clear()
        step(given())
        asked = launches.all.copy()
        prepare(step, given)
        launches.direct.clear()
        by_notes(launches, step, given())
        assert [launch[:2] for launch in asked] == [launch[:2] for launch in launches.direct]
        assert ("reaching_kernel" in names(asked)) == (tiles == 2)
    config._config.cache_clear()


def names(launched: list[tuple]) -> list[str]:
    return [kernel.fn.__name__ for kernel, *_ in launched]


def test_state_is_zero_where_kernels_need_it(launches):
    """Records and words, each in a place of its own."""
    prepare(step, given)
    launches.direct.clear()
    output = attend(given())
    maximum, offset, reached_keys, words = output.grad_fn.saved_tensors[4:8]
    assert maximum.shape == offset.shape == output.shape[:3]
    assert not reached_keys.any()
    assert not words.any()
    assert reached_keys.is_contiguous()
    assert words.data_ptr() >= reached_keys.data_ptr() + reached_keys.numel() * 4
    solve, certify = (named(launches.direct, kernel) for kernel in ("solve_kernel", "certify_kernel"))
    assert solve["reached_keys"] == reached_keys.data_ptr()
    assert certify["words"] == words.data_ptr()


def test_scratch_is_that_of_each_call(way, launches, monkeypatch):
    prepare(way, given)
    memories, allocate = [], Scratch.allocate

    def kept(*arguments) -> torch.Tensor:
        memories.append(allocate(*arguments))
        return memories[-1]

    monkeypatch.setattr(Scratch, "allocate", kept)
    for _ in range(2):
        memories.clear()
        launches.direct.clear()
        by_notes(launches, way, given())
        first = memories[0].data_ptr()
        assert named(launches.direct, "scan_kernel")["lists"] == first
        assert first < named(launches.direct, "output_kernel")["counts"] < first + memories[0].numel()


def test_gradients_are_those_that_kernels_write(launches):
    prepare(step, given)
    launches.direct.clear()
    _, *gradients = step(given())
    dq, dkv = (named(launches.direct, f"gradient_{kernel}_kernel") for kernel in ("query", "key_value"))
    written = dq["grad_query"], dkv["grad_key"], dkv["grad_value"]
    assert [gradient.data_ptr() for gradient in gradients] == [matrix[0] for matrix in written]


def test_one_tensor_may_be_query_key_and_value(launches):
    def make() -> Given:
        tensor = torch.randn(1, 2, 70, 32, dtype=torch.float16, requires_grad=True)
        return Given(tensor, tensor, tensor, torch.randn_like(tensor))

    def self_attention(tensors: Given) -> list[torch.Tensor]:
        output = attend(tensors)
        return [output, *torch.autograd.grad(output, tensors[0], tensors.grad_output)]

    prepare(self_attention, make)
    query, key, value, grad_output = (torch.randn(1, 2, 70, 32, dtype=torch.float16) for _ in range(4))
    launches.direct.clear()
    by_notes(launches, step, Given(*(t.requires_grad_() for t in (query, key, value)), grad_output))
    scan = named(launches.direct, "scan_kernel")
    assert (scan["query"][0], scan["key"][0]) == (query.data_ptr(), key.data_ptr())
    last = named(launches.direct, "gradient_key_value_kernel")
    assert [last[name][0] for name in ("query", "key", "value", "grad_output")] == [
        tensor.data_ptr() for tensor in (query, key, value, grad_output)
    ]


@pytest.mark.parametrize("name", Given._fields)
def test_unaligned_tensors_go_another_way(name, launches):
    prepare(step, given)
    not_by_notes(launches, step, given()._replace(**{name: unaligned(getattr(given(), name))}))
    by_notes(launches, step, given())


@pytest.mark.parametrize("name", Given._fields)
def test_unaligned_tensors_write_nothing_down(name, launches):
    """All is prepared, and nothing written down yet."""
    for _ in range(2):
        step(given())
    not_by_notes(launches, step, given()._replace(**{name: unaligned(getattr(given(), name))}))
    step(given())
    by_notes(launches, step, given())


CHANGES = {
    "dtype": lambda: given(dtype=torch.float32),
    "length": lambda: given(keys=131),
    "query strides": lambda: given()._replace(query=rows_first(given().query)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_tensors_have_launches_of_their_own(name, way, launches):
    prepare(way, given)
    for _ in range(2):
        not_by_notes(launches, way, CHANGES[name]())
    by_notes(launches, way, CHANGES[name]())
    by_notes(launches, way, given())


@pytest.mark.parametrize("make", [other_gradient, lambda: expanded(given())])
def test_other_strides_of_a_gradient_have_launches_of_their_own(make, launches):
    prepare(step, given)
    for _ in range(2):
        launches.direct.clear()
        tensors = make()
        step(tensors)
        grad_output = named(launches.direct, "gradient_query_kernel")["grad_output"]
        if tensors.grad_output.stride(3) == 1:
            assert grad_output == (tensors.grad_output.data_ptr(), *tensors.grad_output.stride()[:3])
        else:
            assert grad_output[0] != tensors.grad_output.data_ptr(), "an aligned copy"
    by_notes(launches, step, given())


def expanded(tensors: Given) -> Given:
    return tensors._replace(grad_output=torch.ones((), dtype=torch.float16).expand(tensors.grad_output.shape))


def test_strides_that_change_all_the_time_are_not_kept(launches, monkeypatch):
    monkeypatch.setattr(prepared_backward, "MOST_LAYOUTS", 1)
    prepare(step, given)
    for _ in range(3):
        not_by_notes(launches, step, other_gradient())
    by_notes(launches, step, given())


@pytest.mark.parametrize("what", ["a hook", "debugging"])
def test_launches_that_somebody_is_told_of_go_through_triton(what, way, launches, monkeypatch):
    prepare(way, given)
    direct, by_triton = len(launches.direct), len(launches.by_triton)
    if what == "debugging":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    else:
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda *_: None)
    way(given())
    assert len(launches.direct) == direct
    assert len(launches.by_triton) > by_triton


def test_a_hook_between_the_passes_is_told_of_the_second(launches, monkeypatch):
    prepare(step, given)
    tensors, by_triton = given(), len(launches.by_triton)
    output = attend(tensors)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda *_: None)
    torch.autograd.grad(output, tensors[:3], tensors.grad_output)
    assert len(launches.by_triton) == by_triton + len(BACKWARD)
