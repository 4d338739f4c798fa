"""Attention as linear attention to which only the support writes, and as a recurrence in time."""

from itertools import combinations_with_replacement
from math import prod

import pytest
import torch
from mutants import Mutant, plant
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import entmax_attention, linear_attention, linear_form, recurrence, writes
from flash_entmax.core.threshold import threshold_by_steps
from flash_entmax.testing import iid_inputs

ALPHAS = (2.0, 1.5, 4 / 3)
PAIR = torch.tensor([0.3, 0.9], dtype=torch.float64)
BLOCKS = create_block_mask(lambda b, h, i, j: (i + j) % 3 > 0, None, None, 12, 20, device="cpu")
OPTIONS = {
    "plain": {},
    "causal with slopes": {"is_causal": True, "alibi_slopes": PAIR},
    "slopes of each batch row": {"alibi_slopes": torch.stack((PAIR, -0.1 * PAIR))},
    "one slope infinite": {"alibi_slopes": torch.tensor([torch.inf, 0.4], dtype=torch.float64)},
    "window and scales": {"window_size": (5, 2), "scale": PAIR},
    "key mask": {"key_mask": (torch.arange(40) % 3 > 0).view(2, 20), "scale": 1.3},
    "key lengths": {"key_lengths": torch.tensor([0, 7])},
    "positions": {"is_causal": True, "query_positions": torch.arange(12).flip(0)},
    "block mask": {"block_mask": BLOCKS},
}


def inputs(**sizes):
    sizes = {"length": 12, "head_dim": 4, "key_length": 20, "key_heads": 1, "value_dim": 5, **sizes}
    tensors = iid_inputs(2, 2, sizes.pop("length"), sizes.pop("head_dim"), **sizes)
    return [tensor.double() for tensor in tensors]


