"""From softmax to entmax while training goes on: alpha as a tensor that moves."""

import math

import torch

SHAPES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}


class AlphaAnnealing:
    """Moves ``alpha`` from ``start`` to ``end`` over ``steps`` calls of :meth:`step`, then leaves it there.

    A model that was trained with softmax finds itself all but unchanged at alpha 1.01; raised slowly, alpha lets it
    learn which keys to do without. ``alpha`` is one tensor, changed in place: pass it to every attention call once, and
    nothing is compiled again as it moves. AdaSplash (arXiv 2502.12082) went from 1.01 to 1.5 over half of a run.

    The tensor belongs to this object and not to the model, whose copies and ``state_dict`` are without it: an average
    of weights (``torch.optim.swa_utils.AveragedModel``) or a ``deepcopy`` is called with the same tensor, and so is
    always where the model is. A copy of this object has a tensor of its own, which only its own steps move.

    Args:
        steps: how many calls of ``step()`` the way takes, at least 1.
        start, end: alpha before the first and after the last, in [1.01, 2].
        shape: ``"cosine"``, slow at both ends, or ``"linear"``.
        device: of the tensor; that of the model.

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
        for name, number in (("start", start), ("end", end)):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                raise TypeError(f"{name} must be a number in [1.01, 2], got {number!r}")
            if not 1.01 <= number <= 2.0:
                raise ValueError(f"{name} must be in [1.01, 2], the range of a tensor alpha, got {number}")
        if shape not in tuple(SHAPES):
            raise ValueError(f"shape must be one of {', '.join(map(repr, SHAPES))}, got {shape!r}")
        self.steps, self.start, self.end, self.shape = steps, float(start), float(end), shape
        self.taken = 0
        self.alpha = torch.tensor(self.start, dtype=torch.float32, device=device)

    def step(self) -> float:
        """Move alpha on by one step; returns its new value."""
        self.taken = min(self.taken + 1, self.steps)
        return self._place()

    def _place(self) -> float:
        value = self.start + (self.end - self.start) * SHAPES[self.shape](self.taken / self.steps)
        with torch.no_grad():
            self.alpha.fill_(value)
        return value

    def state_dict(self) -> dict[str, int | float | str]:
        """How many steps were taken, and of which way."""
        return {"taken": self.taken, "steps": self.steps, "start": self.start, "end": self.end, "shape": self.shape}

    def load_state_dict(self, state: dict[str, int | float | str]) -> None:
        """Go to where ``state`` stood. ``{"taken": n}`` alone is a place on whatever way this object goes.

        Raises a ValueError where the state is of another way, or not on it.
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
            raise ValueError(f"the state is of another way: {', '.join(other)}; make AlphaAnnealing with its arguments")
        taken = state["taken"]
        if not isinstance(taken, int) or isinstance(taken, bool) or not 0 <= taken <= self.steps:
            raise ValueError(f"taken must be an integer from 0 to {self.steps}, got {taken!r}")
        self.taken = taken
        self._place()

    def __repr__(self) -> str:
        way = f"{self.start:g} to {self.end:g}, {self.shape}, step {self.taken} of {self.steps}"
        return f"{type(self).__name__}({way}: alpha {self.alpha.item():.4g})"
