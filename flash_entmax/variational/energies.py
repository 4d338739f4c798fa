"""The free energy of a choice among causes, and the exact posterior that minimises it (arXiv 2502.10295).

    F(q) = q . losses + L(scores; q)        L(scores; q) = Omega*(scores) + Omega(q) - q . scores

The last dimension has the causes. ``losses`` say how badly each explains an observation: -ln p(x | cause). ``scores``
say what is expected before: the prior is entmax(scores). Omega(q) = (sum q^alpha - 1) / (alpha (alpha - 1)), and
sum q ln q at alpha 1, where all of this is classical: L is the divergence KL(q || prior), and the least F is -ln p(x).
"""

import torch
from torch import Tensor

from ..activations import check_alpha_number, check_scores, entmax
from ..core.tensors import row_dtype
from ..losses import entmax_loss


def posterior(scores: Tensor, losses: Tensor, alpha: float = 1.5) -> Tensor:
    """The distribution over causes that minimises :func:`free_energy`: entmax(scores - losses).

    Above alpha 1 most causes get exactly 0: those that fall behind the best one by 1 / (alpha - 1) or more.

    Args:
        scores: (..., causes), the prior's; float16, bfloat16, float32 or float64. -inf excludes a cause.
        losses: (..., causes), of the dtype and device of ``scores``, in nats; +inf excludes a cause. The dimensions
            before the last broadcast.
        alpha: a number from 1, Bayes' rule, to 2. Larger is sparser.

    Returns:
        Probabilities of the broadcast shape, float32 (float64 for float64); all 0 where every cause is excluded.
        Second derivatives are refused above alpha 1.

    Raises:
        TypeError, ValueError: for tensors that do not fit, and alpha out of range.
    """
    check_causes(alpha, scores=scores, losses=losses)
    scores, losses = as_rows(scores, losses)
    return entmax(scores - losses, alpha)


def free_energy(scores: Tensor, losses: Tensor, q: Tensor, alpha: float = 1.5) -> Tensor:
    """F(q) = q . losses + Omega*(scores) + Omega(q) - q . scores, of each observation.

    A cause with ``q`` 0 counts for nothing, even if it is excluded. An excluded one with ``q`` above 0 costs inf.

    Args:
        scores, losses, alpha: as for :func:`posterior`.
        q: (..., causes), of the dtype and device of ``scores``: not negative, with sum 1.

    Returns:
        The broadcast shape without the causes, float32 (float64 for float64). At alpha 1 the gradient of Omega in
        ``q`` is taken as 0 where ``q`` is 0; it is -inf there. Second derivatives are refused above alpha 1.

    Raises:
        TypeError, ValueError: for tensors that do not fit, and alpha out of range.
    """
    check_causes(alpha, scores=scores, losses=losses, q=q)
    scores, losses, q = as_rows(scores, losses, q)
    costs = losses - scores
    expected = (q * costs.masked_fill((q == 0) & costs.isinf(), 0.0)).sum(-1)
    return expected + conjugate(scores, alpha) + negative_entropy(q, alpha)


def evidence(scores: Tensor, losses: Tensor, alpha: float = 1.5) -> Tensor:
    """The least free energy: Omega*(scores) - Omega*(scores - losses). At alpha 1 it is -ln p(x).

    Its gradient in ``losses`` is the posterior, and in ``scores`` the prior less the posterior. So it takes the place
    of a posterior and a free energy that are differentiated together.

    Args:
        scores, losses, alpha: as for :func:`posterior`.

    Returns:
        The broadcast shape without the causes, float32 (float64 for float64); inf where every cause is excluded by its
        loss. Second derivatives are refused above alpha 1.

    Raises:
        TypeError, ValueError: for tensors that do not fit, and alpha out of range.
    """
    check_causes(alpha, scores=scores, losses=losses)
    scores, losses = as_rows(scores, losses)
    return conjugate(scores, alpha) - conjugate(scores - losses, alpha)


def prior_scores(mean: Tensor, alpha: float = 1.5) -> Tensor:
    """Scores whose entmax is ``mean``: (mean^(alpha - 1) - 1) / (alpha - 1), and ln mean at alpha 1.

    With the mean of all posteriors these are the scores that minimise the sum of their free energies.

    Args:
        mean: (..., causes), not negative, with sum 1; float16, bfloat16, float32 or float64.
        alpha: a number from 1 to 2.

    Returns:
        The shape of ``mean``, float32 (float64 for float64). Where ``mean`` is 0 the score is -1 / (alpha - 1), and
        its gradient is taken as 0.

    Raises:
        TypeError, ValueError: for a tensor that does not fit, and alpha out of range. Its numbers are not checked: a
            negative one gives NaN.
    """
    check_causes(alpha, mean=mean)
    return power_logarithm(*as_rows(mean), alpha)


def conjugate(scores: Tensor, alpha: float) -> Tensor:
    """Omega*(scores) = max_p p . scores - Omega(p) of rows: the loss of the best cause as a class, and its score.

    The gradient is entmax(scores). A row of -inf alone gets -inf, with gradient 0.
    """
    best, index = scores.max(-1)
    empty = best == -torch.inf
    best = best.masked_fill(empty, -torch.inf)  # the same number, without a gradient
    if alpha == 1.0:
        return torch.where(empty, best, scores.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1))
    rows = scores.masked_fill(empty.unsqueeze(-1), 0.0).reshape(-1, scores.shape[-1])
    loss = entmax_loss(rows, index.reshape(-1), alpha, reduction="none")
    return best + loss.view(best.shape)


def negative_entropy(q: Tensor, alpha: float) -> Tensor:
    """Omega(q) = sum (q^alpha - q) / (alpha (alpha - 1)) of rows; sum q ln q at alpha 1."""
    logarithm = power_logarithm(q, alpha)
    return (q * logarithm.masked_fill((q == 0) & logarithm.isinf(), 0.0)).sum(-1) / alpha


def power_logarithm(q: Tensor, alpha: float) -> Tensor:
    """(q^(alpha - 1) - 1) / (alpha - 1), whose limit at alpha 1 is ln q. At 0 the gradient is 0."""
    absent = q == 0
    logarithm = q.masked_fill(absent, 1.0).log()
    if alpha == 1.0:
        return logarithm.masked_fill(absent, -torch.inf)
    return (torch.expm1((alpha - 1.0) * logarithm) / (alpha - 1.0)).masked_fill(absent, -1.0 / (alpha - 1.0))


def as_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of the arithmetic."""
    return tuple(tensor.to(row_dtype(tensor)) for tensor in tensors)


def check_causes(alpha: float, **tensors: Tensor) -> None:
    """Tensors of one dtype and device, with the same causes, whose other dimensions broadcast; and alpha."""
    for name, tensor in tensors.items():
        check_scores(tensor, 0, name)
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one cause, got shape {tuple(tensor.shape)}")
    check_alpha(alpha)
    (first, start), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != start.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {start.dtype}, got {tensor.dtype}")
        if tensor.device != start.device:
            raise ValueError(f"{name} must be on the device of {first}, {start.device}, got {tensor.device}")
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    try:
        torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
        fits = len({shape[-1] for shape in shapes}) == 1
    except RuntimeError:
        fits = False
    if not fits:
        names = ", ".join(tensors)
        raise ValueError(f"{names} must have shapes (..., causes) that broadcast, with the same causes, got {shapes}")


def check_alpha(alpha: float) -> None:
    check_alpha_number(alpha)
    if not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must be in [1, 2], got {alpha}")
