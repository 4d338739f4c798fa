"""The solvers of threshold.py against each other and against the `entmax` package of Peters et al."""

import statistics

import entmax
import pytest
import torch
from checks import row_sums
from hypothesis import given
from hypothesis import strategies as st

from flash_entmax.core.threshold import (
    certified_offset,
    newton_step,
    power,
    power_of_alpha,
    probability,
    row_maximum,
    smallest_offset,
    support_weight,
    threshold_by_bisection,
    threshold_by_histogram,
    threshold_by_sort,
    threshold_by_steps,
)
from flash_entmax.testing import DISTRIBUTIONS, score_rows

ALPHAS = (1.1, 1.25, 1.5, 1.75, 2.0)
LENGTHS = (1, 2, 3, 17, 64, 65, 1000, 16384, 65536, 131072)

each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def all_offsets(z, alpha):
    solvers = {
        "bisection": threshold_by_bisection(z, alpha),
        "steps": threshold_by_steps(z, alpha)[:2],
        "histogram": threshold_by_histogram(z, alpha)[:2],
    }
    if alpha in (1.5, 2.0):
        solvers["sort"] = threshold_by_sort(z, alpha)
    return solvers


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 16.0, 17.0, 0.5, 4.0000001])
def test_powers(exponent):
    distance = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    torch.testing.assert_close(power(distance, exponent), distance.pow(exponent), rtol=1e-14, atol=0.0)
    assert power(torch.tensor(torch.nan), exponent).isnan()


def test_which_alphas_have_a_whole_power():
    """Each 1 + 1 / r up to 16, however it was rounded; no other number, and no tensor, which is None here."""
    for whole in range(1, 17):
        assert power_of_alpha(1 + 1 / whole) == power_of_alpha((whole + 1) / whole) == whole
    for alpha in (None, torch.nan, 1.01, 1 + 1 / 17, 1.3, 1.333333, 1.25 + 1e-9, 1.4999, 1.75):
        assert power_of_alpha(alpha) == 0


