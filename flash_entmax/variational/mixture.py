"""Gaussian mixtures whose points belong to few components: Fenchel-Young EM (arXiv 2502.10295).

Each step minimises the mean free energy of the points, so that it never rises:

    E: responsibilities = entmax(prior_scores(weights) - losses)
    M: means and covariances, weighted by the responsibilities; weights = the mean responsibilities
"""

import math
import warnings
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from .energies import check_alpha, evidence, free_energy, posterior, prior_scores
from .estimator import Estimator, as_given, as_points
from .gaussians import Gaussians, covariance_of, fitted, losses

COVARIANCES = "full", "diagonal"
CLUSTERING = 50


class Mixture(NamedTuple):
    """Components, and the prior's weights (components,)."""

    gaussians: Gaussians
    weights: Tensor


class Fit(NamedTuple):
    """What came of one start. ``energies`` has the mean free energy of a point after each iteration."""

    mixture: Mixture
    responsibilities: Tensor
    energies: list[float]
    converged: bool


class GaussianMixture(Estimator):
    """A mixture of Gaussians, fitted by Fenchel-Young EM, in scikit-learn's manner.

    Above alpha 1 a point belongs to few components, and mostly to one: the responsibilities of the others are exactly
    0, so that a point far from a component does not move it. At alpha 1 it is EM.

    Takes tensors, on any device, and arrays, lists and data frames. What it returns and keeps are then tensors on that
    device, or NumPy arrays. Arithmetic is in float64. Needs neither NumPy nor scikit-learn for tensors.

    Args:
        components: how many Gaussians, at least 1.
        alpha: from 1 to 2. Larger is sparser.
        covariance: ``"full"`` or ``"diagonal"``.
        max_iter: iterations of each start, at least 1.
        tol: a start ends once an iteration lowers the mean free energy of a point by less, in nats. 0 takes all
            iterations.
        n_init: starts; the one with the lowest free energy is kept.
        means_init: (components, features). By default those of k-means, from points far from each other (k-means++).
        covariances_init: (components, features, features), or (components, features) for diagonal ones. By default
            those of the points that are nearest to each mean. With it the weights start equal, else as their shares.
        reg_covar: a variance, not negative. Points count as if noise of this variance were added to them. So it is
            part of the free energy, and of the diagonal of every covariance.
        random_state: the seed of the starts: an integer, a ``torch.Generator``, or None for PyTorch's own.

    Attributes:
        weights_: (components,) the prior: the mean responsibilities.
        means_: (components, features).
        covariances_: as ``covariances_init``.
        responsibilities_: (points, components) of the points that it was fitted to.
        support_: (points, components) bool: where these are not 0.
        free_energies_: (iterations,) the mean free energy of a point after each iteration of the start that was kept.
        converged_: whether that start ended before ``max_iter``.
        n_iter_, n_features_in_: how many iterations it made; how many features it saw.

    Raises (``fit``):
        TypeError, ValueError: for arguments and points that are not as above; ValueError for a component that becomes
            singular, which takes a larger ``reg_covar``.

    Example::

        mixture = GaussianMixture(4, alpha=1.5, random_state=0).fit(points)
        mixture.predict(points)  # the component of each
        mixture.support_.sum(1)  # how many components each belongs to
    """

    def __init__(
        self,
        components: int = 1,
        alpha: float = 1.5,
        covariance: str = "full",
        *,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        means_init: Any = None,
        covariances_init: Any = None,
        reg_covar: float = 1e-6,
        random_state: int | torch.Generator | None = None,
    ) -> None:
        self.components = components
        self.alpha = alpha
        self.covariance = covariance
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.means_init = means_init
        self.covariances_init = covariances_init
        self.reg_covar = reg_covar
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, x: Any, y: Any = None):
        """Fit to points (points, features), at least as many as components, and return this object."""
        check_parameters(self)
        points = as_points(x)
        if len(points) < self.components:
            raise ValueError(
                f"x must have at least {self.components} points, one a component, got n_samples={len(points)}"
            )
        generator = generator_of(self.random_state)
        fits = [self._fit_once(points, generator) for _ in range(self.n_init)]
        mixture, responsibilities, energies, self.converged_ = min(fits, key=lambda fit: fit.energies[-1])
        if not self.converged_ and self.tol > 0:
            warnings.warn(
                f"the free energy still fell by more than tol={self.tol:g} after max_iter={self.max_iter} iterations",
                stacklevel=3,  # beyond the decorator
            )
        self.n_features_in_, self.n_iter_ = points.shape[1], len(energies)
        self.free_energies_ = as_given(torch.tensor(energies, dtype=torch.float64), x)
        self.weights_ = as_given(mixture.weights, x)
        self.means_, self.covariances_ = (as_given(tensor, x) for tensor in mixture.gaussians)
        self.responsibilities_ = as_given(responsibilities, x)
        self.support_ = as_given(responsibilities > 0, x)
        return self

    def predict(self, x: Any) -> Any:
        """(points,) int64: the component with the largest responsibility for each of the points."""
        return as_given(self._responsibilities(x).argmax(-1), x)

    def fit_predict(self, x: Any, y: Any = None) -> Any:
        """:meth:`fit`, and the component of each of the same points."""
        return as_given(torch.as_tensor(self.fit(x).responsibilities_).argmax(-1), x)

    def predict_proba(self, x: Any) -> Any:
        """(points, components): responsibilities, each row with sum 1."""
        return as_given(self._responsibilities(x), x)

    def score_samples(self, x: Any) -> Any:
        """(points,): the negative free energy of each, in nats. At alpha 1 and ``reg_covar`` 0 it is ln p(x)."""
        return as_given(-evidence(*self._scores_and_losses(x), self.alpha), x)

    def score(self, x: Any, y: Any = None) -> float:
        """The mean of :meth:`score_samples`."""
        return -evidence(*self._scores_and_losses(x), self.alpha).mean().item()

    def _responsibilities(self, x: Any) -> Tensor:
        return posterior(*self._scores_and_losses(x), self.alpha)

    @torch.no_grad()
    def _scores_and_losses(self, x: Any) -> tuple[Tensor, Tensor]:
        """Of points, under what was fitted."""
        self.check_fitted()
        points = as_points(x, self.n_features_in_, type(self).__name__)
        kept = self.weights_, self.means_, self.covariances_
        weights, *gaussians = (torch.as_tensor(tensor, device=points.device) for tensor in kept)
        return prior_scores(weights, self.alpha), losses(points, Gaussians(*gaussians), self.reg_covar)

    def _fit_once(self, points: Tensor, generator: torch.Generator | None) -> Fit:
        """From one start until the free energy falls by less than ``tol``."""
        energies = []

        def expect(mixture: Mixture) -> tuple[Tensor, float]:
            """(responsibilities, mean free energy)."""
            scores, costs = prior_scores(mixture.weights, self.alpha), losses(points, mixture.gaussians, self.reg_covar)
            q = posterior(scores, costs, self.alpha)
            return q, free_energy(scores, costs, q, self.alpha).mean().item()

        mixture = self._start(points, generator)
        responsibilities, before = expect(mixture)
        for _ in range(self.max_iter):
            gaussians = fitted(points, responsibilities, self.reg_covar, mixture.gaussians)
            mixture = Mixture(gaussians, responsibilities.mean(0))
            responsibilities, energy = expect(mixture)
            energies.append(energy)
            if self.tol > 0 and before - energy < self.tol:
                return Fit(mixture, responsibilities, energies, True)
            before = energy
        return Fit(mixture, responsibilities, energies, False)

    def _start(self, points: Tensor, generator: torch.Generator | None) -> Mixture:
        width, is_full = points.shape[1], self.covariance == "full"
        if self.means_init is None:
            means = clustered(points, spread_points(points, self.components, generator))
        else:
            means = as_start("means_init", self.means_init, (self.components, width), points)
        if self.covariances_init is None:
            return nearest_points(points, means, is_full, self.reg_covar)
        shape = (self.components, *[width] * (2 if is_full else 1))
        covariances = as_start("covariances_init", self.covariances_init, shape, points)
        return Mixture(Gaussians(means, covariances), points.new_full((self.components,), 1 / self.components))


