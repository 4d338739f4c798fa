"""Calls of few queries like one before: what is launched from notes is what Triton would be asked to launch."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from conftest import HAS_CUDA
from test_launch import shown

pytest.importorskip("triton", minversion="3.6", reason="launches are direct with Triton 3.6 and later")
if HAS_CUDA:
    pytest.skip("as if there were a GPU; test_cuda.py launches on one", allow_module_level=True)

from triton import knobs

from flash_entmax import entmax_attention
from flash_entmax.backends.triton import plan
from flash_entmax.backends.triton.prepared_decode import PreparedDecode
from flash_entmax.operators import dispatch


def inputs(queries: int = 2, keys: int = 200, dtype=torch.float16) -> list[torch.Tensor]:
    shapes = (2, 4, queries, 32), (2, 2, keys, 32), (2, 2, keys, 16)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def attend(tensors, **options) -> torch.Tensor:
    with torch.no_grad():
        return entmax_attention(*tensors, impl="triton", **options)


def attend_twice(tensors, **options) -> None:
    """The first of equal calls is lowered and compiled; the second prepares what the others are."""
    for _ in range(2):
        attend(tensors, **options)


def prepared_calls() -> list[PreparedDecode]:
    return [call.compute for call in dispatch.kept.values()]


def named(launched: tuple) -> dict:
    """The arguments of a launch by their names."""
    kernel, _, arguments = launched
    return dict(zip(inspect.signature(kernel.fn).parameters, arguments, strict=True))


def rows_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


CALLS = {
    "plain": (lambda: inputs(), {}),
    "options": (lambda: inputs(), {"alpha": 1.3, "scale": 0.5, "softcap": 20.0, "is_causal": True}),
    "float32": (lambda: inputs(dtype=torch.float32), {}),
    "rows first": (lambda: list(map(rows_first, inputs())), {"is_causal": True}),
    "lengths": (
        lambda: inputs(),
        {"is_causal": True, "key_lengths": torch.tensor([3, 200]), "query_positions": 198},
    ),
    "a window": (lambda: inputs(), {"window_size": (20, 0), "query_positions": 150}),
    "a cache with room": (lambda: [inputs()[0], *(cache[:, :, :200] for cache in inputs(keys=300)[1:])], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_from_notes_are_those_through_triton(name, launches):
    make, options = CALLS[name]
    attend_twice(make(), **options)
    launches.direct.clear()
    tensors = make()
    output = attend(tensors, **options)
    assert prepared_calls()[0].stage.written
    assert output.shape == (2, 4, 2, 16)
    assert (output.stride(1) < output.stride(2)) == (name == "rows first")
    for through_triton, direct in zip(launches.by_triton, launches.direct, strict=True):
        assert through_triton[:2] == direct[:2]
        *given, config = through_triton[2]
        *addresses, same = direct[2]
        assert config is same
        assert shown(given, given) == shown(addresses, given)
    scoring, solving, adding = map(named, launches.direct)
    assert [scoring["query"][0], scoring["key"][0], solving["value"][0]] == [tensor.data_ptr() for tensor in tensors]
    assert solving["output"][0] == adding["output"][0] == output.data_ptr()
    assert scoring["row_scores"] == solving["row_scores"] == adding["weights"]
    assert scoring["bounds"] == solving["bounds"]
    assert bool(scoring["visibility"][0]) == (name in ("lengths", "a window"))


def test_chunks_of_rows_are_all_launched(launches, monkeypatch):
    monkeypatch.setattr(plan, "DECODED", 8000)
    attend_twice(inputs())
    launches.direct.clear()
    attend(inputs())
    assert len(launches.by_triton) > 3
    assert [launched[:2] for launched in launches.direct] == [launched[:2] for launched in launches.by_triton]


def unaligned(tensors):
    query = torch.empty(tensors[0].numel() + 1, dtype=tensors[0].dtype)[1:].view(tensors[0].shape)
    return [query, *tensors[1:]]


@pytest.mark.parametrize("change", [unaligned, lambda t: [t[0], rows_first(t[1]), t[2]], lambda t: inputs(keys=199)])
def test_other_tensors_have_launches_of_their_own(change, launches):
    attend_twice(inputs())
    attend(inputs())
    launches.direct.clear()
    tensors = change(inputs())
    attend_twice(tensors)
    attend(tensors)
    scoring = named(launches.direct[-3])
    assert (scoring["query"][0] == tensors[0].data_ptr()) == (change is not unaligned), "kernels read an aligned copy"
    assert scoring["key"][1:] == tensors[1].stride()[:3]
    assert scoring["key_length"] == tensors[1].shape[2]


@pytest.mark.parametrize("what", ["a hook", "debugging"])
def test_launches_that_somebody_is_told_of_go_through_triton(what, launches, monkeypatch):
    attend_twice(inputs())
    attend(inputs())
    before = len(launches.direct)
    if what == "debugging":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    else:
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda *_: None)
    attend(inputs())
    assert len(launches.direct) == before
    assert len(launches.by_triton) == 6


def test_a_derivative_and_a_mode_find_the_operator(launches, monkeypatch):
    attend_twice(inputs())
    monkeypatch.setattr(PreparedDecode, "__call__", None)
    tensors = inputs()
    with torch.device("cpu"):  # a mode
        attend(tensors)
    with pytest.raises(TypeError):
        attend(tensors)
    tensors[1].requires_grad_()
    assert entmax_attention(*tensors, impl="triton").requires_grad


def test_what_is_empty_or_unaligned_is_not_prepared(launches):
    for tensors in (inputs(queries=0), unaligned(inputs()), [t[..., :12] for t in inputs()]):
        attend_twice(tensors)
    assert prepared_calls() == [None] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_results_are_tensors_of_their_mode(mode, launches):
    with mode():
        outputs = [entmax_attention(*inputs(), impl="triton") for _ in range(3)]
        assert prepared_calls()[0].stage.written
    assert {output.is_inference() for output in outputs} == {mode is torch.inference_mode}
