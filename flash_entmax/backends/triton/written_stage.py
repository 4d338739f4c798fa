"""A stage whose launches are written down by the first call that finds all of its kernels compiled."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...core.call import OwnOptions, ScoreOptions
from .call_launches import CallLaunches, OpenedKernels
from .launch import is_watched
from .notes import Notes, WrittenLaunches
from .plan import NO_MASKS, Plan, kernel_options, launch_bounds
from .queries import KernelScoreOptions
from .scratch import ALIGNMENT, Scratch
from .visibility import KernelVisibility, bounds_kernel


class WrittenStage:
    """The launches of a stage, for calls whose tensors differ by their addresses only.

    `arguments_of` makes the arguments of a call of its tensors. `launch` takes an OpenedKernels, these arguments and
    the scratch. Own options are beside the tensors, since every kernel takes them; the bounds of intervals are made as
    well.
    """

    def __init__(
        self, plan: Plan, score: ScoreOptions, kernels: tuple, scratch: Scratch, arguments_of: Callable[..., tuple],
        launch: Callable[[OpenedKernels, Sequence, Sequence], None],
    ) -> None:  # fmt: skip
        self.plan, self.score, self.kernels = plan, score.without_tensors(), kernels
        self.arguments_of, self.launch = arguments_of, launch
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

    def run(self, tensors: tuple[Tensor, ...], own: OwnOptions) -> bool:
        """Launch all; False, and nothing is launched, where an address or a kernel is none for direct launches."""
        options = self.plan.options or kernel_options(self.score.with_tensors(own))
        beside = own_tensors(options, own.intervals)
        written = self.written or self.write_down(tensors, options, own.intervals)
        if written is None:
            return False
        memory = self.scratch.allocate(tensors[0].device)
        return written.run((*tensors, *beside), memory)

    def write_down(
        self, tensors: tuple[Tensor, ...], options: KernelScoreOptions, intervals: Tensor | None
    ) -> WrittenLaunches | None:
        """None unless addresses are aligned, and all kernels compiled. Other calls find the launches from then on."""
        beside = own_tensors(options, intervals)
        if any(tensor.data_ptr() % ALIGNMENT for tensor in (*tensors, *beside)):
            return None
        plan, device, visibility, bounding = self.plan, tensors[0].device, NO_MASKS, {}
        own = tuple(tensor.detach() for tensor in tensors)  # a call may take one tensor for two of its inputs
        arguments, bounds = self.arguments_of(*own), own[0].new_empty(0, dtype=torch.int32)
        if self.has_bounds:
            visibility = KernelVisibility(intervals, bounds)
            bounding = plan.launcher.compiled_for((bounds_kernel,), (intervals, bounds), device, plan.largest)
        elif intervals is not None:
            visibility = KernelVisibility(intervals)
        with_options = CallLaunches(plan, options, visibility).with_options(arguments)
        compiled = plan.launcher.compiled_for(self.kernels, with_options, device, plan.largest)
        if compiled is None or bounding is None:
            return None
        notes = Notes((*own, *beside), self.scratch)
        if self.has_bounds:
            notes.places |= {id(bounds): notes.scratch[-1]}
        visibility, options = notes.placed(visibility), notes.placed(options)
        if self.has_bounds:
            launch_bounds(notes, plan, *visibility[:2])
        opened = OpenedKernels(notes, plan, options, visibility)
        self.launch(opened, notes.placed(arguments), notes.scratch[: len(self.own_scratch.arrays)])
        self.written = WrittenLaunches(notes, compiled | bounding, plan, self.scratch, device)
        return self.written


def own_tensors(options: KernelScoreOptions, intervals: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors of a call that every kernel takes."""
    return tuple(tensor for tensor in (*options, intervals) if isinstance(tensor, Tensor))
