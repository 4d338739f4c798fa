"""Fenchel-Young variational learning (arXiv 2502.10295): which causes explain an observation, most of them not at all.

``posterior``, ``free_energy``, ``evidence`` and ``prior_scores`` are for models of your own. ``GaussianMixture`` is one
that is ready. docs/variational.md says when it helps.
"""

from .energies import evidence, free_energy, posterior, prior_scores
from .mixture import GaussianMixture

__all__ = ["GaussianMixture", "evidence", "free_energy", "posterior", "prior_scores"]
