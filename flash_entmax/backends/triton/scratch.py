"""One allocation for all scratch of a stage: its arrays lie side by side."""

import torch
from torch import Tensor

from ...core.tensors import ceil_div

ALIGNMENT = 16  # bytes; Triton compiles other code for addresses that it does not divide


class Scratch:
    """The layout of some arrays, of so many numbers of a dtype each. Every array starts at an aligned address."""

    def __init__(self, *arrays: tuple[torch.dtype, int]) -> None:
        self.arrays, self.starts, self.size = arrays, [], 0
        for dtype, count in arrays:
            self.starts.append(self.size)
            self.size += ceil_div(count * dtype.itemsize, ALIGNMENT) * ALIGNMENT

    def allocate(self, device: torch.device) -> Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device=device)

    def addresses(self, memory: Tensor) -> list[int]:
        first = memory.data_ptr()
        return [first + start for start in self.starts]

    def tensors(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + count * dtype.itemsize].view(dtype)
            for start, (dtype, count) in zip(self.starts, self.arrays, strict=True)
        ]
