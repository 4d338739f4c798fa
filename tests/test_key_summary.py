"""Summaries of blocks of keys that come from the caller."""

import pytest
import torch
from cases import Case, attend, run
from torch.utils._python_dispatch import TorchDispatchMode

from flash_entmax import KeySummary, entmax_attention, summarise_keys
from flash_entmax.backends import BACKENDS
from flash_entmax.testing import iid_inputs, topic_inputs


def topics(backend, dtype=torch.float32, **options) -> Case:
    length = backend.sizes(96, 300, 1000)
    inputs = topic_inputs(1, 2, length, 16, 3, dtype=dtype, device=backend.device, key_heads=1)
    return Case(*inputs, is_causal=True, options=options)


@pytest.mark.parametrize("sizes", [(16, 16), (5, 40)])
def test_bounds_hold_for_every_key(backend, sizes):
    head_size, value_size = sizes
    length = backend.sizes(70, 150, 500)
    key = iid_inputs(2, 2, length, head_size, dtype=torch.float32, device=backend.device)[1]
    summary = summarise_keys(key, value_size=value_size, impl=backend.impl)
    tile = BACKENDS[backend.impl].tile_size(key.dtype, max(sizes))
    blocks = -(-length // tile)
    assert summary.centre.shape == (2, 2, blocks, head_size)
    assert all(numbers.shape == (2, 2, blocks) for numbers in summary[1:])
    for index, block in enumerate(key.double().split(tile, 2)):
        centre = summary.centre[:, :, index].double()
        assert ((block - centre.unsqueeze(2)).norm(dim=-1) <= summary.radius[:, :, index, None]).all()
        assert ((block.mean(2) - centre).norm(dim=-1) <= summary.error[:, :, index] + 1e-6).all()
        torch.testing.assert_close(summary.largest[:, :, index].double(), block.abs().flatten(2).amax(-1))


def test_results_are_the_same_bits(backend):
    case = topics(backend)
    grad_output = case.grad_output()
    expected = run(case, backend.impl, grad_output)
    case.options["key_summary"] = summarise_keys(case.key, impl=backend.impl)
    actual = run(case, backend.impl, grad_output)
    assert all(torch.equal(*pair) for pair in zip(actual.tensors, expected.tensors, strict=True))
    with torch.no_grad():
        assert torch.equal(attend(case, backend.impl), expected.output)


def test_a_summary_that_is_given_is_read(backend):
    """One that calls every block a point far from the queries rules them out: the kernels find no support there."""
    if backend.impl == "torch":
        pytest.skip("plain PyTorch has no bound on blocks")
    query = torch.ones(1, 1, 20, 16, device=backend.device)  # more than are decoded
    key = torch.ones(1, 1, 96, 16, device=backend.device)
    key[:, :, 32:] *= -1.0
    summary = summarise_keys(key, impl=backend.impl)
    right = entmax_attention(query, key, key, key_summary=summary, impl=backend.impl)
    assert torch.equal(right, entmax_attention(query, key, key, impl=backend.impl))
    centre = summary.centre.flip(2)  # the wrong block is near
    wrong = entmax_attention(query, key, key, key_summary=summary._replace(centre=centre), impl=backend.impl)
    assert not torch.equal(right, wrong)


def test_samples_of_vmap_have_their_own(backend):
    query, key, value = iid_inputs(3, 2, 40, 16, dtype=torch.float32, device=backend.device)
    summary = summarise_keys(key, impl=backend.impl)

    def one(query, key, value, *parts):
        inputs = (tensor.unsqueeze(0) for tensor in (query, key, value))
        given = KeySummary(*(part.unsqueeze(0) for part in parts))
        return entmax_attention(*inputs, key_summary=given, impl=backend.impl).squeeze(0)

    expected = entmax_attention(query, key, value, impl=backend.impl)
    torch.testing.assert_close(torch.vmap(one)(query, key, value, *summary), expected)


class Arguments(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.flash_entmax.attention.default:
            self.found = arguments
        return function(*arguments, **(keywords or {}))


def test_the_operator_gets_it(backend):
    case = topics(backend)
    summary = summarise_keys(case.key, impl=backend.impl)
    with torch.no_grad(), Arguments() as mode:
        entmax_attention(case.query, case.key, case.value, key_summary=summary, impl=backend.impl)
    given = {tensor.data_ptr() for tensor in mode.found if isinstance(tensor, torch.Tensor)}
    assert {part.data_ptr() for part in summary} <= given


def test_what_it_may_not_be(backend):
    case = topics(backend)
    summary = summarise_keys(case.key, impl=backend.impl)
    inputs = case.query, case.key, case.value
    with pytest.raises(TypeError, match="key_summary must be what summarise_keys returns, or KeySummaries, got tuple"):
        entmax_attention(*inputs, key_summary=tuple(summary), impl=backend.impl)
    with pytest.raises(ValueError, match=r"key_summary\.centre must be of these keys"):
        entmax_attention(
            case.query, case.key[:, :, :-64], case.value[:, :, :-64], key_summary=summary, impl=backend.impl
        )
    wrong = {
        "centre": (summary.centre.double(), TypeError, "must be torch.float32, got torch.float64"),
        "radius": (summary.radius.half(), TypeError, "must be torch.float32, got torch.float16"),
        "error": (None, TypeError, "must be a torch.Tensor, got NoneType"),
        "largest": (summary.largest.to("meta"), ValueError, "must be on the device of the keys"),
    }
    for name, (tensor, error, message) in wrong.items():
        with pytest.raises(error, match=f"key_summary.{name} {message}"):
            entmax_attention(*inputs, key_summary=summary._replace(**{name: tensor}), impl=backend.impl)


@pytest.mark.parametrize("options", [{"impl": "reference"}, {"alpha": 1.0}])
def test_it_is_checked_where_nothing_reads_it(options):
    inputs = iid_inputs(1, 1, 10, 4)
    with pytest.raises(TypeError, match="key_summary must be what summarise_keys returns, or KeySummaries, got str"):
        entmax_attention(*inputs, key_summary="anything", **options)
    summary = summarise_keys(inputs[1], impl="torch")
    expected = entmax_attention(*inputs, **options)
    assert torch.equal(entmax_attention(*inputs, key_summary=summary, **options), expected)


def test_slices_of_a_longer_summary_are_read_right(backend):
    """As a cache keeps them: heads of more, blocks of more, or numbers side by side."""
    query, key, value = topic_inputs(2, 2, backend.sizes(96, 200, 500), 16, 3, device=backend.device)
    summary = summarise_keys(key, impl=backend.impl)
    expected = entmax_attention(query[:, 1:], key[:, 1:], value[:, 1:], impl=backend.impl)
    together = torch.stack(summary[1:], -1).unbind(-1)
    for given in (summary, KeySummary(summary.centre, *together)):
        own = KeySummary(*(tensor[:, 1:] for tensor in given))
        actual = entmax_attention(query[:, 1:], key[:, 1:], value[:, 1:], key_summary=own, impl=backend.impl)
        assert torch.equal(actual, expected)


def test_autocast_makes_one_of_its_dtype():
    query, key, value = iid_inputs(1, 1, 10, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        summary = summarise_keys(key, impl="torch")
        output = entmax_attention(query, key, value, key_summary=summary, impl="torch")
    assert summary.centre.dtype == output.dtype == torch.bfloat16


def test_compiled_and_traced(backend):
    key = iid_inputs(1, 2, 70, 16, dtype=torch.float32, device=backend.device)[1]
    compiled = torch.compile(summarise_keys, fullgraph=True, backend="eager")
    expected = summarise_keys(key, impl=backend.impl)
    assert all(torch.equal(*pair) for pair in zip(compiled(key, impl=backend.impl), expected, strict=True))
    mapped = torch.vmap(lambda own: tuple(summarise_keys(own.unsqueeze(0), impl=backend.impl)))(key)
    assert all(torch.equal(own.squeeze(0), whole) for own, whole in zip(mapped, expected, strict=True))


@pytest.mark.parametrize(("key", "message"), [(torch.zeros(3, 4), "key must have shape"), ("k", "key must be a torch")])
def test_keys_that_are_refused(key, message):
    with pytest.raises((TypeError, ValueError), match=message):
        summarise_keys(key)


@pytest.mark.parametrize(
    ("value_size", "error"), [(0, ValueError), (513, ValueError), (True, TypeError), (1.5, TypeError)]
)
def test_value_sizes_that_are_refused(value_size, error):
    with pytest.raises(error, match="value_size must be"):
        summarise_keys(torch.zeros(1, 1, 4, 4), value_size=value_size)


def test_keys_without_a_length(backend):
    summary = summarise_keys(torch.zeros(1, 1, 0, 4, device=backend.device), impl=backend.impl)
    assert summary.radius.shape == (1, 1, 0)
