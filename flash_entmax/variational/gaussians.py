"""Gaussian components of points: the loss of each point under each, and the parameters that minimise weighted losses.

    loss = -ln N(x; mean, covariance) + jitter / 2 tr(covariance^-1)

That is the mean of -ln N over noise of variance ``jitter`` around the point. So the covariance that minimises weighted
losses is the weighted one plus ``jitter`` on its diagonal, and every covariance is at least that.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussians(NamedTuple):
    """``means`` (components, features); ``covariances`` (components, features, features), or variances like means."""

    means: Tensor
    covariances: Tensor

    @property
    def is_full(self) -> bool:
        return self.covariances.dim() == 3


def losses(points: Tensor, gaussians: Gaussians, jitter: float) -> Tensor:
    """(points, components) of points (n, features)."""
    loss = full_loss if gaussians.is_full else diagonal_loss
    return torch.stack([loss(points, *each, jitter) for each in zip(*gaussians, strict=True)], -1)


def fitted(points: Tensor, responsibilities: Tensor, jitter: float, before: Gaussians) -> Gaussians:
    """What minimises the losses weighted by ``responsibilities`` (points, components).

    A component without any weight stays as it was: nothing depends on it.
    """
    means, covariances = before.means.clone(), before.covariances.clone()
    for k, (weights, mass) in enumerate(zip(responsibilities.unbind(-1), responsibilities.sum(0), strict=True)):
        if mass > 0:
            shares = weights / mass
            means[k] = shares @ points
            covariances[k] = covariance_of(points - means[k], shares, jitter, before.is_full)
    return Gaussians(means, covariances)


def full_loss(points: Tensor, mean: Tensor, covariance: Tensor, jitter: float) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise ValueError("a covariance is not positive definite: take a larger reg_covar, or fewer components")
    identity = torch.eye(len(mean), dtype=points.dtype, device=points.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    squared = ((points - mean) @ inverse.mT).square().sum(-1) + jitter * inverse.square().sum()
    return (squared + len(mean) * math.log(2 * math.pi)) / 2 + root.diagonal().log().sum()


def diagonal_loss(points: Tensor, mean: Tensor, variance: Tensor, jitter: float) -> Tensor:
    if not (variance > 0).all():
        raise ValueError("a variance is 0: take a larger reg_covar, or fewer components")
    squared = ((points - mean).square() + jitter) / variance
    return (squared + (2 * math.pi * variance).log()).sum(-1) / 2


def covariance_of(centred: Tensor, shares: Tensor, jitter: float, is_full: bool) -> Tensor:
    """Of points less their mean, (n, features), with weights (n,) of sum 1."""
    if not is_full:
        return shares @ centred.square() + jitter
    covariance = centred.mT @ (shares.unsqueeze(-1) * centred)
    covariance.diagonal().add_(jitter)
    return covariance
