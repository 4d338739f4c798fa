"""Gaussian mixtures: the free energy never rises, alpha 1 is EM, and scikit-learn takes the class for an estimator."""

import pickle
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from mutants import Mutant, plant
from torch.distributions import MultivariateNormal

from flash_entmax.variational import GaussianMixture, evidence, gaussians, mixture, posterior, prior_scores

F64 = torch.float64
MIXTURES = (1, "full"), (1.25, "diagonal"), (1.5, "full"), (2.0, "diagonal"), (2.0, "full")
needs_sklearn = pytest.mark.skipif(not find_spec("sklearn"), reason="needs scikit-learn")


def blobs(count=90, seed=0):
    """Three overlapping blobs of different sizes, and a few points far from all of them."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [2.0, 1.0], [2.0, -2.0]], dtype=F64)
    sizes = torch.tensor([0.4, 0.9, 0.7], dtype=F64)
    kind = torch.arange(count) % 3
    points = centres[kind] + sizes[kind, None] * torch.randn(count, 2, generator=draw, dtype=F64)
    return torch.cat([points, 8 * torch.rand(count // 10, 2, generator=draw, dtype=F64) - 4])


def start(covariance="full"):
    means = torch.tensor([[0.0, 0.2], [1.0, 1.0], [1.0, -1.0]], dtype=F64)
    covariances = torch.tensor([[1.0, 1.5], [1.2, 0.8], [1.0, 1.0]], dtype=F64)
    return {"means_init": means, "covariances_init": covariances.diag_embed() if covariance == "full" else covariances}


def fit(points, *args, steps=10, **options):
    return GaussianMixture(3, *args, max_iter=steps, tol=0, **options).fit(points)


def test_without_a_tolerance_all_iterations_are_taken():
    """On a plateau the free energy rises by roundings."""
    for alpha in (1.0, 1.5, 2.0):
        fitted = fit(blobs(), alpha, steps=60)
        assert (fitted.n_iter_, fitted.converged_) == (60, False)


def independent_losses(points, means, covariances, jitter):
    """-ln N, and jitter / 2 of the trace of the inverse, by torch.distributions."""
    covariances = covariances if covariances.dim() == 3 else covariances.diag_embed()
    density = MultivariateNormal(means, covariances).log_prob(points[:, None])
    return jitter / 2 * covariances.inverse().diagonal(dim1=-2, dim2=-1).sum(-1) - density


CASES = (1.5, "diagonal", 0.05), (2.0, "full", 0.05)


def check_one_iteration(cases=CASES) -> None:
    """In the textbook's form, with the weights that entmax gives, from equal weights."""
    points = blobs()
    for alpha, covariance, jitter in cases:
        begin = start(covariance)
        after = fit(points, alpha, covariance, steps=1, reg_covar=jitter, **begin)
        costs = independent_losses(points, *begin.values(), jitter)
        q = posterior(torch.zeros(3, dtype=F64), costs, alpha)
        weights, means = q.mean(0), (q.T @ points) / q.sum(0)[:, None]
        centred = points[:, None] - means
        covariances = torch.einsum("nk,nki,nkj->kij", q, centred, centred) / q.sum(0)[:, None, None]
        covariances = covariances + jitter * torch.eye(2, dtype=F64)
        if covariance == "diagonal":
            covariances = covariances.diagonal(dim1=-2, dim2=-1)
        scores, costs = prior_scores(weights, alpha), independent_losses(points, means, covariances, jitter)
        least = evidence(scores, costs, alpha)
        for ours, expected in (
            (after.weights_, weights),
            (after.means_, means),
            (after.covariances_, covariances),
            (after.responsibilities_, posterior(scores, costs, alpha)),
            (after.score_samples(points), -least),
            (after.free_energies_, least.mean()),
        ):
            assert torch.allclose(ours, expected, rtol=0, atol=1e-10)


