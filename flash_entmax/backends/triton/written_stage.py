"""A stage whose launches are written down by the first call that finds all of its kernels compiled."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .call_launches import CallLaunches, OpenedKernels
from .launch import is_watched
from .notes import Notes, WrittenLaunches
from .plan import NO_MASKS, Plan, launch_bounds
from .scratch import Scratch
from .visibility import KernelVisibility, bounds_kernel


class WrittenStage:
    """The launches of a stage, for calls whose tensors differ by their addresses only.

    `arguments_of` takes the tensors of a call to what `launch` takes behind an OpenedKernels: arguments, which may be
    matrices, and before the scratch. Intervals are no argument of a stage: every kernel gets them.
    """

    def __init__(
        self, plan: Plan, kernels: tuple, scratch: Scratch, arguments_of: Callable[..., tuple],
        launch: Callable[[OpenedKernels, Sequence, Sequence], None],
    ) -> None:  # fmt: skip
        self.plan, self.kernels, self.arguments_of, self.launch = plan, kernels, arguments_of, launch
        self.has_bounds = plan.outline.intervals and not plan.outline.decodes
        bounds = ((torch.int32, plan.outline.batch * plan.query_tiles * 4),) if self.has_bounds else ()
        self.arrays, self.scratch = len(scratch.arrays), Scratch(*scratch.arrays, *bounds)
        self.written: WrittenLaunches | None = None

    def is_open(self, tensor: Tensor) -> bool:
        """Whether notes may be launched from: nobody watches, and launches go to the tensor's device."""
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            return False
        return not is_watched(self.kernels)

    def run(self, tensors: tuple[Tensor, ...], intervals: Tensor | None) -> bool:
        """Launch all; False, and nothing is launched, where an address or a kernel is none for direct launches."""
        written = self.written or self.write_down(tensors, intervals)
        if written is None:
            return False
        memory = self.scratch.allocate(tensors[0].device)
        return written.run(tensors if intervals is None else (*tensors, intervals), memory)

    def write_down(self, tensors: tuple[Tensor, ...], intervals: Tensor | None) -> WrittenLaunches | None:
        """None unless all kernels of these calls are compiled. Their launches are known from then on."""
        plan, device, visibility, bounding = self.plan, tensors[0].device, NO_MASKS, {}
        own = tuple(tensor.detach() for tensor in tensors)  # a call may take one tensor for two of its inputs
        arguments, bounds = self.arguments_of(*own), own[0].new_empty(0, dtype=torch.int32)
        if self.has_bounds:
            visibility = KernelVisibility(intervals, bounds)
            bounding = plan.launcher.compiled_for((bounds_kernel,), (intervals, bounds), device, plan.largest)
        elif intervals is not None:
            visibility = KernelVisibility(intervals)
        with_options = CallLaunches(plan, plan.options, visibility).with_options(arguments)
        compiled = plan.launcher.compiled_for(self.kernels, with_options, device, plan.largest)
        if compiled is None or bounding is None:
            return None
        notes = Notes(own if intervals is None else (*own, intervals), self.scratch)
        scratch = notes.scratch[: self.arrays]
        if self.has_bounds:
            visibility = notes.placed(intervals), notes.scratch[-1], *visibility[2:]
            launch_bounds(notes, plan, *visibility[:2])
        opened = OpenedKernels(notes, plan, plan.options, notes.placed(visibility))
        self.launch(opened, notes.placed(arguments), scratch)
        self.written = WrittenLaunches(notes, compiled | bounding, plan, self.scratch, device)
        return self.written
