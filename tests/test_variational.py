"""Free energies: the posterior is the minimum, the evidence its value, and alpha 1 is Bayes' rule."""

import pytest
import torch
from mutants import Mutant, plant

from flash_entmax import entmax, variational
from flash_entmax.variational import energies

ALPHAS = (1, 1.25, 1.5, 2.0)
F64 = torch.float64


def model(*shape, seed=0, alpha=1.5, spread=1.5):
    """(scores, losses): a prior over the last dimension, and losses of observations of the given shape."""
    draw = torch.Generator().manual_seed(seed)
    losses = spread * torch.randn(shape, generator=draw, dtype=F64)
    return variational.prior_scores(simplex(shape[-1], seed=seed), alpha), losses


def simplex(*shape, seed=0):
    """Distributions, some with entries of exactly 0."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(shape, generator=draw, dtype=F64).sub(0.2).clamp_min(0)
    weights[..., 0] += 0.1
    return weights / weights.sum(-1, keepdim=True)


def omega(q, alpha):
    return torch.xlogy(q, q).sum(-1) if alpha == 1 else (q.pow(alpha).sum(-1) - 1) / (alpha * (alpha - 1))


def check_free_energy() -> None:
    for alpha in ALPHAS:
        scores, losses = model(8, 5, alpha=alpha)
        q = variational.posterior(scores, losses, alpha)
        least = variational.evidence(scores, losses, alpha)
        assert torch.allclose(variational.free_energy(scores, losses, q, alpha), least, rtol=0, atol=1e-12)
        steps = torch.tensor([1e-4, 0.1, 1.0], dtype=F64)[:, None, None, None]
        higher = variational.free_energy(scores, losses, q + steps * (simplex(30, 8, 5) - q), alpha)
        assert (higher >= least - 1e-12).all()
        assert (higher > least + 1e-10).flatten(1).any(1).all()
        prior = entmax(scores, alpha)
        other = simplex(8, 5, seed=5)
        # L(scores; q) = Omega(q) - Omega(prior) - (q - prior) . scores, since Omega*(s) = s . prior - Omega(prior)
        divergence = omega(other, alpha) - omega(prior, alpha) - ((other - prior) * scores.nan_to_num(neginf=0)).sum(-1)
        if alpha > 1:
            expected = (other * losses).sum(-1) + divergence
            assert torch.allclose(variational.free_energy(scores, losses, other, alpha), expected, rtol=0, atol=1e-12)


def check_prior_scores() -> None:
    for alpha in ALPHAS:
        mean = simplex(10, 5)
        assert (mean == 0).any()
        assert torch.allclose(entmax(variational.prior_scores(mean, alpha), alpha), mean, rtol=0, atol=1e-12)
        _, losses = model(10, 5, spread=0.5)
        q = variational.posterior(torch.zeros(5, dtype=F64), losses, alpha)
        scores = variational.prior_scores(q.mean(0), alpha).requires_grad_()
        variational.free_energy(scores, losses, q, alpha).sum().backward()
        assert torch.allclose(scores.grad, torch.zeros_like(scores), atol=1e-12)


FAULTS = {
    "the losses are added": (energies, "posterior", "scores - losses", "scores + losses"),
    "the scores are left out": (energies, "posterior", "scores - losses", "0 * scores - losses"),
    "the prior is added as a probability": (energies, "posterior", "scores - losses", "entmax(scores, alpha) - losses"),
    "the evidence lacks the prior": (
        energies, "evidence", "conjugate(scores, alpha) - conjugate(...)", "-conjugate(scores - losses, alpha)",
    ),
    "the free energy lacks the prior": (energies, "free_energy", "conjugate(...)", "0"),
    "Omega is not divided by alpha": (energies, "negative_entropy", "... / alpha", "..."),
    "the conjugate is the best score alone": (energies, "conjugate", "best + ...", "best"),
    "prior scores are logarithms": (energies, "prior_scores", "power_logarithm(...)", "as_rows(mean)[0].log()"),
}  # fmt: skip


def test_free_energies_of_posteriors():
    check_free_energy()
    check_prior_scores()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS[fault]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        test_free_energies_of_posteriors()


def test_alpha_one_is_bayes():
    prior, (_, losses) = simplex(6), model(20, 6)
    joint = prior * (-losses).exp()
    scores = variational.prior_scores(prior, 1)
    torch.testing.assert_close(variational.evidence(scores, losses, 1), -joint.sum(-1).log())
    q = variational.posterior(scores, losses, 1)
    torch.testing.assert_close(q, joint / joint.sum(-1, keepdim=True))
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(p) for p in (q, prior.expand(20, 6))))
    torch.testing.assert_close(variational.free_energy(scores, losses, q, 1), (q * losses).sum(-1) + kl)


@pytest.mark.parametrize("function", [variational.posterior, variational.evidence])
def test_alpha_near_one_is_near_bayes(function):
    prior = torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.1
    prior, (_, losses) = prior / prior.sum(), model(20, 6)
    near, exact = (function(variational.prior_scores(prior, alpha), losses, alpha) for alpha in (1 + 1e-6, 1))
    torch.testing.assert_close(near, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients(alpha):
    scores, losses = (tensor.requires_grad_() for tensor in model(2, 3, seed=1, alpha=1.5))
    q = torch.rand(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        scores.clamp_(-2)
    check = torch.autograd.gradcheck
    assert check(lambda *leaves: variational.posterior(*leaves, alpha), (scores, losses))
    assert check(lambda *leaves: variational.evidence(*leaves, alpha), (scores, losses))
    assert check(lambda *leaves: variational.free_energy(*leaves, alpha), (scores, losses, q))
    assert check(lambda leaf: variational.prior_scores(leaf, alpha), (q,))
    (of_losses,) = torch.autograd.grad(variational.evidence(scores, losses, alpha).sum(), losses)
    torch.testing.assert_close(of_losses, variational.posterior(scores, losses, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_excluded_causes_count_for_nothing(alpha):
    """Also in the gradients, and where every cause is excluded."""
    inf = torch.inf
    scores = torch.tensor([0.0, -inf, 0.3, 0.1], dtype=F64, requires_grad=True)
    losses = torch.tensor([[1.0, 2.0, inf, 1.5], [inf, inf, inf, inf]], dtype=F64, requires_grad=True)
    q = variational.posterior(scores, losses, alpha)
    kept = variational.posterior(scores[[0, 3]], losses[:1, [0, 3]], alpha)
    assert torch.equal(q[:1, [0, 3]], kept)
    assert q[:, [1, 2]].count_nonzero() == q[1].count_nonzero() == 0
    least = variational.evidence(scores, losses, alpha)
    assert least[1] == inf
    torch.testing.assert_close(variational.free_energy(scores, losses, q, alpha)[0], least[0])
    assert variational.free_energy(scores, losses, torch.full_like(q, 0.25), alpha)[0] == inf
    for result in (q[:, 0].sum(), least[0], variational.free_energy(scores, losses, q, alpha)[0]):
        for gradient in torch.autograd.grad(result, (scores, losses), retain_graph=True):
            assert gradient.isfinite().all()
    of_scores, of_losses = torch.autograd.grad(least[1], (scores, losses))
    assert torch.equal(of_losses, torch.zeros_like(losses)), "the posterior"
    torch.testing.assert_close(of_scores, entmax(scores.detach(), alpha))


def test_gradients_through_a_posterior_that_underflows():
    losses = torch.tensor([[0.0, 500.0, 1.0]], requires_grad=True)
    scores = torch.zeros(3)
    q = variational.posterior(scores, losses, 1)
    assert q[0, 1] == 0
    variational.free_energy(scores, losses, q, 1).sum().backward()
    torch.testing.assert_close(losses.grad, q.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_shapes_and_dtypes(dtype):
    scores, losses = model(2, 1, 5, 4)
    scores, losses = scores.to(dtype), losses.to(dtype).transpose(0, 2)
    q = variational.posterior(scores, losses)
    assert q.shape == (5, 1, 2, 4)
    assert q.dtype == variational.prior_scores(q.to(dtype)).dtype == (F64 if dtype == F64 else torch.float32)
    for least in (variational.evidence(scores, losses), variational.free_energy(scores, losses, q.to(dtype))):
        assert least.shape == (5, 1, 2)
        assert least.dtype == q.dtype
    assert variational.evidence(scores, losses[:0]).shape == (0, 1, 2)
    assert variational.evidence(scores, losses[0, 0, 0]).shape == ()


@pytest.mark.parametrize("alpha", [1, 1.5])
def test_samples_side_by_side(alpha):
    scores, losses = model(5, 4, alpha=alpha)
    in_turn = torch.stack([variational.evidence(scores, each, alpha) for each in losses])
    side_by_side = torch.func.vmap(lambda each: variational.evidence(scores, each, alpha))(losses)
    torch.testing.assert_close(side_by_side, in_turn)


T = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: variational.posterior([0.0], T), TypeError, r"scores must be a torch.Tensor, got list"),
        (lambda: variational.evidence(T, T.long()), TypeError, r"losses must be float16.*got torch.int64"),
        (lambda: variational.evidence(T, T.double()), TypeError, r"dtype of scores, torch.float32, got torch.float64"),
        (lambda: variational.free_energy(T, T, T.half()), TypeError, r"q must have the dtype of scores"),
        (lambda: variational.evidence(T, T.to("meta")), ValueError, r"losses must be on the device of scores, cpu"),
        (lambda: variational.evidence(T, T[:, :1]), ValueError, r"with the same causes, got \[\(2, 3\), \(2, 1\)\]"),
        (lambda: variational.evidence(T, torch.zeros(4, 3)), ValueError, r"broadcast.*\(4, 3\)"),
        (lambda: variational.evidence(T, torch.tensor(0.0)), ValueError, r"losses must have at least one dimension"),
        (lambda: variational.prior_scores(T[:, :0]), ValueError, r"mean must have at least one cause, got .*\(2, 0\)"),
        (lambda: variational.evidence(T, T, 2.5), ValueError, r"alpha must be in \[1, 2\], got 2.5"),
        (lambda: variational.prior_scores(T, torch.tensor(1.5)), TypeError, r"alpha must be a number, got"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
