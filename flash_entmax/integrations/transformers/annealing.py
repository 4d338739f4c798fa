"""A callback that moves alpha while a Trainer of Transformers trains."""

from torch import nn
from transformers import TrainerCallback

from ...anneal import AlphaAnnealing
from .setting import assign_alpha, belongs_to_adapter, held_tensor


class AnnealAlpha(TrainerCallback):
    """Moves alpha of a model with ``attn_implementation="entmax"`` from ``start`` to ``end``, a little at each step.

    ``Trainer(model, ..., callbacks=[AnnealAlpha(model, steps=1000)])``. Nothing is compiled again as alpha moves. A
    resumed training continues where it stopped, and a saved model has the alpha of its step. The logs that the trainer
    prints and ``state.log_history`` get ``entmax_alpha``, and so do the callbacks of ``report_to`` that come after this
    one.

    Args:
        model: the model that the Trainer gets.
        start, end, steps, shape, hold: as for :class:`flash_entmax.anneal.AlphaAnnealing`.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range; no layer of the model runs entmax, or
            its alpha is learned.
    """

    def __init__(
        self,
        model: nn.Module,
        start: float = 1.01,
        end: float = 1.5,
        *,
        steps: int,
        shape: str = "cosine",
        hold: int = 0,
    ) -> None:
        device = next((weight.device for weight in model.parameters()), None) if isinstance(model, nn.Module) else None
        self.model = model
        self.annealing = AlphaAnnealing(steps, start, end, shape, device, hold)
        if not (isinstance(model, nn.Module) and belongs_to_adapter(model)):
            assign_alpha(model, self.annealing.alpha, "AnnealAlpha")
        self._take_tensor()
        self.annealing.load_state_dict({"taken": 0})

    def _take_tensor(self) -> None:
        """Take the model's tensor, which may be another one after a move, a load or an adapter."""
        alpha = held_tensor(self.model)
        if alpha is None or isinstance(alpha, nn.Parameter):
            kind = "in its config" if alpha is None else "a Parameter, which is learned"
            raise ValueError(f"AnnealAlpha has no tensor to move: alpha of the model is {kind}")
        self.annealing.alpha = alpha

    def on_train_begin(self, arguments, state, control, model=None, **kwargs) -> None:
        self._take_tensor()
        if model is not None and held_tensor(model) is not self.annealing.alpha:
            raise ValueError(
                f"AnnealAlpha was made for another {type(self.model).__name__} than the {type(model).__name__} that is "
                "trained: make it with the model that the Trainer gets"
            )
        self.annealing.load_state_dict({"taken": min(state.global_step, self.annealing.last_step)})

    def on_step_end(self, arguments, state, control, **kwargs) -> None:
        self._take_tensor()
        self.annealing.step()

    def on_log(self, arguments, state, control, logs=None, **kwargs) -> None:
        alpha = self.annealing.alpha.item()
        for record in (logs, *state.log_history[-1:]):
            if record is not None:
                record["entmax_alpha"] = alpha
