"""Calls of few queries like one before: their launches are written down once. Later calls look up addresses only."""

import torch
from torch import Tensor

from ...core.call import OwnOptions, ScoreOptions
from ...core.tensors import empty_stored_as
from .decoding import DECODE, NO_PAGES, launch_decode
from .plan import Plan
from .tile import matrix
from .written_stage import WrittenStage


class PreparedDecode:
    """Calls whose tensors differ by their addresses only."""

    def __init__(self, plan: Plan, score: ScoreOptions, query: Tensor, value: Tensor) -> None:
        output, device = empty_stored_as(query, value.shape[-1]), query.device
        self.output, self.kind = (output.shape, output.stride()), {"dtype": query.dtype, "device": device}

        def arguments_of(*tensors: Tensor) -> tuple:
            return *map(matrix, tensors), None

        def launch(opened, arguments, scratch) -> None:
            launch_decode(opened, arguments, scratch, NO_PAGES, device)

        self.stage = WrittenStage(plan, score, DECODE, plan.decode_scratch, arguments_of, launch)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions) -> Tensor | None:
        """The output; None where the launches are no direct ones, see launch.py."""
        if not self.stage.is_open(query):
            return None
        output = torch.empty_strided(*self.output, **self.kind)
        return output if self.stage.run((query, key, value, output), own) else None
