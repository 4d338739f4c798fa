"""What a call is lowered to is kept for calls like it: these have the same results, and the same refusals."""

import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.core.call import ScoreOptions
from flash_entmax.core.visibility import Visibility
from flash_entmax.functional import attend
from flash_entmax.operators import dispatch
from flash_entmax.operators.attention import OptionTensors
from flash_entmax.testing import iid_inputs

OPTIONS = {"alpha": 1.5, "is_causal": True, "scale": 1.0, "window_size": (-1, -1), "softcap": 2.0}


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch):
    monkeypatch.setattr(dispatch, "kept", OrderedDict())


@pytest.fixture
def inputs():
    return iid_inputs(1, 2, 70, 16)


def test_a_call_like_another_is_not_checked_again(inputs, monkeypatch):
    first = entmax_attention(*inputs, **OPTIONS)
    monkeypatch.setattr("flash_entmax.operators.kept_calls.checked_inputs", None)
    assert torch.equal(entmax_attention(*inputs, **OPTIONS), first)


@pytest.mark.parametrize(
    ("name", "value"),
    [("is_causal", 1), ("alpha", "1.5"), ("scale", True), ("softcap", True), ("window_size", (-1, True))],
)
def test_an_option_of_another_type_is_still_refused(inputs, name, value):
    accepted = {"scale": 1.0, "softcap": 1.0, "window_size": (-1, 1)}.get(name, OPTIONS[name])
    entmax_attention(*inputs, **OPTIONS | {name: accepted})
    with pytest.raises((TypeError, ValueError), match=name):
        entmax_attention(*inputs, **OPTIONS | {name: value})


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:, :1], lambda t: t[:, :, :3]])
def test_other_tensors_are_still_refused(inputs, change):
    query, key, value = inputs
    entmax_attention(query, key, value, **OPTIONS)
    with pytest.raises((TypeError, ValueError)):
        entmax_attention(query, key, change(value), **OPTIONS)


def test_gradients_are_asked_for_by_each_call(inputs):
    with torch.no_grad():
        entmax_attention(*inputs, **OPTIONS)
    query = inputs[0].requires_grad_()
    assert entmax_attention(query, *inputs[1:], **OPTIONS).requires_grad
    with torch.inference_mode():
        entmax_attention(*inputs, **OPTIONS)
    entmax_attention(query, *inputs[1:], **OPTIONS).sum().backward()
    assert query.grad.isfinite().all()


def test_autocast_counts(inputs):
    entmax_attention(*inputs, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert entmax_attention(*inputs, **OPTIONS).dtype == torch.bfloat16
    assert entmax_attention(*inputs, **OPTIONS).dtype == torch.float32


def test_a_call_under_autocast_is_not_checked_again(inputs, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        first = entmax_attention(*inputs, **OPTIONS)
        monkeypatch.setattr("flash_entmax.operators.kept_calls.checked_inputs", None)
        assert torch.equal(entmax_attention(*inputs, **OPTIONS), first)
    narrow = (tensor.bfloat16() for tensor in inputs)
    assert torch.equal(entmax_attention(*narrow, **OPTIONS), first)


def test_calls_with_masks_are_not_kept(inputs):
    entmax_attention(*inputs, key_mask=torch.ones(1, 70, dtype=torch.bool))
    assert not dispatch.kept


OWN = {
    "alpha": [torch.tensor(1.2), torch.tensor(1.9)],
    "scale": [torch.tensor([0.1, 1.0]), torch.tensor([1.0, 0.1])],
    "alibi_slopes": [torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.1])],
}


@pytest.mark.parametrize("name", OWN)
def test_tensors_among_the_options_are_those_of_each_call(inputs, name, monkeypatch):
    fresh = []
    for own in OWN[name]:
        dispatch.kept.clear()
        fresh.append(entmax_attention(*inputs, is_causal=True, **{name: own}))
    monkeypatch.setattr("flash_entmax.operators.kept_calls.checked_inputs", None)
    for own, expected in zip(OWN[name], fresh, strict=True):
        assert torch.equal(entmax_attention(*inputs, is_causal=True, **{name: own}), expected)
    assert not torch.equal(*fresh)
    assert all(tensor is None for call in dispatch.kept.values() for tensor in call.lowered.tensors)


