"""Alpha that moves while a Trainer of Transformers trains."""

from torch import nn
from transformers import TrainerCallback

from ...anneal import AlphaAnnealing
from .alpha import assign_alpha, belongs_to_adapter, held_tensor


class AnnealAlpha(TrainerCallback):
    """Moves alpha of a model with ``attn_implementation="entmax"`` from ``start`` to ``end``, a bit at each step.

    ``Trainer(model, ..., callbacks=[AnnealAlpha(model, steps=1000)])``; see :class:`AlphaAnnealing` for the arguments.
    Nothing is compiled again as alpha moves, a resumed training goes on where it stopped, and what is saved has the
    alpha of that step. What the trainer prints, and its ``state.log_history``, get ``entmax_alpha``; of the callbacks
    of ``report_to``, those that come after this one.
    """

    def __init__(
        self, model: nn.Module, start: float = 1.01, end: float = 1.5, *, steps: int, shape: str = "cosine"
    ) -> None:
        device = next((weight.device for weight in model.parameters()), None) if isinstance(model, nn.Module) else None
        self.model = model
        self.annealing = AlphaAnnealing(steps, start, end, shape, device=device)
        if not (isinstance(model, nn.Module) and belongs_to_adapter(model)):
            assign_alpha(model, self.annealing.alpha, "AnnealAlpha")
        self._find()
        self.annealing.load_state_dict({"taken": 0})

    def _find(self) -> None:
        """The model's tensor, which may have been moved, loaded or wrapped by an adapter."""
        alpha = held_tensor(self.model)
        if alpha is None or isinstance(alpha, nn.Parameter):
            kind = "in its config" if alpha is None else "a Parameter, which is learned"
            raise ValueError(f"AnnealAlpha has no tensor to move: alpha of the model is {kind}")
        self.annealing.alpha = alpha

    def on_train_begin(self, arguments, state, control, model=None, **kwargs) -> None:
        self._find()
        if model is not None and held_tensor(model) is not self.annealing.alpha:
            raise ValueError(
                f"AnnealAlpha was made for another {type(self.model).__name__} than the {type(model).__name__} that is "
                "trained: make it with the model that the Trainer gets"
            )
        self.annealing.load_state_dict({"taken": min(state.global_step, self.annealing.steps)})

    def on_step_end(self, arguments, state, control, **kwargs) -> None:
        self._find()
        self.annealing.step()

    def on_log(self, arguments, state, control, logs=None, **kwargs) -> None:
        alpha = self.annealing.alpha.item()
        for record in (logs, *state.log_history[-1:]):
            record["entmax_alpha"] = alpha
