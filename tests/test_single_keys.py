"""Calls whose lists hold single keys and single queries: every option, quota, chunk and share of the work.

The exact answer is the reference in float64. Each call is checked to have listed single keys.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Case, boundaries, names, run
from checks import check_attention
from conftest import HAS_CUDA, backends

if not find_spec("triton"):
    pytest.skip("needs Triton", allow_module_level=True)

from single_keys import limits, lone_case, lone_inputs, with_single_keys

from flash_entmax import entmax_attention
from flash_entmax.backends.triton import config, gradient, plan
from flash_entmax.backends.triton.scratch import Scratch
from flash_entmax.testing import KEY_PATTERNS, key_sparse_inputs

(BACKEND,) = [backend for backend in backends() if backend.impl == "triton"]
DEVICE = BACKEND.device


@pytest.fixture
def set_limits():
    """Sets limits of single_keys.py for the rest of a test."""
    with ExitStack() as stack:

        def set_for_the_rest(**numbers) -> None:
            stack.enter_context(limits(**numbers))

        set_for_the_rest()
        yield set_for_the_rest


def check(case: Case):
    """Against the reference, with single keys."""
    return with_single_keys(case, lambda given: check_attention(given, "triton"))


def assert_same(case: Case, result, other) -> None:
    for name, ours, theirs in zip(names(case), result.tensors, other.tensors, strict=True):
        assert torch.equal(ours, theirs), f"{name}: other bits"


def assert_close(case: Case, result, other) -> None:
    for name, ours, theirs in zip(names(case), result.tensors, other.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item(), msg=name)


def tensor(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE)


CALLS = {
    "causal": {"is_causal": True},
    "not causal": {},
    "without a sink": {"sinks": ()},
    "alpha 1.25": {"alpha": 1.25, "is_causal": True},
    "alpha 1.3": {"alpha": 1.3, "is_causal": True},
    "alpha 2": {"alpha": 2.0, "is_causal": True},
    "alpha of each head": {"alpha": torch.tensor([1.4, 1.7]), "heads": 2, "key_heads": 2},
    "grouped heads": {"heads": 2, "is_causal": True},
    "two batch rows": {"batch": 2, "is_causal": True},
    "softcap": {"options": {"softcap": 40.0}, "is_causal": True},
    "ALiBi": {"options": {"alibi_slopes": torch.tensor([0.01, -0.02])}, "heads": 2, "is_causal": True},
    "window": {"options": {"window_size": (120, 0)}, "is_causal": True, "keys_of_topic": 4},
    "hidden keys": {"options": {"key_mask": (torch.arange(170) % 100 != 40)[None]}, "is_causal": True},
    "key lengths": {"options": {"key_lengths": torch.tensor([150])}},
    "float16": {"dtype": torch.float16, "length": 300, "dim": 64, "is_causal": True},
    "float16, alpha 1.3": {"dtype": torch.float16, "length": 300, "alpha": 1.3},
    "float16, grouped heads": {"dtype": torch.float16, "length": 300, "heads": 2, "is_causal": True},
    "wide heads": {"dim": 80, "is_causal": True},
}


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def call_case(call: str | dict) -> Case:
    """One of CALLS, or another one."""
    arguments = {key: on_device(value) for key, value in (CALLS[call] if isinstance(call, str) else call).items()}
    arguments["options"] = {key: on_device(value) for key, value in arguments.get("options", {}).items()}
    return lone_case(BACKEND, arguments.pop("length", 170), **arguments)


@pytest.mark.parametrize("name", CALLS)
def test_calls_with_single_keys_are_exact(set_limits, name):
    """And give the same bits again."""
    case = call_case(name)
    result = check(case)
    assert_same(case, result, run(case, "triton", result.grad_output))


def test_packed_sequences_with_single_keys_are_exact(set_limits):
    tensors = [tensor[0].transpose(0, 1).contiguous() for tensor in lone_inputs(260, heads=2, device=DEVICE)]
    check(Case(*tensors, is_causal=True, options={"cu_seq_q": boundaries((40, 210), DEVICE)}))


def test_more_keys_than_queries(set_limits):
    query, key, value = lone_inputs(300, device=DEVICE)
    check(Case(query[:, :, -75:], key, value, is_causal=True))


@pytest.mark.parametrize(("is_causal", "dtype"), [(True, torch.float16), (False, torch.float32)])
@pytest.mark.parametrize("pattern", KEY_PATTERNS)
def test_key_sparse_inputs_are_exact(set_limits, pattern, is_causal, dtype):
    tensors = key_sparse_inputs(pattern, 1, 1, 200, 16, dtype=dtype, device=DEVICE)
    case = Case(*tensors, is_causal=is_causal)
    check_attention(case, "triton") if pattern == "all keys of one tile" else check(case)


def test_the_real_limits(set_limits):
    """Nothing is set: the smallest call that looks for single keys."""
    set_limits(FEWEST_MARKED=8)
    check(lone_case(BACKEND, 64 * 8 if HAS_CUDA else 250, is_causal=True))


# Quota


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("quota", [32, 64])
def test_what_exceeds_the_quota_stays_whole(set_limits, quota, is_causal):
    set_limits(reach=(quota, 1024))
    case = lone_case(BACKEND, 300, is_causal=is_causal, keys_of_topic=3)
    check(case)


@pytest.mark.parametrize("name", ["grouped heads", "hidden keys", "alpha of each head"])
def test_words_that_the_backward_computes_again(set_limits, name):
    case = call_case(name)
    kept = run(case, "triton", case.grad_output())
    set_limits(reach=(64, 0))
    assert_close(case, with_single_keys(case, lambda given: run(given, "triton", kept.grad_output)), kept)


# Chunks


@pytest.mark.parametrize(
    ("name", "stored"),
    [("grouped heads", 0), ("grouped heads", 1024), ("two batch rows", 0), ("not causal", 1024), ("window", 0)],
)
def test_chunks_change_nothing_but_rounding(set_limits, name, stored):
    """Of heads, and of the tiles of each. Which keys are listed by themselves depends on them."""
    case = call_case(name)
    set_limits(reach=(64, stored))
    one = with_single_keys(case, lambda given: run(given, "triton", given.grad_output()))
    for places in (7, 40):
        set_limits(MAXIMA=places * 32, LISTED=places, REACHING=700)
        assert_close(case, run(case, "triton", one.grad_output), one)


@pytest.mark.parametrize("name", ["grouped heads", "window"])
def test_chunks_change_nothing_without_gradients(set_limits, name):
    case = call_case(name)
    options = {"is_causal": case.is_causal, **case.options}
    with torch.no_grad():
        one = entmax_attention(case.query, case.key, case.value, **options, impl="triton")
        for places in (7, 40):
            set_limits(MAXIMA=places * 32)
            again = entmax_attention(case.query, case.key, case.value, **options, impl="triton")
            torch.testing.assert_close(one, again, rtol=1e-4, atol=1e-5)


def test_a_small_limit_makes_several_chunks_of_both_kinds(set_limits):
    """What the tests of chunks rely on."""
    case = call_case("grouped heads")
    outline = config.Outline.of(case.problem, torch.float32)
    for places, splits_heads in ((7, True), (13, True), (40, False)):
        set_limits(MAXIMA=places * 32, LISTED=places, REACHING=700)
        own = plan.plan_of(outline)
        assert len({chunk.first_unit for chunk in own.forward_chunks}) > 1
        assert (len({chunk.first_tile for chunk in own.forward_chunks}) > 1) == splits_heads
        assert len({chunk.first_tile for chunk in own.key_chunks}) > 1


# Shares of the work on dK and dV


@pytest.fixture
def sharing(set_limits):
    """Short calls share out the work on tiles of keys with as few as two blocks of queries."""
    if HAS_CUDA:
        pytest.skip("Triton keeps what it compiled with FEWEST")
    return partial(set_limits, blocks_of_part=1, FEWEST_SHARED=0)


@contextmanager
def counted_parts(monkeypatch) -> Iterator[list[int]]:
    """Of each program for a tile of keys, the parts of its tile: 0 or 1 where it does all, or has nothing to do."""
    share_of, parts = gradient.share_of, []

    def counted(*arguments):
        tile, part, count = share_of(*arguments)
        parts.append(int(count.handle.data.item()) if int(tile.handle.data.item()) >= 0 else 0)
        return tile, part, count

    with monkeypatch.context() as patch:
        patch.setattr(gradient, "share_of", counted)
        yield parts


SHARED = {
    "grouped heads": {"heads": 2},
    "two batch rows, scale of each head": {
        "heads": 2, "key_heads": 2, "batch": 2, "length": 170, "scale": torch.tensor([0.17, 0.2]),
    },
    "hidden keys": {"options": {"key_mask": (torch.arange(250) != 240)[None]}},
    "float16": {"dtype": torch.float16, "length": 600, "dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_shares_add_up(sharing, name, monkeypatch):
    """The tile of a sink is split: results are those of one program for each tile, to rounding."""
    case = call_case({"length": 250, "is_causal": True, "keys_of_topic": 1} | SHARED[name])
    single = run(case, "triton", case.grad_output())
    sharing()
    with counted_parts(monkeypatch) as parts:
        shared = check(case)
    assert max(parts) > 1, "no tile was split"
    assert_same(case, shared, run(case, "triton", shared.grad_output))
    if case.query.dtype == torch.float32:
        assert_close(case, shared, single)


def test_shares_of_chunks_of_tiles_of_keys(sharing, monkeypatch):
    """Each chunk has its own plan, of its own tiles. Both chunks have a tile that is split."""
    case = call_case({"length": 256, "heads": 2, "keys_of_topic": 1, "sinks": (0, 140)})
    single = run(case, "triton", case.grad_output())
    sharing(REACHING=5600, MOST_SLOTS=4)
    chunks = plan.plan_of(config.Outline.of(case.problem, torch.float32)).key_chunks
    assert [chunk.first_tile for chunk in chunks] == [4, 0]
    with counted_parts(monkeypatch) as parts:
        assert_close(case, check(case), single)
    half = len(parts) // 2
    assert min(max(parts[:half]), max(parts[half:])) > 1


def test_more_parts_than_slots(sharing, monkeypatch):
    """Parts grow until all have slots. Tiles of no more blocks than a part are done by one program."""
    case = call_case("grouped heads")
    single = run(case, "triton", case.grad_output())
    sharing(MOST_SLOTS=3)
    with counted_parts(monkeypatch) as parts:
        assert_close(case, check(case), single)
    assert parts.count(0) > 0


# Numbers that are not finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_spoils_its_row_alone(set_limits, bad):
    case = lone_case(BACKEND, 300, is_causal=True)
    clean = check(case)
    case.query[0, 0, 200, 3] = bad
    output = entmax_attention(case.query, case.key, case.value, is_causal=True, impl="triton")
    others = torch.arange(300, device=DEVICE) != 200
    assert output[0, 0, 200].isnan().all()
    torch.testing.assert_close(output[:, :, others], clean.output[:, :, others], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["scale", "slope", "query beside slopes", "query beside hidden keys", "overflow"])
def test_bad_numbers_reach_the_same_keys_where_words_are_computed_again(set_limits, name):
    numbers = {"length": 97, "dim": 16, "is_causal": True}
    cases = {
        "scale": {"heads": 2, "key_heads": 2, "scale": torch.tensor([torch.nan, 0.2], device=DEVICE)},
        "slope": {
            "length": 96, "heads": 2, "key_heads": 2, "options": {"alibi_slopes": torch.tensor([torch.nan, 0.01])},
        },
        "query beside slopes": {"options": {"alibi_slopes": torch.tensor([0.02])}},
        "query beside hidden keys": {"options": {"key_mask": (torch.arange(97) != 40)[None]}},
        "overflow": {},
    }  # fmt: skip
    case = lone_case(BACKEND, **numbers | cases[name])
    case.options.update({option: tensor.to(DEVICE) for option, tensor in case.options.items()})
    if name.startswith("query"):
        case.query[0, 0, 96] = torch.nan
    if name == "overflow":
        for tensor, sign in ((case.query, 1), (case.key, -1)):
            tensor[0, 0, 96] = 0
            tensor[0, 0, 96, :2] = torch.tensor([1e20, sign * 1e20])
    grad_output = case.grad_output()
    found = []
    for stored in (1024, 0):
        set_limits(reach=(64, stored))
        found.append([gradient.isnan() for gradient in run(case, "triton", grad_output).gradients[1:3]])
    kept, again = found
    if name != "overflow":
        assert any(bad.any() for bad in kept)
        assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    elif HAS_CUDA:  # the interpreter adds products in float64
        # dK of keys whose probability is 0 is NaN or not: it depends on which tiles the query counts as reaching.
        assert all(bad[0, 0, 96].all() for bad in kept + again)
        assert torch.equal(kept[1], again[1])
        assert (kept[0] | ~again[0]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_key_spoils_the_rows_that_see_it(set_limits, bad):
    """Rows before it keep their values, and a bad query among them spoils itself alone."""
    case = lone_case(BACKEND, 300, is_causal=True)
    clean = check(case)
    case.key[0, 0, 250] = bad
    case.query[0, 0, 100] = torch.nan
    output = entmax_attention(case.query, case.key, case.value, is_causal=True, impl="triton")
    spoiled = torch.arange(300, device=DEVICE) >= 250
    spoiled[100] = True
    assert output[0, 0, 100].isnan().all()
    assert not output[0, 0, 250:].isfinite().all(-1).any() or bad == torch.inf
    torch.testing.assert_close(output[:, :, ~spoiled], clean.output[:, :, ~spoiled], rtol=1e-5, atol=2e-6)
    exact = entmax_attention(
        *(t.double() for t in (case.query, case.key, case.value)), is_causal=True, impl="reference"
    )  # fmt: skip
    assert torch.equal(output.isnan(), exact.isnan())


# Memory that nothing was written to


@pytest.mark.parametrize("number", [0x5A, 0xFF])
def test_what_scratch_held_before_changes_no_bit(sharing, monkeypatch, number):
    sharing()
    case = call_case({"length": 170, "heads": 2, "is_causal": True, "keys_of_topic": 1})
    clean = run(case, "triton", case.grad_output())

    def filled(layout: Scratch, device: torch.device) -> torch.Tensor:
        return torch.full((layout.size,), number, dtype=torch.uint8, device=device)

    monkeypatch.setattr(Scratch, "allocate", filled)
    assert_same(case, run(case, "triton", clean.grad_output), clean)