@pytest.mark.parametrize("name", OWN)
def test_kept_calls_learn_their_tensors(inputs, name):
    """Some calls of a kind ask for gradients of their tensors, and others do not."""
    own = OWN[name][0]
    for _ in range(3):
        entmax_attention(*inputs, is_causal=True, **{name: own})
    learned, exact = own.clone().requires_grad_(), own.double().requires_grad_()
    entmax_attention(*inputs, is_causal=True, **{name: learned}).square().sum().backward()
    wide = (tensor.double() for tensor in inputs)
    entmax_attention(*wide, is_causal=True, impl="reference", **{name: exact}).square().sum().backward()
    torch.testing.assert_close(learned.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("alpha", torch.tensor(2.5)),
        ("alpha", torch.tensor([1.2, 1.2, 1.2])),
        ("alpha", torch.tensor(1)),
        ("scale", torch.tensor([0.1])[:0]),
        ("alibi_slopes", torch.tensor([0.5, 0.1], device="meta")),
        ("alibi_slopes", torch.tensor([1, 2])),
        ("alibi_slopes", [0.5, 0.0]),
    ],
)
def test_other_tensors_among_the_options_are_still_refused(inputs, name, wrong):
    for _ in range(2):
        entmax_attention(*inputs, **{name: OWN[name][0]})
    with pytest.raises((TypeError, ValueError), match=name):
        entmax_attention(*inputs, **{name: wrong})


def test_intervals_that_are_given_are_those_of_each_call(inputs, monkeypatch):
    """As layers of Transformers give them: made once for all layers, from padding and positions."""
    score, fresh = ScoreOptions(1.5, None), []
    intervals = [
        Visibility(True, key_lengths=torch.tensor([length])).intervals(inputs[0], 70) for length in (70, 5, 33)
    ]
    for given in intervals:
        dispatch.kept.clear()
        fresh.append(attend(*inputs, score, Visibility(known_intervals=given), "auto", False))
    monkeypatch.setattr("flash_entmax.operators.kept_calls.checked_inputs", None)
    for given, expected in zip(intervals, fresh, strict=True):
        assert torch.equal(attend(*inputs, score, Visibility(known_intervals=given), "auto", False), expected)


@pytest.mark.parametrize("positions", [1.5, "x", torch.arange(70.0), torch.arange(3)])
def test_positions_beside_given_intervals_are_still_refused(inputs, positions):
    """They decide nothing there, and are options all the same."""
    score = ScoreOptions(1.5, None)
    given = Visibility(True, key_lengths=torch.tensor([70])).intervals(inputs[0], 70)
    for accepted in (None, 3, torch.arange(70)):
        attend(*inputs, score, Visibility(query_positions=accepted, known_intervals=given), "auto", False)
    with pytest.raises((TypeError, ValueError), match="query_positions"):
        attend(*inputs, score, Visibility(query_positions=positions, known_intervals=given), "auto", False)


def test_intervals_of_another_dtype_are_another_call(inputs):
    given = Visibility(True, key_lengths=torch.tensor([70])).intervals(inputs[0], 70)
    for intervals in (given, given.long()):
        attend(*inputs, ScoreOptions(1.5, None), Visibility(known_intervals=intervals), "auto", False)
    assert len(dispatch.kept) == 2


def test_intervals_are_those_of_each_call(inputs, monkeypatch):
    """Windows and lengths are kept without the intervals that they make."""
    options, lengths = {"window_size": (30, 0)}, [torch.tensor([length]) for length in (70, 5, 70)]
    fresh = []
    for length in lengths:
        fresh.append(entmax_attention(*inputs, **options, key_lengths=length))
        dispatch.kept.clear()
    entmax_attention(*inputs, **options, key_lengths=lengths[0])
    monkeypatch.setattr("flash_entmax.operators.kept_calls.checked_inputs", None)
    again = [entmax_attention(*inputs, **options, key_lengths=length) for length in lengths]
    assert all(map(torch.equal, fresh, again))
    assert not torch.equal(fresh[0], fresh[1])
    query = inputs[0].requires_grad_()
    entmax_attention(query, *inputs[1:], **options, key_lengths=lengths[1]).sum().backward()
    assert query.grad[:, :, 40:].eq(0).all(), "these queries see no key"
    assert all(tensor is None for call in dispatch.kept.values() for tensor in call.lowered.tensors)