def leaves(tensors, options):
    """What gets a gradient: inputs, scales and finite slopes."""
    learned = {n: t for n, t in options.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    made = [tensor.clone().requires_grad_() for tensor in (*tensors, *learned.values())]
    return made, made[:3], options | dict(zip(learned, made[3:], strict=True))


def in_units_of_z(query, alpha, options):
    scale, slopes = options.get("scale", query.shape[-1] ** -0.5), options.get("alibi_slopes")
    x = (alpha - 1) * (scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale) * query
    if slopes is None:
        return x
    slopes = torch.where(slopes == torch.inf, 0.0, slopes).expand(query.shape[:2])
    return torch.cat((x, -(alpha - 1) * slopes[..., None, None].expand(*x.shape[:3], 1)), -1)


def check_form(alpha, options) -> None:
    made, tensors, options = leaves(inputs(), options)
    support, states, output = linear_attention.linear_form(*tensors, alpha, **options)
    expected, sizes = entmax_attention(*tensors, alpha=alpha, impl="reference", return_support=True, **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert torch.equal(support.sum(-1), sizes.size.long())
    assert torch.equal(states.size, sizes.size.long())
    read = states.read(in_units_of_z(tensors[0], alpha, options))
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="as the states are, got"):
        states.read(in_units_of_z(tensors[0], alpha, options)[..., :1])
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for result, exact in zip(*(torch.autograd.grad(o, made, weights) for o in (output, expected)), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("alpha", ALPHAS, ids=("2", "1.5", "4-3"))
def test_states_read_as_attention(alpha, name):
    """Outputs to 1e-12, and gradients through the states, of every tensor."""
    check_form(alpha, OPTIONS[name])


def test_states_are_sums_over_the_support():
    """By their definition, one number at a time; every moment is symmetric in its places for keys."""
    query, key, value = inputs()
    support, states, _ = linear_attention.linear_form(query, key, value, 4 / 3)
    own = support[1, 0, 3]
    keys, values = key[1, 0, own], value[1, 0, own]
    e = keys - keys.mean(0)
    torch.testing.assert_close(states.centre[1, 0, 3], keys.mean(0))
    for power in range(4):
        for places in combinations_with_replacement(range(4), power):
            product = prod((e[:, place] for place in places), start=torch.ones_like(e[:, 0]))
            found = states.value_moments[power][1, 0, 3]
            for place in reversed(places):
                found = found[..., place]
            torch.testing.assert_close(found, product @ values)
            if power >= 2:
                torch.testing.assert_close(states.key_moments[power - 2][1, 0, 3][places], product.sum())


@pytest.mark.parametrize("alpha", ALPHAS, ids=("2", "1.5", "4-3"))
def test_states_serve_the_queries_of_their_support_and_no_other(alpha):
    query, key, value = inputs()
    support, states, output = linear_attention.linear_form(query, key, value, alpha)
    near = query * (1 + 1e-7)
    again, _, expected = linear_attention.linear_form(near, key, value, alpha)
    assert torch.equal(support, again)
    torch.testing.assert_close(states.read(in_units_of_z(near, alpha, {})), expected, rtol=0, atol=1e-12)
    turned = states.read(in_units_of_z(query.roll(1, 2), alpha, {}))
    error = (turned - output.roll(1, 2)).abs().amax(-1)
    other = (support != support.roll(1, 2)).any(-1)
    assert other.float().mean() > 0.9
    assert ((error > 1e-6) | error.isnan())[other].all()


@pytest.mark.parametrize("alpha", ALPHAS, ids=("2", "1.5", "4-3"))
@pytest.mark.parametrize("same", ["one key", "all keys"])
def test_supports_of_one_key_and_of_equal_keys(alpha, same):
    """All moments above the first are 0: h is 1, or n^(1 - alpha)."""
    query, key, value = inputs()
    key = torch.zeros_like(key) if same == "all keys" else 1e4 * key
    made = [tensor.requires_grad_() for tensor in (query, key, value)]
    support, _, output = linear_attention.linear_form(*made, alpha)
    assert (support.sum(-1) == (20 if same == "all keys" else 1)).all()
    gradients = torch.autograd.grad(output.sum(), made)
    expected = entmax_attention(*made, alpha=alpha, impl="reference")
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for result, exact in zip(gradients, torch.autograd.grad(expected.sum(), made), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)


def test_bad_numbers_spoil_the_rows_that_see_them():
    """A NaN among visible keys, in both calls; hidden ones, and values that nobody attends to, change nothing."""
    query, key, value = inputs()
    seen = {"is_causal": True, "query_positions": 5}
    clean = linear_attention.linear_form(query, key, value, **seen)
    key[:, :, 8], key[:, :, 17:], value[:, :, 17:] = torch.nan, torch.nan, torch.nan
    support, states, output = linear_attention.linear_form(query, key, value, **seen)
    is_bad = torch.arange(12) >= 3  # those that see key 8
    assert output[:, :, is_bad].isnan().all()
    assert (states.size[:, :, is_bad] == 0).all()
    assert torch.equal(output[:, :, ~is_bad], clean.output[:, :, ~is_bad])
    record = recurrence.writes(query, key, **seen)
    assert torch.equal(record.support, support)
    assert torch.equal(record.tau.isnan(), (is_bad[:, None] & (torch.arange(20) >= 8)).expand_as(record.tau))


def test_a_score_of_minus_inf_never_writes():
    """A row of them alone is NaN, as attention is; one beside finite scores has probability 0."""
    query, key, value = inputs(key_length=2)
    query = query.abs() + 0.1
    key[:, :, 0] = -torch.inf
    support, _, output = linear_attention.linear_form(query, key, value, is_causal=True, query_positions=-10)
    expected = entmax_attention(query, key, value, is_causal=True, query_positions=-10, impl="torch")
    torch.testing.assert_close(output, expected, equal_nan=True)
    assert torch.equal(output.isnan().all(-1)[0, 0], torch.arange(12) == 10)  # which sees key 0 only
    record = recurrence.writes(query, key, is_causal=True, query_positions=-10)
    assert torch.equal(record.support, support)
    assert not record.tau.isnan().any()


def test_queries_without_a_key():
    """Output and gradient are 0, even where NaN comes in."""
    made, tensors, options = leaves(inputs(), {"key_lengths": torch.tensor([0, 7])})
    output = linear_attention.linear_form(*tensors, **options).output
    assert (output[0] == 0).all()
    weights = torch.zeros_like(output)
    weights[0] = torch.nan
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(output, made, weights))
    record = recurrence.writes(tensors[0], tensors[1], **options)
    assert not record.wrote[0].any()
    assert (record.tau[0] == -torch.inf).all()


@pytest.mark.parametrize("empty", [{"key_length": 0}, {"length": 0}, {"key_length": 1}])
def test_empty_dimensions(empty):
    query, key, value = inputs(**empty)
    form, record = linear_attention.linear_form(query, key, value), recurrence.writes(query, key)
    torch.testing.assert_close(form.output, entmax_attention(query, key, value, impl="torch"))
    assert form.support.shape == record.support.shape == (2, 2, query.shape[2], key.shape[2])
    assert torch.equal(form.support, record.support)


def test_dtypes():
    """States in float32 and the output in the inputs' dtype; under autocast, in its dtype."""
    tensors = inputs()
    exact = linear_attention.linear_form(*tensors).output
    _, states, output = linear_attention.linear_form(*(tensor.float() for tensor in tensors))
    torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-5)
    half = [tensor.bfloat16() for tensor in tensors]
    result = linear_attention.linear_form(*half)
    assert (result.output.dtype, result.states.centre.dtype) == (torch.bfloat16, torch.float32)
    assert states.centre.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention.linear_form(*(tensor.float() for tensor in tensors)).output, result.output)


