"""Forward passes by tiles like one before: their launches are written down once. Later ones look up addresses only."""

from math import prod

import torch
from torch import Tensor

from ...core.call import OwnOptions, ScoreOptions
from ...core.tensors import empty_stored_as
from .plan import Plan
from .scratch import Scratch
from .stages import forward_arguments, forward_kernels, launch_forward
from .written_stage import WrittenStage


def stage_of(plan: Plan, score: ScoreOptions) -> WrittenStage:
    """The stage whose tensors are query, key, value and results, without those that only a backward needs."""

    def arguments_of(query: Tensor, key: Tensor, value: Tensor, output: Tensor, *kept: Tensor) -> tuple:
        *kept, words = kept
        results = output, *(kept or (None,) * 4), words
        return forward_arguments(plan, None, (query, key, value), results)

    return WrittenStage(plan, score, forward_kernels(plan, None), plan.forward_scratch, arguments_of, launch_forward)


class PreparedOutput:
    """Forward passes without gradients, whose tensors differ by their addresses only."""

    def __init__(self, plan: Plan, score: ScoreOptions, query: Tensor, value: Tensor) -> None:
        output, device = empty_stored_as(query, value.shape[-1]), query.device
        self.stage = stage_of(plan, score)
        self.output, self.kind = layout_of(output), {"dtype": query.dtype, "device": device}
        self.words, self.integers = plan.chunk_words, {"dtype": torch.int32, "device": device}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions) -> Tensor | None:
        """The output; None where the launches are no direct ones, see launch.py."""
        if not self.stage.is_open(query):
            return None
        output, words = torch.empty_strided(*self.output, **self.kind), torch.zeros(self.words, **self.integers)
        return output if self.stage.run((query, key, value, output, words), own) else None


class PreparedForward:
    """Forward passes that keep what the backward needs, whose tensors differ by their addresses only."""

    def __init__(self, plan: Plan, score: ScoreOptions, query: Tensor, value: Tensor) -> None:
        output, device = empty_stored_as(query, value.shape[-1]), query.device
        self.stage, self.kind = stage_of(plan, score), {"dtype": query.dtype, "device": device}
        self.floats, self.integers = ({"dtype": dtype, "device": device} for dtype in (torch.float32, torch.int32))
        self.output, self.rows = layout_of(output), output.shape[:3]
        self.value_mean = layout_of(torch.empty_like(output))
        reach, size = Scratch(*((torch.int32, prod(shape)) for shape in plan.reach_shapes)), torch.int32.itemsize
        self.reach = reach.size // size
        self.reached_keys, self.words = (
            (shape, (prod(shape[1:]), shape[2], 1), start // size)
            for shape, start in zip(plan.reach_shapes, reach.starts, strict=True)
        )
        self.own_words = 0 if plan.are_words_kept else plan.chunk_words

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions) -> tuple[Tensor, ...] | None:
        """What `attention_forward` returns; None where the launches are no direct ones, see launch.py.

        What must be 0 before is one tensor, which takes one kernel of PyTorch.
        """
        if not self.stage.is_open(query):
            return None
        output = torch.empty_strided(*self.output, **self.kind)
        value_mean = torch.empty_strided(*self.value_mean, **self.kind)
        maximum, offset = torch.empty(self.rows, **self.floats), torch.empty(self.rows, **self.floats)
        reach = torch.zeros(self.reach, **self.integers)
        reached_keys, words = reach.as_strided(*self.reached_keys), reach.as_strided(*self.words)
        written = torch.zeros(self.own_words, **self.integers) if self.own_words else words
        tensors = query, key, value, output, value_mean, maximum, offset, reached_keys, written
        if not self.stage.run(tensors, own):
            return None
        return output, value_mean, maximum, offset, reached_keys, words


def layout_of(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()