@pytest.fixture
def tokens():
    return [tensor.squeeze(0).transpose(0, 1) for tensor in iid_inputs(1, 2, 70, 16)]


def test_boundaries_are_those_of_each_call(tokens, monkeypatch):
    """However many sequences there are: calls with as many tokens are alike."""
    given = [torch.tensor(list(each), dtype=torch.int32) for each in ((0, 70), (0, 3, 3, 40), (0, 30, 70), (0, 70))]
    fresh = []
    for boundaries in given:
        dispatch.kept.clear()
        fresh.append(entmax_attention_varlen(*tokens, boundaries, None, 70, 70, is_causal=True))
    monkeypatch.setattr("flash_entmax.operators.kept_calls.checked_inputs", None)
    for boundaries, expected in zip(given, fresh, strict=True):
        assert torch.equal(entmax_attention_varlen(*tokens, boundaries, None, 70, 70, is_causal=True), expected)
    assert not torch.equal(fresh[0], fresh[2])
    query = tokens[0].requires_grad_()
    entmax_attention_varlen(query, *tokens[1:], given[1], None, 70, 70, is_causal=True).sum().backward()
    assert query.grad[40:].eq(0).all(), "these tokens are in no sequence"
    assert len(dispatch.kept) == 1
    assert all(tensor is None for call in dispatch.kept.values() for tensor in call.lowered.tensors)


RIGHT = torch.tensor([0, 30, 70])


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"cu_seq_q": RIGHT.double()}, "cu_seq_q"),
        ({"cu_seq_q": RIGHT[None]}, "cu_seq_q"),
        ({"cu_seq_q": RIGHT.to("meta")}, "cu_seq_q"),
        ({"cu_seq_q": torch.tensor([0, 50, 20])}, "cu_seq_q"),
        ({"cu_seq_k": RIGHT[:2]}, "cu_seq_k"),
        ({"cu_seq_k": [0, 30, 70]}, "cu_seq_k"),
        ({"max_q": 20}, "cu_seq_q"),
        ({"max_q": 70.0}, "max_q"),
        ({"max_k": True}, "max_k"),
    ],
)
def test_other_boundaries_are_still_refused(tokens, wrong, name):
    options = {"cu_seq_q": RIGHT, "cu_seq_k": RIGHT.clone(), "max_q": 70, "max_k": 70}
    entmax_attention_varlen(*tokens, **options)
    with pytest.raises((TypeError, ValueError), match=name):
        entmax_attention_varlen(*tokens, **options | wrong)


@pytest.mark.parametrize("wrong", [torch.tensor([5.0]), torch.tensor([5, 5]), torch.tensor([5], device="meta"), [5]])
def test_other_lengths_are_still_refused(inputs, wrong):
    entmax_attention(*inputs, key_lengths=torch.tensor([5]))
    with pytest.raises((TypeError, ValueError), match="key_lengths"):
        entmax_attention(*inputs, key_lengths=wrong)


def test_the_oldest_call_goes(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_KEPT", 3)
    for length in range(1, 9):
        entmax_attention(*iid_inputs(1, 1, length, 16))
    assert len(dispatch.kept) == 3


def test_a_call_that_is_used_stays(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_KEPT", 3)
    dispatch.kept.clear()
    used = iid_inputs(1, 1, 20, 16)
    entmax_attention(*used)
    (first,) = dispatch.kept.values()
    for length in range(1, 9):
        entmax_attention(*iid_inputs(1, 1, length, 16))
        entmax_attention(*used)
    assert len(dispatch.kept) == 3
    assert any(call is first for call in dispatch.kept.values())


def test_threads_keep_calls_at_the_same_time(monkeypatch):
    """Every step of a decoder has a length of its own: threads drop old calls while others keep new ones."""
    monkeypatch.setattr(dispatch, "MOST_KEPT", 3)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(keep_calls, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(dispatch.kept) <= 3 + 4


def keep_calls(thread: int) -> None:
    lowered = dispatch.Lowered(OptionTensors(*[None] * len(OptionTensors._fields)), ())
    for number in range(50_000):
        dispatch.keep((thread, number), lowered)