@each_distribution
@each_alpha
def test_solvers_agree_in_float64(distribution, alpha):
    for length in (1, 2, 65, 1000):
        z = score_rows(distribution, length, rows=4)
        solutions = all_offsets(z, alpha)
        expected_maximum, expected = solutions.pop("bisection")
        for name, (maximum, offset) in solutions.items():
            assert torch.equal(maximum, expected_maximum), name
            torch.testing.assert_close(offset, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@each_distribution
@each_alpha
def test_probabilities_equal_the_entmax_package(distribution, alpha):
    z = score_rows(distribution, 500, rows=4)
    scores = z / (alpha - 1)
    expected = entmax.entmax_bisect(scores, alpha, dim=-1, n_iter=60)
    maximum, offset = threshold_by_bisection(z, alpha)
    actual = probability((z - maximum.unsqueeze(-1) + offset.unsqueeze(-1)).clamp_min(0), alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    if alpha in (1.5, 2.0):
        exact = entmax.entmax15 if alpha == 1.5 else entmax.sparsemax
        torch.testing.assert_close(actual, exact(scores, dim=-1), rtol=1e-7, atol=1e-9)


@each_distribution
@each_alpha
def test_rows_sum_to_one_in_float32_at_every_length(distribution, alpha):
    for length in LENGTHS:
        z = score_rows(distribution, length, dtype=torch.float32)
        for solver in (threshold_by_steps, threshold_by_histogram):
            total, allowed = row_sums(z, *solver(z, alpha)[:2], alpha)
            assert ((total - 1).abs() <= allowed).all(), (
                f"{solver.__name__} at length {length}: sum p = {total.tolist()}"
            )


@each_alpha
def test_offset_is_within_its_limits(alpha):
    for distribution in DISTRIBUTIONS:
        z = score_rows(distribution, 300, rows=4)
        for name, (_, offset) in all_offsets(z, alpha).items():
            assert (offset <= 1 + 1e-12).all(), name
            assert (offset >= 300 ** (1 - alpha) * (1 - 1e-5)).all(), name


def test_limits_are_reached_by_equal_scores_and_by_a_single_one():
    _, offset = threshold_by_sort(torch.zeros(1, 16, dtype=torch.float64), 1.5)
    assert offset.item() == pytest.approx(16**-0.5)
    _, offset = threshold_by_sort(torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64), 2.0)
    assert offset.item() == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_histogram_start_needs_few_passes(alpha):
    """A pass reads every score once; the last one only confirms."""
    rows = [score_rows(name, 16384, rows=4, dtype=torch.float32) for name in DISTRIBUTIONS]
    with_start = [threshold_by_histogram(z, alpha)[2] for z in rows]
    without = [threshold_by_steps(z, alpha)[2] for z in rows]
    assert statistics.median(with_start) <= 4, with_start
    assert max(with_start) <= 12, with_start
    assert sum(with_start) < sum(without)


@given(
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    length=st.integers(1, 3000),
    share=st.floats(0.001, 1.0),
    alpha=st.one_of(st.sampled_from([1.5, 2.0]), st.floats(1.01, 2.0)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_certified_offset_is_a_bound(distribution, length, share, alpha, dtype, seed):
    """Whatever subset of the scores is taken, the offset is at or above the true one, that is, tau is bounded below."""
    z = score_rows(distribution, length, rows=2, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    subset = z[:, torch.randperm(length, generator=generator)[: max(1, int(share * length))]]
    maximum, exact = threshold_by_bisection(z.double(), alpha)
    offset = certified_offset(subset, maximum.to(dtype), alpha)
    assert (offset.double() >= exact.clamp_max(1.0)).all()
    assert (offset <= 1).all()


def test_certified_offset_is_not_just_one():
    """All scores given, four steps come close to the root of easy rows: a bound of 1 would pass the test above."""
    z = score_rows("gaussian 1", 1000, rows=8)
    maximum, exact = threshold_by_sort(z, 1.5)
    assert (certified_offset(z, maximum, 1.5) < exact + 0.05).all()


@given(alpha=st.floats(1.05, 2.0), offset=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
def test_newton_never_passes_the_root(alpha, offset, seed):
    z = score_rows("gaussian 1", 50, seed=seed)
    maximum, exact = threshold_by_bisection(z, alpha)
    distance = (z - maximum.unsqueeze(-1) + offset).clamp_min(0)
    total, weight = probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1)
    assert newton_step(torch.tensor([offset], dtype=z.dtype), total, weight, alpha) >= exact - 1e-12


@each_alpha
def test_masked_entries_do_not_count(alpha):
    z = score_rows("gaussian 1", 40, rows=3)
    hidden = torch.full((3, 25), -torch.inf, dtype=z.dtype)
    expected = all_offsets(z, alpha)
    actual = all_offsets(torch.cat([hidden, z, hidden], dim=-1), alpha)
    for name, (maximum, offset) in actual.items():
        assert torch.equal(maximum, expected[name][0]), name
        torch.testing.assert_close(offset, expected[name][1], rtol=1e-12, atol=1e-12)


@each_alpha
def test_rows_without_a_key(alpha):
    """Maximum +inf puts tau above everything: no key is in the support, and no NaN appears."""
    for z in (torch.full((2, 5), -torch.inf, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64)):
        assert torch.equal(row_maximum(z), torch.full((2,), torch.inf, dtype=z.dtype))
    z = torch.stack([torch.full((5,), -torch.inf), torch.zeros(5)]).double()
    for name, (maximum, offset) in all_offsets(z, alpha).items():
        distance = z - maximum.unsqueeze(-1) + offset.unsqueeze(-1)
        assert not distance.isnan().any(), name
        assert (distance[0] <= 0).all(), name
        assert row_sums(z, maximum, offset, alpha)[0][1].item() == pytest.approx(1), name


def test_smallest_offset_is_below_that_of_equal_scores():
    for count in (1, 2, 3, 10, 1000, 10**6):
        for alpha in ALPHAS:
            low = smallest_offset(torch.tensor(float(count)), alpha).item()
            assert low <= count ** (1 - alpha)
            assert low == pytest.approx(count ** (1 - alpha), rel=1e-5)


def test_sort_refuses_other_alphas():
    with pytest.raises(ValueError, match=r"1\.3"):
        threshold_by_sort(torch.zeros(1, 3), 1.3)
