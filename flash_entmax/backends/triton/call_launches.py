"""What all launches of one call share: its plan, its options, and the addresses of its tensors."""

from typing import NamedTuple

import torch

from ...core.call import Problem
from ...core.pages import Pages
from .config import Outline
from .launch import Direct, SettingsRule, ThroughTriton
from .plan import NO_MASKS, Chunk, Plan, kernel_options, kernel_visibility, plan_of
from .queries import KernelScoreOptions
from .scratch import Scratch
from .visibility import KernelVisibility


class OpenedKernels(NamedTuple):
    """Kernels that run over the tiles of a plan, and what all of them take: addresses, where launches are direct."""

    launch: Direct | ThroughTriton
    plan: Plan
    options: KernelScoreOptions
    visibility: KernelVisibility

    def run(self, kernel, chunk: Chunk, rule: SettingsRule, *arguments, numbers: tuple = ()) -> None:
        """Launch a kernel with one program for each tile of queries of the chunk."""
        first_unit, units, first_tile, tiles, capacity = chunk
        self.launch(
            kernel, units * tiles, rule, *arguments, self.options, self.visibility, *self.plan.sizes, first_unit, units,
            first_tile, capacity, *numbers,
        )  # fmt: skip

    def run_over_tiles(
        self, kernel, first_unit: int, units: int, tiles: int, rule: SettingsRule, *arguments, numbers: tuple
    ) -> None:
        """Launch a kernel with `tiles` programs for each unit."""
        self.launch(
            kernel, units * tiles, rule, *arguments, self.options, self.visibility, *self.plan.sizes, first_unit, units,
            *numbers,
        )  # fmt: skip


class CallLaunches(NamedTuple):
    """What all launches of one call share. The problem is not empty."""

    plan: Plan
    options: KernelScoreOptions
    visibility: KernelVisibility

    @classmethod
    def of(
        cls, problem: Problem, dtype: torch.dtype, needs_backward: bool = True, needs_parameters: bool = False,
        decodes: bool = False, overlaps: bool = False, pages: Pages | None = None,
    ) -> "CallLaunches":  # fmt: skip
        plan = plan_of(Outline.of(problem, dtype, needs_backward, needs_parameters, decodes, overlaps, pages))
        options = plan.options or kernel_options(problem.score)
        visibility = kernel_visibility(problem.visibility, plan)
        return cls(plan, options, visibility)

    def open(
        self, kernels: tuple, arguments: tuple, scratch: Scratch | None, device: torch.device
    ) -> tuple[OpenedKernels, list, list]:
        """(opened, arguments, scratch) of some kernels, both as its launches take them."""
        plan, options, visibility = self
        launch, arguments, arrays = plan.launcher.open(
            kernels, self.with_options(arguments), scratch, device, plan.largest
        )
        if self.have_tensors:
            *arguments, options, visibility = arguments
        return OpenedKernels(launch, plan, options, visibility), arguments, arrays

    @property
    def have_tensors(self) -> bool:
        """Some of the options, or of the visibility, are tensors."""
        return self.options is not self.plan.options or self.visibility is not NO_MASKS

    def with_options(self, arguments: tuple) -> tuple:
        """All tensors of the launches."""
        return (*arguments, self.options, self.visibility) if self.have_tensors else arguments

    def over_tiles_of_queries(
        self, kernel, rule: SettingsRule, inputs: tuple, results: tuple, device: torch.device
    ) -> None:
        """Launch one kernel over all tiles of queries, which takes lists of tiles between its inputs and results."""
        plan = self.plan
        opened, arguments, (lists,) = self.open((kernel,), (*inputs, *results), plan.list_scratch, device)
        inputs, results = arguments[: len(inputs)], arguments[len(inputs) :]
        for chunk in plan.query_chunks:
            opened.run(kernel, chunk, rule, *inputs, lists, *results)
