"""Recording beside other threads, within a module, of calls whose inputs change; and what is refused."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from test_inspection import Model

from flash_entmax import entmax_attention, inspection
from flash_entmax.testing import iid_inputs


def test_each_thread_has_its_own_running_modules():
    """Names are of the recording's thread, whatever another does with the same model meanwhile."""
    model, x = Model(), torch.randn(1, 5, 16)
    inside, recorded = threading.Event(), threading.Event()

    def hold(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert recorded.wait(60)

    holding = model.layers[1]["attention"].mix.register_forward_hook(hold)
    with ThreadPoolExecutor(1) as pool, inspection.record(model) as calls:
        beside = pool.submit(model, x)
        assert inside.wait(60)
        entmax_attention(*iid_inputs(1, 1, 5, 8))
        model(x, own=True)
        recorded.set()
        expected = beside.result(60)
        entmax_attention(*iid_inputs(1, 1, 5, 8))
    holding.remove()
    assert [call.name for call in calls] == ["call 0", "layers.0.attention", "layers.1.attention", "Model", "call 4"]
    torch.testing.assert_close(model(x), expected)


def test_two_threads_record_one_model():
    model, x = Model(layers=3), torch.randn(1, 5, 16)
    both = threading.Barrier(2, timeout=60)

    def names():
        with inspection.record(model) as calls:
            both.wait()
            for _ in range(20):
                model(x)
            both.wait()
        return [call.name for call in calls]

    with ThreadPoolExecutor(2) as pool:
        recorded = [pool.submit(names) for _ in range(2)]
        assert all(names.result(60) == [f"layers.{n}.attention" for n in range(3)] * 20 for names in recorded)


def test_a_recording_may_begin_and_end_within_a_module():
    model, x = Model(), torch.randn(1, 5, 16)
    recording, calls = ExitStack(), []
    first, last = model.layers[0]["attention"], model.layers[1]["attention"]
    handles = [
        first.register_forward_pre_hook(lambda *_: calls.append(recording.enter_context(inspection.record(model)))),
        last.register_forward_hook(lambda *_: recording.close()),
    ]
    model(x)
    for handle in handles:
        handle.remove()
    assert len(calls[0]) == 2
    assert calls[0][1].name == "layers.1.attention"


def test_slopes_written_to_after_the_call_are_those_of_the_call(backend):
    """As an optimizer's step does; what is computed later is of the call."""
    query, key, value = (tensor.to(backend.device) for tensor in iid_inputs(1, 2, 20, 8))
    slopes = torch.full((1, 2), 0.1, device=backend.device, requires_grad=True)
    options = {"alibi_slopes": slopes, "impl": backend.impl}
    expected = entmax_attention(query, key, value, return_support=True, **options)[1]
    with inspection.record() as calls:
        entmax_attention(query, key, value, **options)
    rows = inspection.attention_rows(query, key, **options)
    with torch.no_grad():
        slopes.add_(3.0)
    assert torch.equal(calls[0].support.size, expected.size)
    assert torch.equal(calls[0].rows().to_dense(), rows.to_dense())


WRONG = {
    "model": (
        lambda: inspection.record([]).__enter__(),
        TypeError,
        "model must be a torch.nn.Module or None, got list",
    ),
    "only": (lambda: inspection.record(only="layers.0").__enter__(), TypeError, "only must be a function .*'layers.0'"),
    "keep_inputs": (lambda: inspection.record(keep_inputs=0).__enter__(), TypeError, "keep_inputs must be .* got 0"),
    "batch": (lambda: rows_of(batch=1.0), TypeError, "batch must be an integer, got 1.0"),
    "flag": (lambda: rows_of(head=True), TypeError, "head must be an integer, got True"),
    "none": (lambda: rows_of(head=None), TypeError, "head must be an integer, got None"),
    "below": (lambda: rows_of(head=-1), IndexError, "head must be from 0 to 1, got -1"),
    "beyond": (lambda: rows_of(batch=1), IndexError, "batch must be from 0 to 0, got 1"),
    "slice": (lambda: rows_of(head=slice(2)), TypeError, "head must be an integer, got slice"),
}


def rows_of(**place):
    query, key, value = iid_inputs(1, 2, 5, 8)
    with inspection.record() as calls:
        entmax_attention(query, key, value)
    with pytest.raises((TypeError, IndexError)) as of_call:
        calls[0].rows(**place)
    with inspection.record() as none, pytest.raises(type(of_call.value), match=re.escape(str(of_call.value))):
        inspection.attention_rows(query, key, **place)
    assert not none, "refused before anything runs"
    raise of_call.value


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()