FAULTS = {
    "means are not divided by the weights": (gaussians, "fitted", "weights / mass", "weights / len(points)"),
    "covariances are around the means before": (gaussians, "fitted", "points - means[k]", "points - before.means[k]"),
    "covariances stay as they were": (gaussians, "fitted", "covariances[k] = ...", "pass"),
    "the jitter is no part of a full loss": (gaussians, "full_loss", "jitter * ...", "0"),
    "the jitter is no part of a diagonal loss": (gaussians, "diagonal_loss", "... + jitter", "..."),
    "a full loss lacks half of the determinant": (
        gaussians, "full_loss", "root.diagonal().log().sum()", "root.diagonal().log().sum() / 2",
    ),
    "a diagonal loss lacks the determinant": (gaussians, "diagonal_loss", "(2 * math.pi * variance).log()", "0"),
    "the prior never learns": (
        GaussianMixture, "_fit_once", "responsibilities.mean(0)", "mixture.weights",
    ),
    "the prior is added as a probability": (
        GaussianMixture, "_fit_once", "prior_scores(mixture.weights, self.alpha)", "mixture.weights",
    ),
    "the prior's scores are logarithms": (
        GaussianMixture, "_fit_once", "prior_scores(mixture.weights, self.alpha)", "prior_scores(mixture.weights, 1)",
    ),
    "responsibilities are one iteration old": (
        GaussianMixture, "_fit_once", "responsibilities, energy = expect(mixture)", "_, energy = expect(mixture)",
    ),
    "responsibilities are softmax": (GaussianMixture, "_fit_once", "posterior(scores, costs, self.alpha)",
        "posterior(scores, costs, 1)",
    ),
}  # fmt: skip


def test_one_iteration():
    check_one_iteration()
    check_one_iteration([(1, "full", 0.0), (1, "diagonal", 0.05)])


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS[fault]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check_one_iteration()


@pytest.mark.parametrize(("alpha", "covariance"), MIXTURES)
def test_the_free_energy_never_rises(alpha, covariance):
    """With a regularisation so large that it would rise if that were no part of it."""
    energies = fit(blobs(), alpha, covariance, steps=20, reg_covar=0.05, **start(covariance)).free_energies_
    assert energies.diff().max() <= 1e-12
    assert energies[0] - energies[-1] > 1e-2


