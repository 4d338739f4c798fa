"""Alpha that moves while a Trainer of Transformers trains."""

from torch import nn
from transformers import TrainerCallback

from ..anneal import AlphaAnnealing
from .transformers_alpha import held_tensor, set_alpha


class AnnealAlpha(TrainerCallback):
    """Moves alpha of a model with ``attn_implementation="entmax"`` from ``start`` to ``end``, a bit at each step.

    ``Trainer(model, ..., callbacks=[AnnealAlpha(model, steps=1000)])``; see :class:`AlphaAnnealing` for the arguments.
    Nothing is compiled again as alpha moves, a resumed training goes on where it stopped, and what is saved has the
    alpha of that step. The logs get ``entmax_alpha``.
    """

    def __init__(
        self, model: nn.Module, start: float = 1.01, end: float = 1.5, *, steps: int, shape: str = "cosine"
    ) -> None:
        self.model = model
        self.annealing = AlphaAnnealing(steps, start, end, shape, device=model.device)
        set_alpha(model, self.annealing.alpha)

    def _find(self) -> None:
        """The model's tensor, which may have been moved, loaded or wrapped by an adapter."""
        self.annealing.alpha = held_tensor(self.model)
        if self.annealing.alpha is None:
            raise ValueError(
                "alpha of the model is no tensor any more, that AnnealAlpha could move: set_alpha came after it"
            )

    def on_train_begin(self, arguments, state, control, model=None, **kwargs) -> None:
        self._find()
        self.annealing.load_state_dict({"taken": min(state.global_step, self.annealing.steps)})

    def on_step_end(self, arguments, state, control, **kwargs) -> None:
        self._find()
        self.annealing.step()

    def on_log(self, arguments, state, control, logs=None, **kwargs) -> None:
        alpha = held_tensor(self.model).item()
        for record in (logs, *state.log_history[-1:]):
            record["entmax_alpha"] = alpha
