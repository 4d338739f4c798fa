"""The oracle itself: numerical derivatives, the `entmax` package, softmax."""

import entmax
import pytest
import torch

from flash_entmax import entmax_attention
from flash_entmax.backends.reference import entmax_rows
from flash_entmax.testing import DISTRIBUTIONS, iid_inputs, score_rows

ALPHAS = (1.1, 1.25, 1.5, 1.75, 2.0)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def away_from_the_threshold(alpha, rows=4, length=9, margin=1e-3):
    """Rows of z without a score so close to tau that a finite difference would cross it."""
    z = score_rows("gaussian 1", length, rows=200) * 0.6
    _, maximum, offset = entmax_rows(z, alpha)
    distance = z - maximum.unsqueeze(-1) + offset.unsqueeze(-1)
    z = z[(distance.abs() > margin).all(-1)][:rows]
    assert z.shape[0] == rows
    return z.requires_grad_()


@each_alpha
def test_gradient_in_z(alpha):
    assert torch.autograd.gradcheck(lambda z: entmax_rows(z, alpha)[0], away_from_the_threshold(alpha), eps=1e-7)


@pytest.mark.parametrize("value", [1.1, 1.25, 1.5, 1.75])
def test_gradient_in_alpha(value):
    z = away_from_the_threshold(value)
    alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: entmax_rows(z.detach(), a)[0], alpha, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("value", [1.25, 1.5])
def test_gradient_in_alpha_has_its_closed_form(value):
    """d p / d alpha at fixed scores z / (alpha - 1), from Correia et al. (2019), by the chain rule through both."""
    scores = (away_from_the_threshold(value) / (value - 1)).detach()
    alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    p = entmax_rows((alpha - 1) * scores, alpha)[0]
    weights = torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view_as(p)
    (actual,) = torch.autograd.grad((p * weights).sum(), alpha)
    p = p.detach()
    u = torch.where(p > 0, p ** (2 - value), 0.0)
    w = u / u.sum(-1, keepdim=True)
    h = -torch.special.xlogy(p, p)
    expected = (p - w) / (value - 1) ** 2 + (h - w * h.sum(-1, keepdim=True)) / (value - 1)
    torch.testing.assert_close(actual, (expected * weights).sum(), rtol=1e-8, atol=1e-10)


@each_alpha
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gradient_equals_the_entmax_package(alpha, distribution):
    z = score_rows(distribution, 60, rows=3)
    ours = z.clone().requires_grad_()
    theirs = (z / (alpha - 1)).requires_grad_()
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    package = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}.get(
        alpha, lambda scores, dim: entmax.entmax_bisect(scores, alpha, dim=dim, n_iter=60)
    )
    (actual,) = torch.autograd.grad((entmax_rows(ours, alpha)[0] * weights).sum(), ours)
    (expected,) = torch.autograd.grad((package(theirs, dim=-1) * weights).sum(), theirs)
    torch.testing.assert_close(actual * (alpha - 1), expected, rtol=1e-6, atol=1e-8)


@each_alpha
def test_attention_gradients_by_finite_differences(alpha):
    query, key, value = (
        t.requires_grad_() for t in iid_inputs(1, 2, 3, 2, key_length=5, key_heads=1, dtype=torch.double)
    )

    def attend(query, key, value):
        return entmax_attention(query, key, value, alpha=alpha, is_causal=True, impl="reference")

    assert torch.autograd.gradcheck(attend, (query, key, value), eps=1e-7)


def test_a_row_without_a_key_is_zero_with_gradient_zero():
    z = torch.full((2, 4), -torch.inf, dtype=torch.float64)
    z[1] = torch.tensor([0.0, -0.1, -torch.inf, -3.0])
    z.requires_grad_()
    p, maximum, offset = entmax_rows(z, 1.5)
    assert torch.equal(p[0], torch.zeros(4, dtype=torch.float64))
    assert maximum[0] == torch.inf
    assert p[1].sum().item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad((p * torch.arange(8.0).view(2, 4)).sum(), z)
    assert torch.equal(gradient[0], torch.zeros(4, dtype=torch.float64))
    assert gradient[1].isfinite().all()
    assert not offset.isnan().any()


def test_alpha_one_is_softmax():
    query, key, value = iid_inputs(2, 2, 7, 4, dtype=torch.double)
    weights = (query @ key.mT / 2).softmax(-1)
    output = entmax_attention(query, key, value, alpha=1.0, impl="reference")
    torch.testing.assert_close(output, weights @ value)


def test_small_alpha_comes_close_to_softmax():
    query, key, value = iid_inputs(1, 1, 20, 8, dtype=torch.double)
    soft = entmax_attention(query, key, value, alpha=1.0, impl="reference")
    near, nearer = (entmax_attention(query, key, value, alpha=a, impl="reference") for a in (1.001, 1.0001))
    error, smaller = (near - soft).abs().max(), (nearer - soft).abs().max()
    assert error < 5e-3
    assert smaller < error / 5


@pytest.mark.parametrize("alpha", [1.0, 1.5, torch.tensor(1.5)])
@pytest.mark.parametrize(("heads", "keys"), [(0, 4), (2, 0)])
def test_nothing_to_attend_with_or_to(alpha, heads, keys):
    query, key, value = torch.randn(2, heads, 3, 8), torch.randn(2, heads, keys, 8), torch.randn(2, heads, keys, 5)
    output = entmax_attention(query, key, value, alpha=alpha, impl="reference")
    assert output.shape == (2, heads, 3, 5)
    assert (output == 0).all()