REFUSED = [
    (linear_form, {"alpha": 1.4}, ValueError, r"alpha must be 2, 1.5 or 4 / 3.*got 1.4"),
    (linear_form, {"alpha": 1.0}, ValueError, r"alpha must be 2, 1.5 or 4 / 3.*got 1.0"),
    (linear_form, {"alpha": torch.tensor(1.5)}, TypeError, "alpha must be the number 2, 1.5 or 4 / 3, got Tensor"),
    (linear_form, {"key_mask": torch.ones(2, 5)}, ValueError, r"key_mask.*\(2, 20\), got \(2, 5\)"),
    (linear_form, {"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    (linear_form, {"softcap": 3.0}, TypeError, "softcap"),
    (writes, {"alpha": 1}, ValueError, "softmax every key writes"),
    (writes, {"alpha": 2.5}, ValueError, "or from 1.0001 to 2 .*got 2.5"),
    (writes, {"alpha": True}, TypeError, "alpha must be a number above 1 and up to 2, got bool True"),
    (writes, {"alibi_slopes": [0.5]}, TypeError, "alibi_slopes.*list"),
]


@pytest.mark.parametrize(("function", "options", "error", "match"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(function, options, error, match):
    query, key, value = inputs()
    tensors = (query, key, value) if function is linear_form else (query, key)
    with pytest.raises(error, match=match):
        function(*tensors, **options)


def test_inputs_that_are_refused():
    query, key, value = inputs()
    nested = torch.nested.nested_tensor([torch.ones(3, 2, 4)], layout=torch.jagged)
    for function, more in ((linear_form, (value,)), (writes, ())):
        with pytest.raises(ValueError, match="key must be a tensor that is not nested"):
            function(query, nested, *more)
        with pytest.raises(TypeError, match=r"query must be a torch\.Tensor, got list"):
            function([1.0], key, *more)


def check_writes(alpha, options) -> None:
    """z by its formula, and after each key the threshold and support of the keys so far, by another solver."""
    query, key, _ = inputs()
    record = recurrence.writes(query, key, alpha, **options)
    x = in_units_of_z(query, alpha, options)[..., :4]
    z = x @ key.mT
    if "alibi_slopes" in options:
        distance = (torch.arange(12)[:, None] + 8 - torch.arange(20)).abs()
        z = z - (alpha - 1) * options["alibi_slopes"][:, None, None] * distance
    if options.get("is_causal"):
        z = z.masked_fill(torch.arange(12)[:, None] + 8 < torch.arange(20), -torch.inf)
    torch.testing.assert_close(record.z, z, rtol=0, atol=1e-12)
    for t in (0, 1, 2, 8, 9, 13, 19):
        maximum, offset, _ = threshold_by_steps(record.z[..., : t + 1], alpha)
        torch.testing.assert_close(record.tau[..., t], maximum - offset, rtol=0, atol=1e-12)
        support = record.z[..., : t + 1] > record.tau[..., t : t + 1] + 1e-12
        wrote, evicted_by = record.wrote[..., : t + 1], record.evicted_by[..., : t + 1]
        assert torch.equal(wrote & ((evicted_by < 0) | (evicted_by > t)), support)
        assert torch.equal(record.size[..., t], support.sum(-1))
    before = torch.nn.functional.pad(record.tau[..., :-1], (1, 0), value=-torch.inf)
    assert torch.equal(record.wrote, record.z > before)
    assert (record.tau >= before).all()
    assert (record.evicted_by[~record.wrote] == -1).all()
    assert record.evicted.any()
    assert torch.equal(record.support, support)


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.3])
@pytest.mark.parametrize("name", ["plain", "causal with slopes"])
def test_writes_are_the_supports_of_all_prefixes(alpha, name):
    check_writes(alpha, OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_left_is_the_support_of_attention(name):
    query, key, value = inputs()
    assert torch.equal(
        recurrence.writes(query, key, **OPTIONS[name]).support,
        linear_attention.linear_form(query, key, value, **OPTIONS[name])[0],
    )


def check_everything(owner) -> None:
    if owner is not recurrence and owner is not recurrence.Writes:
        for alpha in ALPHAS:
            check_form(alpha, OPTIONS["causal with slopes"])
    else:
        check_writes(2.0, OPTIONS["causal with slopes"])
    test_bad_numbers_spoil_the_rows_that_see_them()


FAULTS = {
    "keys are not centred": (linear_attention, "states_of", "keys - centre.unsqueeze(-2)", "keys"),
    "the centre is of all places": (linear_attention, "states_of", "size.clamp_min(1)", "(0 * size + max(1, most))"),
    "fillers write values": (
        linear_attention, "states_of", "torch.where(writes, rows_at(value, index), 0.0)", "rows_at(value, index)",
    ),
    "every batch row reads the first": (
        linear_attention, "rows_at", "batch[:, None, None, None]", "0 * batch[:, None, None, None]",
    ),
    "binomials are 1": (linear_attention.LinearStates, "read", "math.comb(degree, power)", "1"),
    "h is off by 1e-9": (linear_attention, "mean_distance", "2.0 * q / ...", "(1 + 1e-9) * (2.0 * q / ...)"),
    "h carries no gradient": (
        linear_attention, "mean_distance", "(1.0 - moments[0]) / n", "((1.0 - moments[0]) / n).detach()",
    ),
    "the scale is left out": (linear_attention, "in_units_of_z", "return ...", "return query.shape[-1] ** 0.5 * ..."),
    "slopes pull": (linear_attention, "in_units_of_z", "slopes.masked_fill(...)", "-slopes.masked_fill(...)"),
    "bad scores are not seen": (linear_attention, "linear_form", "torch.nan", "0.0"),
    "every key writes": (recurrence, "recurrence", "z[:, t] > tau", "visible[:, t]"),
    "evictions are not noted": (recurrence, "recurrence", "torch.where(left, t, ...)", "torch.where(left, -1, ...)"),
    "tau does not move": (recurrence, "recurrence", "maximum - offset", "tau[writing].clamp_min(-9.0)"),
    "a bad score is passed over": (recurrence, "recurrence", "visible & ~(z < torch.inf)", "visible & False"),
    "keys leave one step late": (
        recurrence.Writes, "size", "self.evicted_by.clamp_min(0)", "(self.evicted_by + 1).clamp(0, 19)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("owner", [linear_attention, recurrence])
def test_checks_pass_without_a_fault(owner):
    check_everything(owner)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS[fault]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check_everything(FAULTS[fault][0])


def test_the_picture_shows_what_wrote():
    pytest.importorskip("matplotlib")
    from flash_entmax.show import plot

    query, key, _ = inputs()
    record = recurrence.writes(query, key, is_causal=True)
    labels = [f"key {number}" for number in range(20)]
    figure = plot.writes_figure(record, "One query", batch=1, head=1, query=4, labels=labels)
    (axes,) = figure.axes
    wrote, evicted, left = (field[1, 1, 4] for field in (record.wrote, record.evicted, record.support))
    shown = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert list(shown["wrote, and was evicted"]) == evicted.nonzero().flatten().tolist()
    assert list(shown["wrote, and is in the support"]) == left.nonzero().flatten().tolist()
    assert len(shown["never wrote"]) == 13 - wrote.sum()  # query 4 sees 13 keys
    ends = [int(segment[1][0]) for lines in axes.collections for segment in lines.get_segments()]
    assert sorted(ends) == sorted([*record.evicted_by[1, 1, 4][evicted].tolist(), *[20] * int(left.sum())])
    assert [text.get_text() for text in axes.texts] == [labels[n] for n in wrote.nonzero().flatten().tolist()]
    assert f"Of 13 keys {int(wrote.sum())} wrote, {int(evicted.sum())} were evicted" in figure.texts[1].get_text()
    with pytest.raises(ValueError, match="labels must have a text for each of the 20 keys, got 2"):
        plot.writes_figure(record, "", labels=["a", "b"])
    with pytest.raises(IndexError, match="query must be from -12 to 11, got 12"):
        plot.writes_figure(record, "", query=12)
