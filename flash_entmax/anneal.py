"""From softmax to entmax during training: alpha as a tensor that moves."""

import math

import torch

from .core.call import ALPHAS
from .core.checks import is_number

# Which share of the way from start to end alpha has gone after a share of the steps.
CURVES = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


class AlphaAnnealing:
    """Moves ``alpha`` from ``start`` to ``end`` over ``steps`` calls of :meth:`step`, then leaves it there.

    A model that was trained with softmax hardly changes at alpha 1.01. As alpha rises slowly, the model learns which
    keys it can do without. AdaSplash (arXiv 2502.12082) went from 1.01 to 1.5 over half of a run.

    ``alpha`` is one tensor, changed in place. Pass it to every attention call; nothing is compiled again as it moves.
    It belongs to this object and not to the model: copies and the ``state_dict`` of the model do not hold it. Call an
    average of weights (``torch.optim.swa_utils.AveragedModel``) or a ``deepcopy`` with the same tensor, and its alpha
    is that of the model at all times. A copy of this object has its own tensor, which only its own steps move.

    Args:
        steps: how many calls of ``step()`` it takes from ``start`` to ``end``, at least 1.
        start, end: alpha before the first step and after the last, in [1.01, 2].
        shape: ``"cosine"``, slow at both ends, or ``"linear"``.
        device: of the tensor, which must be that of the model.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.

    Attributes:
        alpha: 0-dimensional float32 tensor, without gradient.

    Example::

        annealing = AlphaAnnealing(steps=1000, device="cuda")
        for batch in batches:
            loss = model(batch, alpha=annealing.alpha)  # entmax_attention(..., alpha=annealing.alpha)
            ...
            annealing.step()
    """

    def __init__(
        self,
        steps: int,
        start: float = 1.01,
        end: float = 1.5,
        shape: str = "cosine",
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
        lowest, highest = ALPHAS
        for name, number in (("start", start), ("end", end)):
            if not is_number(number):
                raise TypeError(f"{name} must be a number in [{lowest:g}, {highest:g}], got {number!r}")
            if not lowest <= number <= highest:
                raise ValueError(
                    f"{name} must be in [{lowest:g}, {highest:g}], the range of a tensor alpha, got {number}"
                )
        if shape not in tuple(CURVES):
            raise ValueError(f"shape must be one of {', '.join(map(repr, CURVES))}, got {shape!r}")
        self.steps, self.start, self.end, self.shape = steps, float(start), float(end), shape
        self.taken = 0
        self.alpha = torch.tensor(self.start, dtype=torch.float32, device=device)

    def step(self) -> float:
        """Move alpha by one step, and return its new value."""
        self.taken = min(self.taken + 1, self.steps)
        return self._move_alpha()

    def _move_alpha(self) -> float:
        """Set alpha to its value after the steps taken."""
        value = self.start + (self.end - self.start) * CURVES[self.shape](self.taken / self.steps)
        with torch.no_grad():
            self.alpha.fill_(value)
        return value

    def state_dict(self) -> dict[str, int | float | str]:
        """The number of steps taken, and the arguments of this object but the device."""
        return {"taken": self.taken, "steps": self.steps, "start": self.start, "end": self.end, "shape": self.shape}

    def load_state_dict(self, state: dict[str, int | float | str]) -> None:
        """Continue after the steps that ``state`` has taken. ``{"taken": n}`` alone is enough.

        Raises:
            ValueError: the state has other arguments than this object, other keys, or an impossible number of steps.
        """
        own = self.state_dict()
        if "taken" not in state or not state.keys() <= own.keys():
            raise ValueError(f"a state must hold taken, and may hold {', '.join(list(own)[1:])}, got {state}")
        other = [
            f"{name} {state[name]!r} for {own[name]!r}"
            for name in list(own)[1:]
            if state.get(name, own[name]) != own[name]
        ]
        if other:
            raise ValueError(f"the state has other arguments: {', '.join(other)}; make AlphaAnnealing with them")
        taken = state["taken"]
        if not isinstance(taken, int) or isinstance(taken, bool) or not 0 <= taken <= self.steps:
            raise ValueError(f"taken must be an integer from 0 to {self.steps}, got {taken!r}")
        self.taken = taken
        self._move_alpha()

    def __repr__(self) -> str:
        steps = f"{self.start:g} to {self.end:g}, {self.shape}, step {self.taken} of {self.steps}"
        return f"{type(self).__name__}({steps}: alpha {self.alpha.item():.4g})"