def spread_points(points: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Some of the points, each drawn with probability in proportion to its squared distance from those before it."""
    distances, chosen = points.new_ones(len(points)), []
    for _ in range(count):
        shares = distances if distances.sum() > 0 else torch.ones_like(distances)
        index = torch.multinomial(shares.cpu(), 1, generator=generator).item()
        chosen.append(points[index])
        nearest = (points - points[index]).square().sum(-1)
        distances = torch.minimum(distances, nearest) if len(chosen) > 1 else nearest
    return torch.stack(chosen)


def clustered(points: Tensor, means: Tensor) -> Tensor:
    """K-means from these means, for CLUSTERING steps at most. A mean that no point is nearest to stays."""
    for _ in range(CLUSTERING):
        owned = one_hot(torch.cdist(points, means).argmin(-1), len(means)).to(points.dtype)
        counts = owned.sum(0).unsqueeze(-1)
        moved = torch.where(counts > 0, owned.mT @ points / counts.clamp_min(1), means)
        if torch.equal(moved, means):
            break
        means = moved
    return means


def nearest_points(points: Tensor, means: Tensor, is_full: bool, jitter: float) -> Mixture:
    """Each component has the covariance and the share of the points that its mean is nearest to, and keeps its mean.

    A single point has no covariance of its own. So the covariance of all points counts as one point more.
    """
    nearest = torch.cdist(points, means).argmin(-1)
    owned = one_hot(nearest, len(means)).to(points.dtype)
    whole = covariance_of(points - points.mean(0), points.new_full((len(points),), 1 / len(points)), jitter, is_full)
    covariances = []
    for k, mean in enumerate(means):
        weights = pad(owned[:, k], (0, 1), value=1.0)
        weights = weights / weights.sum()
        covariances.append(covariance_of(points - mean, weights[:-1], jitter, is_full) + weights[-1] * whole)
    return Mixture(Gaussians(means, torch.stack(covariances)), owned.mean(0))


def as_start(name: str, given: Any, shape: tuple[int, ...], points: Tensor) -> Tensor:
    start = torch.as_tensor(given, dtype=points.dtype, device=points.device)
    if start.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(start.shape)}")
    if not start.isfinite().all():
        raise ValueError(f"{name} must be finite, got {start.tolist()}")
    if name == "covariances_init" and start.dim() == 3 and not torch.allclose(start, start.mT):
        raise ValueError(f"{name} must be symmetric, got {start.tolist()}")
    return start


def generator_of(random_state: int | torch.Generator | None) -> torch.Generator | None:
    """A generator on the CPU. None draws from PyTorch's own."""
    if random_state is None or isinstance(random_state, torch.Generator):
        return random_state
    return torch.Generator().manual_seed(int(random_state))


def check_parameters(mixture: GaussianMixture) -> None:
    check_alpha(mixture.alpha)
    for name in ("components", "max_iter", "n_init"):
        check_number(name, getattr(mixture, name), Integral, "an integer of at least 1", 1)
    for name in ("tol", "reg_covar"):
        check_number(name, getattr(mixture, name), Real, "a finite number of at least 0", 0)
    if mixture.covariance not in COVARIANCES:
        raise ValueError(f"covariance must be one of {', '.join(map(repr, COVARIANCES))}, got {mixture.covariance!r}")
    seed = mixture.random_state
    if seed is not None and not isinstance(seed, torch.Generator):
        check_number("random_state", seed, Integral, "None, an integer of at least 0 or a torch.Generator", 0)
    elif seed is not None and seed.device.type != "cpu":
        raise ValueError(f"random_state must be a torch.Generator on the CPU, got one on {seed.device}")


def check_number(name: str, value: Any, kind: type, accepted: str, least: int) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
