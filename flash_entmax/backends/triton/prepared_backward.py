"""Backward passes like one before: their launches are written down once. Later ones look up addresses only.

Strides are looked at each time: a gradient of the output may have any, and hooks of autograd may pack what is saved.
"""

import torch
from torch import Tensor

from ...core.call import OwnOptions, ScoreOptions
from ...core.tensors import empty_stored_as
from .plan import Plan
from .stages import backward_kernels, launch_backward
from .tile import is_aligned, matrix
from .written_stage import WrittenStage

MOST_LAYOUTS = 8  # of calls that are alike but for strides


class PreparedBackward:
    """Backward passes whose tensors differ by strides and addresses only."""

    def __init__(self, plan: Plan, score: ScoreOptions, may_hide_all_keys: bool) -> None:
        self.plan, self.score, self.may_hide_all_keys = plan, score.without_tensors(), may_hide_all_keys
        self.layouts: dict[tuple, PreparedLayout] = {}

    def __call__(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor,
        offset: Tensor, reached_keys: Tensor, reaching_queries: Tensor, own: OwnOptions,
    ) -> tuple[Tensor, ...] | None:  # fmt: skip
        """(grad_query, grad_key, grad_value); None where the launches are no direct ones, see launch.py."""
        given = query, key, value, value_mean, grad_output
        strides = query.stride(), key.stride(), value.stride(), value_mean.stride(), grad_output.stride()
        layout = self.layouts.get(strides)
        if layout is None and (layout := self.prepared(strides, given)) is None:
            return None
        return layout(given, (maximum, offset, reached_keys, reaching_queries), own)

    def prepared(self, strides: tuple, given: tuple[Tensor, ...]) -> "PreparedLayout | None":
        """None where the kernels would read copies, or after MOST_LAYOUTS others."""
        if len(self.layouts) >= MOST_LAYOUTS or not all(is_aligned(matrix(tensor)) for tensor in given):
            return None
        self.layouts[strides] = layout = PreparedLayout(self.plan, self.score, given, self.may_hide_all_keys)
        return layout


class PreparedLayout:
    """Backward passes whose tensors differ by addresses only."""

    def __init__(self, plan: Plan, score: ScoreOptions, given: tuple[Tensor, ...], may_hide_all_keys: bool) -> None:
        *inputs, _, grad_output = given
        made = [empty_stored_as(tensor, tensor.shape[-1]) for tensor in inputs]
        made += [torch.empty_like(grad_output)] * may_hide_all_keys
        self.made = [(tensor.shape, tensor.stride()) for tensor in made]
        self.kind = {"dtype": grad_output.dtype, "device": grad_output.device}

        def arguments_of(*tensors: Tensor) -> tuple:
            given, state, gradients, selected = tensors[:5], tensors[5:9], tensors[9:12], tensors[12:]
            selected = matrix(*selected) if selected else None
            return *map(matrix, given), selected, *map(matrix, gradients), *state, None

        self.stage = WrittenStage(
            plan, score, backward_kernels(plan), plan.backward_scratch, arguments_of, launch_backward
        )

    def __call__(
        self, given: tuple[Tensor, ...], state: tuple[Tensor, ...], own: OwnOptions
    ) -> tuple[Tensor, ...] | None:
        if not self.stage.is_open(given[0]):
            return None
        kind = self.kind
        made = [torch.empty_strided(shape, strides, **kind) for shape, strides in self.made]
        return tuple(made[:3]) if self.stage.run((*given, *state, *made), own) else None