@needs_sklearn
@pytest.mark.parametrize(("covariance", "theirs"), [("full", "full"), ("diagonal", "diag")])
def test_alpha_one_is_the_em_of_scikit_learn(covariance, theirs):
    from sklearn.mixture import GaussianMixture as Peer

    points, begin = blobs().numpy(), start(covariance)
    covariances = begin["covariances_init"]
    precisions = covariances.inverse() if covariance == "full" else 1 / covariances
    peer = Peer(
        3, covariance_type=theirs, max_iter=8, tol=0, reg_covar=0, weights_init=[1 / 3] * 3,
        means_init=begin["means_init"].numpy(), precisions_init=precisions.numpy(), random_state=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge
        peer.fit(points)
    ours = fit(points, 1, covariance, steps=8, reg_covar=0, **begin)
    for name in ("weights_", "means_", "covariances_"):
        torch.testing.assert_close(getattr(ours, name), getattr(peer, name), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.predict_proba(points), peer.predict_proba(points), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.score_samples(points), peer.score_samples(points), rtol=1e-8, atol=1e-8)


@needs_sklearn
def test_outliers_move_the_components_of_em():
    """The paper's blobs: clusters are found better above alpha 1, where EM is run until it stands."""
    from sklearn.metrics import adjusted_mutual_info_score

    from flash_entmax.programs.recipes.mixture import paper_blobs

    points, labels = paper_blobs(0)
    inside = labels >= 0
    found = {}
    for alpha in (1, 2.0):
        predicted = GaussianMixture(4, alpha, max_iter=60, tol=0, random_state=0).fit_predict(points)
        found[alpha] = adjusted_mutual_info_score(labels[inside], predicted[inside])
    assert found[2.0] > found[1] + 0.03


@needs_sklearn
def test_scikit_learn_takes_it_for_an_estimator():
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it inherits from nothing of scikit-learn
        checks = check_estimator(GaussianMixture(3, max_iter=2, tol=0), on_skip=None)
    assert len(checks) > 35
    assert {check["check_name"] for check in checks if check["status"] != "passed"} <= {"check_array_api_input"}


def test_support_is_sparse_and_results_fit_together():
    points = blobs()
    fitted = fit(points, 1.5, random_state=0)
    q = fitted.responsibilities_
    assert torch.equal(fitted.support_, q > 0)
    assert 1 <= fitted.support_.sum(1).double().mean() < 2
    torch.testing.assert_close(fitted.predict_proba(points), q)
    assert torch.equal(fitted.predict(points), q.argmax(1))
    assert torch.equal(GaussianMixture(3, max_iter=10, tol=0, random_state=0).fit_predict(points), q.argmax(1))
    assert fitted.score(points) == pytest.approx(-fitted.free_energies_[-1].item())
    assert fitted.weights_.sum() == pytest.approx(1)
    assert (fitted.n_iter_, fitted.n_features_in_, len(fitted.free_energies_)) == (10, 2, 10)
    assert torch.equal(pickle.loads(pickle.dumps(fitted)).predict(points), fitted.predict(points))


def test_arrays_lists_and_float32_are_the_same_points():
    points = blobs().float()
    fits = [fit(x, random_state=0, steps=5) for x in (points, points.numpy(), points.tolist())]
    assert all(type(fitted.means_).__module__ == "numpy" for fitted in fits[1:])
    assert type(fits[1].predict(points)) is torch.Tensor
    for name in ("means_", "responsibilities_", "support_", "free_energies_"):
        first, *others = (torch.as_tensor(getattr(fitted, name)) for fitted in fits)
        assert all(torch.equal(other, first) for other in others), name


def test_tensors_need_neither_numpy_nor_scikit_learn(monkeypatch):
    for name in ("numpy", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    fitted = fit(blobs(), steps=2, random_state=0)
    assert fitted.predict(blobs()).dtype == torch.int64
    with pytest.raises(ValueError, match="this GaussianMixture is not fitted: call fit first"):
        GaussianMixture().predict(blobs())


def test_starts():
    """The best start is kept, a seed repeats it, and a generator goes on."""
    points, draw = blobs(), torch.Generator().manual_seed(7)
    in_turn = [fit(points, 2.0, steps=2, random_state=draw).free_energies_[-1] for _ in range(3)]
    assert len(set(in_turn)) == 3
    assert min(in_turn) != in_turn[0]
    best = fit(points, 2.0, steps=2, random_state=7, n_init=3)
    assert best.free_energies_[-1] == min(in_turn)
    torch.manual_seed(7)
    assert fit(points, 2.0, steps=2).free_energies_[-1] == in_turn[0]


def test_starts_are_of_points_that_lie_apart():
    points = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64).repeat(10, 1)
    for seed in range(20):
        chosen = mixture.spread_points(points, 3, torch.Generator().manual_seed(seed))
        assert sorted(chosen.flatten().tolist()) == [0.0, 1.0, 5.0]


def test_a_mean_that_no_point_is_nearest_to_stays():
    means = torch.tensor([[0.0, 0.0], [99.0, 99.0]], dtype=torch.float64)
    points = torch.randn(20, 2, dtype=torch.float64)
    assert torch.equal(mixture.clustered(points, means)[1], means[1])


def test_the_covariance_of_one_point_is_half_that_of_all():
    points = torch.cat([torch.randn(30, 2, dtype=torch.float64), torch.full((1, 2), 50.0, dtype=torch.float64)])
    means = torch.tensor([[0.0, 0.0], [50.0, 50.0]], dtype=torch.float64)
    found = mixture.nearest_points(points, means, True, 0.0).gaussians.covariances[1]
    torch.testing.assert_close(found, points.T.cov(correction=0) / 2)


def test_a_component_without_points_stays_where_it_was():
    begin = start()
    begin["means_init"][2] = 1e3
    fitted = fit(blobs(), 1.5, **begin)
    assert torch.equal(fitted.means_[2], begin["means_init"][2])
    assert not fitted.support_[:, 2].any()
    assert fitted.weights_[2] == 0
    assert fitted.free_energies_.isfinite().all()
    assert (fitted.predict(blobs()) != 2).all()


def test_points_that_are_all_the_same():
    fitted = fit(torch.ones(5, 2), 1.5, steps=3, random_state=0)
    assert fitted.means_.isfinite().all()
    with pytest.raises(ValueError, match="take a larger reg_covar, or fewer components"):
        fit(torch.ones(5, 2), 1.5, reg_covar=0)


def test_convergence_is_said():
    points = blobs()
    fitted = GaussianMixture(3, tol=1e-3, random_state=0, **start()).fit(points)
    assert fitted.converged_
    assert fitted.n_iter_ < 100
    falls = -fitted.free_energies_.diff()
    assert (falls[:-1] >= 1e-3).all()
    assert falls[-1] < 1e-3
    with pytest.warns(UserWarning, match=r"by more than tol=1e-09 after max_iter=2 iterations"):
        assert not GaussianMixture(3, tol=1e-9, max_iter=2, random_state=0).fit(points).converged_


def test_parameters():
    estimator = GaussianMixture(3, covariance="diagonal")
    assert repr(estimator) == "GaussianMixture(components=3, covariance='diagonal')"
    assert estimator.set_params(alpha=2.0) is estimator
    assert GaussianMixture(**estimator.get_params()).get_params() == estimator.get_params()
    with pytest.raises(ValueError, match=r"parameters are components, alpha, .*, got 'n_components'"):
        estimator.set_params(n_components=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"components": 0}, ValueError, "components must be an integer of at least 1, got 0"),
        ({"components": 2.0}, TypeError, "components must be an integer of at least 1, got 2.0"),
        ({"components": 9}, ValueError, "x must have at least 9 points, one a component, got n_samples=4"),
        ({"alpha": 3.0}, ValueError, r"alpha must be in \[1, 2\], got 3.0"),
        ({"covariance": "diag"}, ValueError, "covariance must be one of 'full', 'diagonal', got 'diag'"),
        ({"max_iter": True}, TypeError, "max_iter must be an integer of at least 1, got True"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number of at least 0, got -1.0"),
        ({"n_init": 0}, ValueError, "n_init must be an integer of at least 1, got 0"),
        ({"reg_covar": float("nan")}, ValueError, "reg_covar must be a finite number of at least 0, got nan"),
        ({"means_init": [[0.0, torch.nan]]}, ValueError, "means_init must be finite, got"),
        ({"means_init": [[0.0]]}, ValueError, r"means_init must have shape \(1, 2\), got \(1, 1\)"),
        ({"covariances_init": [[1.0, 1.0]]}, ValueError, r"covariances_init must have shape \(1, 2, 2\), got \(1, 2\)"),
        ({"means_init": [[0.0, 0.0]], "covariances_init": [[[1.0, 5.0], [0.0, 1.0]]]}, ValueError, "must be symmetric"),
        ({"random_state": "0"}, TypeError, "random_state must be None, an integer .* or a torch.Generator, got '0'"),
    ],
)
def test_refusals_of_parameters(options, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(**options).fit(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"x must have shape \(points, features\), got \(4,\)"),
        (torch.zeros(0, 2), ValueError, r"x must have at least one point, got shape \(0, 2\)"),
        (torch.tensor([[torch.nan]]), ValueError, "x must be finite, got NaN or inf"),
        ([["a"]], ValueError, "could not convert string to float"),
        (torch.zeros(2, 2, dtype=torch.complex64), ValueError, "x must be real, got torch.complex64"),
    ],
)
def test_refusals_of_points(x, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture().fit(x)


def test_points_of_other_features_are_refused():
    with pytest.raises(ValueError, match="X has 3 features, but GaussianMixture is expecting 2 features as input"):
        fit(blobs(), steps=1, random_state=0).predict(torch.zeros(2, 3))


def test_means_of_k_means_are_those_of_their_points():
    points = blobs()
    means = mixture.clustered(points, mixture.spread_points(points, 3, torch.Generator().manual_seed(0)))
    nearest = torch.cdist(points, means).argmin(-1)
    torch.testing.assert_close(means, torch.stack([points[nearest == k].mean(0) for k in range(3)]))
