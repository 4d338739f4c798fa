"""A stage whose launches are written down by the first call that finds all of its kernels compiled."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .call_launches import CallLaunches, OpenedKernels
from .launch import is_watched
from .notes import Notes, WrittenLaunches
from .plan import NO_MASKS, Plan, launch_bounds
from .scratch import ALIGNMENT, Scratch
from .visibility import KernelVisibility, bounds_kernel


class WrittenStage:
    """The launches of a stage, for calls whose tensors differ by their addresses only.

    `arguments_of` makes the arguments of a call of its tensors. `launch` takes an OpenedKernels, these arguments and
    the scratch. Intervals are beside the tensors, since every kernel takes them; their bounds are made as well.
    """

    def __init__(
        self, plan: Plan, kernels: tuple, scratch: Scratch, arguments_of: Callable[..., tuple],
        launch: Callable[[OpenedKernels, Sequence, Sequence], None],
    ) -> None:  # fmt: skip
        self.plan, self.kernels, self.arguments_of, self.launch = plan, kernels, arguments_of, launch
        self.watched, self.own_scratch, self.scratch = kernels, scratch, scratch
        self.has_bounds = plan.outline.intervals and not plan.outline.decodes
        if self.has_bounds:
            self.watched = *kernels, bounds_kernel
            self.scratch = Scratch(*scratch.arrays, (torch.int32, plan.outline.batch * plan.query_tiles * 4))
        self.written: WrittenLaunches | None = None

    def is_open(self, tensor: Tensor) -> bool:
        """Whether notes may be launched from: nobody watches, and launches go to the tensor's device."""
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            return False
        return not is_watched(self.watched)

    def run(self, tensors: tuple[Tensor, ...], intervals: Tensor | None) -> bool:
        """Launch all; False, and nothing is launched, where an address or a kernel is none for direct launches."""
        written = self.written or self.write_down(tensors, intervals)
        if written is None:
            return False
        memory = self.scratch.allocate(tensors[0].device)
        return written.run(tensors if intervals is None else (*tensors, intervals), memory)

    def write_down(self, tensors: tuple[Tensor, ...], intervals: Tensor | None) -> WrittenLaunches | None:
        """None unless addresses are aligned, and all kernels compiled. Other calls find the launches from then on."""
        if any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
            return None
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
        notes.places |= {id(bounds): notes.scratch[-1]}
        visibility = notes.placed(visibility)
        if self.has_bounds:
            launch_bounds(notes, plan, *visibility[:2])
        opened = OpenedKernels(notes, plan, plan.options, visibility)
        self.launch(opened, notes.placed(arguments), notes.scratch[: len(self.own_scratch.arrays)])
        self.written = WrittenLaunches(notes, compiled | bounding, plan, self.scratch, device)
        return self.written
