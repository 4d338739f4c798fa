"""From softmax to entmax during training: alpha as a tensor that moves."""

import copy
import math

import torch

from .core.call import ALPHAS
from .core.checks import checked_device, is_number, typed

# Alpha after a share of the steps from start to end.
CURVES = {
    "linear": lambda start, end, share: start + (end - start) * share,
    "cosine": lambda start, end, share: start + (end - start) * ((1 - math.cos(math.pi * share)) / 2),
    "geometric": lambda start, end, share: 1 + (start - 1) ** (1 - share) * (end - 1) ** share,
}


class AlphaAnnealing:
    """Moves ``alpha`` from ``start`` to ``end`` over ``steps`` calls of :meth:`step`, then leaves it there.

    ``hold`` further calls come first, and leave it at ``start``.

    A model that was trained with softmax hardly changes at alpha 1.01. As alpha rises slowly, the model learns which
    keys it can do without. AdaSplash (arXiv 2502.12082) went from 1.01 to 1.5 over half of a run.

    ``alpha`` is one tensor, changed in place. Pass it to every attention call; nothing is compiled again as it moves.
    It belongs to this object and not to the model: copies and the ``state_dict`` of the model do not hold it. Call an
    average of weights (``torch.optim.swa_utils.AveragedModel``) or a ``deepcopy`` with the same tensor, and its alpha
    is that of the model at all times. A copy of this object has its own tensor, which only its own steps move.

    Args:
        steps: how many calls of ``step()`` it takes from ``start`` to ``end``, at least 1.
        start, end: alpha before the first step and after the last, in [1.01, 2].
        shape: ``"cosine"``, slow at both ends; ``"linear"``; or ``"geometric"``, slow at first, along which
            1 / (alpha - 1) falls by the same factor at each step. A key can have a positive probability only if its
            score is less than 1 / (alpha - 1) below the largest one of its row.
        device: of the tensor, which must be that of the model.
        hold: how many calls of ``step()`` leave alpha at ``start`` before it moves, at least 0.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.

    Attributes:
        alpha: 0-dimensional float32 tensor, without gradient.

    Example::

        annealing = AlphaAnnealing(steps=1000, device="cuda")
        for batch in batches:
            alpha = annealing.end if annealing.is_at_rest else annealing.alpha  # for a number, kernels are faster
            loss = model(batch, alpha=alpha)  # entmax_attention(..., alpha=alpha)
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
        hold: int = 0,
    ) -> None:
        for name, count, least in (("steps", steps, 1), ("hold", hold, 0)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
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
        self.steps, self.start, self.end, self.shape, self.hold = steps, float(start), float(end), shape, hold
        self.taken = 0
        with torch.inference_mode(False):  # wherever it is made, it can be moved elsewhere too
            device = None if device is None else checked_device(device)
            self.alpha = torch.tensor(self.start, dtype=torch.float32, device=device)

    def __copy__(self) -> "AlphaAnnealing":
        return copy.deepcopy(self)

    @property
    def last_step(self) -> int:
        """How many calls of ``step()`` it takes until alpha is at ``end``: ``hold + steps``."""
        return self.hold + self.steps

    @property
    def is_at_rest(self) -> bool:
        """Whether alpha has come to ``end``. From then on, pass that number: there are faster kernels for it."""
        return self.taken == self.last_step

    def step(self) -> float:
        """Move alpha by one step, and return its new value."""
        self.taken = min(self.taken + 1, self.last_step)
        return self._move_alpha()

    def _move_alpha(self) -> float:
        """Set alpha to its value after the steps taken."""
        value = CURVES[self.shape](self.start, self.end, max(0, self.taken - self.hold) / self.steps)
        with torch.no_grad():
            self.alpha.fill_(value)
        return value

    def state_dict(self) -> dict[str, int | float | str]:
        """The number of steps taken, and the arguments of this object but the device."""
        names = "taken", "steps", "start", "end", "shape", "hold"
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, int | float | str]) -> None:
        """Continue after the steps that ``state`` has taken, held ones included. ``{"taken": n}`` alone is enough.

        Raises:
            TypeError: no dict.
            ValueError: the state has other arguments than this object, other keys, or an impossible number of steps.
        """
        own = self.state_dict()
        if not isinstance(state, dict):
            raise TypeError(f"a state must be a dict, got {typed(state)}")
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
        if not isinstance(taken, int) or isinstance(taken, bool) or not 0 <= taken <= self.last_step:
            raise ValueError(f"taken must be an integer from 0 to {self.last_step}, got {taken!r}")
        self.taken = taken
        self._move_alpha()

    def __repr__(self) -> str:
        held = f", held for {self.hold}" if self.hold else ""
        steps = f"{self.start:g} to {self.end:g}, {self.shape}{held}, step {self.taken} of {self.last_step}"
        return f"{type(self).__name__}({steps}: alpha {self.alpha.item():.4g})"
