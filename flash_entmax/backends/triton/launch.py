"""How kernels are launched: the first time through Triton's JIT, from then on directly.

For every launch the JIT looks at every argument, to find out which of its compiled kernels it is for. That takes
several times as long as the launch. A `Launcher` looks at the tensors of several launches once, and keeps what the JIT
compiled for tensors like these. A direct launch takes their addresses.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .config import HAS_PTX, Config
from .schedule import LaunchSettings
from .scratch import ALIGNMENT, Scratch
from .tile import Matrix

INTEGER_LIMIT = 2**31  # Triton compiles other code for integers from this one on
OLDEST, NEWEST = (3, 6), (3, 9)  # versions of Triton whose CompiledKernel.run takes what `Direct` passes
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
CAN_BE_DIRECT = OLDEST <= VERSION <= NEWEST and torch.version.cuda is not None and not knobs.runtime.interpret

SettingsRule = Callable[[Config], LaunchSettings]


def launch(kernel, programs: int, rule: SettingsRule, config: Config, *arguments) -> CompiledKernel | None:
    """Run so many programs of a kernel, whose last argument is its Config, through Triton's JIT."""
    return kernel[(programs,)](*arguments, C=config, **rule(config).options, enable_fp_fusion=True)


class Launcher:
    """Launches the kernels of one Config.

    `compiled` holds kernels that are launched together, by what Triton compiles for: the device, and the dtypes of the
    tensors. Everything else that it compiles for is the same in all direct launches, see `Signature.is_usual`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.compiled: dict[tuple, dict[int, CompiledKernel]] = {}

    def open(
        self, kernels: tuple, arguments: tuple, scratch: Scratch | None, device: torch.device, largest: int
    ) -> tuple["Direct | ThroughTriton", tuple, list]:
        """(what launches these kernels on the current device, its arguments, its scratch).

        Arguments are tensors, None, numbers, and tuples of them; scratch is a list of tensors. A direct launch gets
        addresses in place of tensors. `largest` bounds all other integers that the kernels will be launched with.
        """
        memory = None if scratch is None else scratch.allocate(device)
        recorded = None
        if CAN_BE_DIRECT and not is_watched(kernels):
            signature = Signature(arguments, device)
            if (key := signature.key(kernels, largest)) is not None:
                compiled = self.compiled.get(key)
                if compiled is not None:
                    addresses = [] if scratch is None else scratch.addresses(memory)
                    direct = Direct(compiled, self.config, current_stream(device.index), (arguments, memory))
                    return direct, signature.arguments, addresses
                recorded = Recording(self.compiled, key, len(kernels))
        tensors = [] if scratch is None else scratch.tensors(memory)
        return ThroughTriton(self.config, recorded), arguments, tensors

    def compiled_for(
        self, kernels: tuple, arguments: tuple, device: torch.device, largest: int
    ) -> dict[int, CompiledKernel] | None:
        """What `open` would launch directly; None if nothing."""
        return self.compiled.get(Signature(arguments, device).key(kernels, largest))


launcher_of = lru_cache(maxsize=1024)(Launcher)


class Signature:
    """Arguments with addresses in place of tensors, and all in them that Triton compiles for or refuses."""

    __slots__ = ("arguments", "bits", "device", "dtypes")

    def __init__(self, arguments: tuple, device: torch.device) -> None:
        self.device = device.index if device.type == "cuda" else -1  # as Tensor.get_device has it
        self.bits = 0  # of all addresses and integers, or-ed together; 1 for a tensor on another device
        self.dtypes = []  # of all tensors; None for None
        self.arguments = self.addressed(arguments)

    def addressed(self, arguments: tuple) -> tuple:
        result, bits, dtypes, device = [], 0, self.dtypes, self.device
        for argument in arguments:
            if type(argument) is Matrix:
                data, *strides = argument
                address = data.data_ptr()
                dtypes.append(data.dtype)
                bits |= address % ALIGNMENT | strides[0] | strides[1] | strides[2] | (data.get_device() != device)
                argument = address, *strides
            elif isinstance(argument, Tensor):
                dtypes.append(argument.dtype)
                address = argument.data_ptr()
                bits |= address % ALIGNMENT | (argument.get_device() != device)
                argument = address
            elif argument is None:
                dtypes.append(None)
            elif isinstance(argument, tuple):
                argument = self.addressed(argument)
            elif isinstance(argument, int):
                bits |= argument
            result.append(argument)
        self.bits |= bits
        return tuple(result)

    @property
    def is_usual(self) -> bool:
        """16 divides all addresses and integers, these fit 32 bits, and all tensors are on the device."""
        return self.bits % ALIGNMENT == 0 and self.bits < INTEGER_LIMIT

    def key(self, kernels: tuple, largest: int) -> tuple | None:
        """All that tells what Triton compiles of these kernels; None where a launch may need other code."""
        if not self.is_usual or largest >= INTEGER_LIMIT:
            return None
        return *map(id, kernels), self.device, *self.dtypes


class Direct:
    """Launches compiled kernels, in the current stream. Holds the tensors whose addresses they get."""

    __slots__ = ("compiled", "config", "held", "stream")

    def __init__(self, compiled: dict[int, CompiledKernel], config: Config, stream: int, held: tuple) -> None:
        self.compiled, self.config, self.stream, self.held = compiled, config, stream, held

    def __call__(self, kernel, programs: int, rule: SettingsRule, *arguments) -> None:
        compiled = self.compiled[id(kernel)]  # the hash of a kernel itself takes a lock
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, self.stream, function, metadata, None, None, None, *arguments, self.config)


class Recording:
    """What was compiled for kernels that are launched together. It is published once it is complete."""

    def __init__(self, published: dict[tuple, dict], key: tuple, kernels: int) -> None:
        self.published, self.key, self.kernels = published, key, kernels
        self.compiled: dict[int, CompiledKernel] = {}

    def add(self, kernel, compiled: CompiledKernel | None) -> None:
        if compiled is None:  # somebody who was told of it has compiled it otherwise
            return
        self.compiled[id(kernel)] = compiled
        if len(self.compiled) == self.kernels:
            self.published[self.key] = self.compiled


class ThroughTriton:
    """Launches through Triton's JIT, and records what it compiles."""

    def __init__(self, config: Config, recording: Recording | None) -> None:
        self.config, self.recording = config, recording

    def __call__(self, kernel, programs: int, rule: SettingsRule, *arguments) -> None:
        compiled = launch(kernel, programs, rule, self.config, *arguments)
        if self.recording is not None:
            self.recording.add(kernel, compiled)


def is_watched(kernels: tuple) -> bool:
    """Somebody is told of each launch, or wants kernels compiled in another way: a profiler, a sanitizer."""
    runtime = knobs.runtime
    for kernel in kernels:
        if getattr(kernel, "pre_run_hooks", ()):
            return True
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook, runtime.add_stages_inspection_hook):
        if getattr(hook, "calls", hook):  # a chain of hooks, or the only one
            return True
    return bool(runtime.debug or knobs.compilation.instrumentation_mode)


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can start before the one before it has ended: programmatic dependent launch, from Hopper on."""
    return HAS_PTX and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def current_stream(device: int) -> int:
    return driver.active.get_current_stream(device)
