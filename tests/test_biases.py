"""What is added to a score, and what bounds it: ALiBi slopes and softcap, with their gradients."""

import pytest
import torch
from cases import Case, attend, make_case, run
from checks import check_attention, check_live_map

from flash_entmax import entmax_attention
from flash_entmax.testing import iid_inputs

SLOPES = {
    "usual": (0.5, 0.25),
    "none and little": (0.0, 1e-3),
    "negative": (-0.1, -1.0),
    "steep": (30.0, 1e4),
    "one infinite": (torch.inf, 0.2),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("slopes", SLOPES)
def test_slopes(backend, slopes, is_causal):
    """Forward and gradients, that of the slopes too."""
    slopes = torch.tensor(SLOPES[slopes], device=backend.device)
    for dtype in backend.dtypes:
        case = make_case(
            backend, length=70, key_length=130, key_heads=1, dtype=dtype, alibi_slopes=slopes, is_causal=is_causal
        )
        check_attention(case, backend.impl)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_slopes_of_each_batch_row(backend, alpha):
    slopes = torch.tensor([[0.1, 0.0], [-0.05, 0.4]], device=backend.device)
    check_attention(make_case(backend, batch=2, length=90, alpha=alpha, alibi_slopes=slopes), backend.impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_slopes_of_any_dtype(backend, dtype):
    """Their gradient comes back in their own dtype."""
    slopes = torch.tensor([0.25, 0.0625], dtype=dtype, device=backend.device)
    check_attention(make_case(backend, length=70, alibi_slopes=slopes), backend.impl)


def test_slopes_are_a_bias_by_distance(backend):
    """A bias as one more dimension of query and key: position i of the query times 1 and 1 times j, where j <= i."""
    case = make_case(backend, heads=1, length=60, is_causal=True, scale=1.0)
    place = torch.arange(60.0, device=backend.device)[None, None, :, None]
    ones = torch.ones_like(place)
    query = torch.cat([case.query, -0.125 * place, 0.125 * ones], dim=-1)
    key = torch.cat([case.key, ones, place], dim=-1)
    expected = entmax_attention(query, key, case.value, is_causal=True, scale=1.0, impl=backend.impl)
    actual = attend(case, backend.impl, alibi_slopes=torch.tensor([0.125], device=backend.device))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_zero_slopes_change_nothing(backend):
    case = make_case(backend, length=100, is_causal=True)
    slopes = torch.zeros(2, device=backend.device)
    torch.testing.assert_close(
        attend(case, backend.impl, alibi_slopes=slopes), attend(case, backend.impl), rtol=1e-5, atol=2e-6
    )


def test_an_infinite_slope_leaves_the_own_position(backend):
    """The output is the value at the query's position, its gradient that of the output; scores get none."""
    slopes = torch.tensor([torch.inf, torch.inf], device=backend.device)
    for options in ({}, {"is_causal": True}, {"softcap": 2.0}, {"window_size": (3, 3)}):
        case = make_case(backend, length=70, alibi_slopes=slopes, **options)
        grad_output = case.grad_output()
        result = run(case, backend.impl, grad_output)
        assert torch.equal(result.output, case.value)
        assert (result.support.size == 1).all()
        of_query, of_key, of_value, of_slopes = result.gradients
        torch.testing.assert_close(of_value, grad_output, rtol=2e-6, atol=0)
        for gradient in (of_query, of_key, of_slopes):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


def test_an_infinite_slope_without_a_key_at_the_own_position(backend):
    """Queries that stand behind the last key, or before the first, see nothing: 0 throughout."""
    slopes = torch.full((1,), torch.inf, device=backend.device)
    case = make_case(backend, heads=1, length=90, key_length=40, alibi_slopes=slopes, query_positions=-10)
    result = check_attention(case, backend.impl)
    blind = torch.tensor([not 0 <= i - 10 < 40 for i in range(90)])
    assert (result.output[0, 0].cpu()[blind] == 0).all()
    assert (result.support.size[0, 0].cpu() == ~blind).all()
    assert all(tensor.isfinite().all() for tensor in result.tensors)


@pytest.mark.parametrize("softcap", [0.3, 5.0, 50.0])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_softcap(backend, softcap, alpha):
    """Scores up to 20: caps that flatten all of them, some and none."""
    for dtype in backend.dtypes:
        case = make_case(
            backend, heads=1, length=70, key_length=100, dtype=dtype, alpha=alpha, softcap=softcap, scale=1.0
        )
        check_attention(case, backend.impl)


def test_softcap_bounds_the_scores(backend):
    """Scores of +-1000 become +-softcap: the distance of best and worst is 2 (alpha - 1) softcap < 1, so that every
    key is in the support; without a cap one is."""
    case = make_case(backend, heads=1, length=100, dim=8, scale=100.0)
    assert (attend(case, backend.impl, return_support=True)[1].size < 10).all()
    support = attend(case, backend.impl, softcap=0.001, return_support=True)[1]
    assert (support.size == 100).all()
    assert (support.maximum <= 0.0005 * (1 + 1e-5)).all()


def test_softcap_comes_before_the_bias(backend):
    slopes = torch.tensor([0.3, -0.3], device=backend.device)
    for options in ({}, {"is_causal": True}, {"window_size": (20, 10)}):
        case = make_case(backend, length=130, alibi_slopes=slopes, softcap=2.0, scale=1.0, **options)
        check_attention(case, backend.impl)


# Bounds on tiles that leave the bias out would drop tiles that hold support


def far_keys_win(backend, length) -> Case:
    """A negative slope favours the first keys, whose products with the queries are the lowest."""
    query, key, value = (t.abs() for t in iid_inputs(1, 1, length, 16, device=backend.device))
    key *= torch.linspace(0.1, 1.0, length, device=backend.device)[:, None]
    slopes = torch.tensor([-1.0], device=backend.device)
    return Case(query * 4, key, value, is_causal=True, options={"alibi_slopes": slopes})


def large_products_lose(backend, length) -> Case:
    """The keys of largest product are far away, and a slope takes more from them than they are ahead."""
    query, key, value = (t.abs() for t in iid_inputs(1, 1, length, 16, device=backend.device))
    key *= torch.linspace(20.0, 1.0, length, device=backend.device)[:, None]
    slopes = torch.tensor([4.0], device=backend.device)
    return Case(query, key, value, is_causal=True, options={"alibi_slopes": slopes})


def capped_equals(backend, length) -> Case:
    """Every score is at the cap, though the products of the first tile are ten times those of the others."""
    query, key, value = (t.abs() + 0.5 for t in iid_inputs(1, 1, length, 16, device=backend.device))
    key[:, :, :64] *= 10
    return Case(query * 100, key, value, options={"softcap": 0.05})


@pytest.mark.parametrize("make", [far_keys_win, large_products_lose, capped_equals])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_bounds_know_of_the_bias(backend, make, alpha):
    """The best keys by score are not the best by query . key: live tiles and results are those of the scores."""
    case = make(backend, backend.sizes(160, 500, 3000))
    case.alpha = alpha
    plain = Case(case.query, case.key, case.value, alpha=alpha, is_causal=case.is_causal)
    with_bias, without = (attend(each.in_float64(), "reference", return_support=True)[1] for each in (case, plain))
    assert (with_bias.tiles & ~without.tiles).any(), "the input does not tell the bounds apart"
    check_live_map(case, backend.impl, with_bias)
    if make is not capped_equals or alpha < 2:
        check_attention(case, backend.impl)


def test_a_steep_slope_leaves_few_tiles(backend):
    """Scores fall by more than they spread: tiles away from the diagonal are dead, and are not kept."""
    length = backend.sizes(192, 1000, 8192)
    slopes = torch.tensor([2.0], device=backend.device)
    case = make_case(backend, heads=1, length=length, alibi_slopes=slopes, is_causal=True)
    exact = attend(case.in_float64(), "reference", return_support=True)[1]
    live = check_live_map(case, backend.impl, exact)
    assert live.sum(-1).float().mean() < backend.sizes(2.6, 2.6, 3.5)
