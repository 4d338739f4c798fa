"""Compile every kernel for a GPU that is not there: python compile_kernels.py CAPABILITY DTYPE HEAD_SIZE ALPHA.

Prints one line for each kernel: its name, and its shared memory in bytes. The interpreter runs Python; only this shows
that Triton's compiler takes the kernels too.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class AbsentGpu:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main(capability: int, dtype: torch.dtype, head_size: int, alpha: float) -> None:
    driver.set_active(AbsentGpu(capability))
    from flash_entmax.kernels import attention
    from flash_entmax.problem import Problem

    def compile_only(chunk, kernel, launch, *arguments, **constants):
        compiled = kernel.warmup(*arguments, grid=(1,), **constants, **launch.options, enable_fp_fusion=True)
        print(kernel.fn.__name__, compiled.metadata.shared)

    attention.Chunk.run = compile_only
    query, key = torch.empty(1, 4, 256, head_size, dtype=dtype), torch.empty(1, 2, 256, head_size, dtype=dtype)
    problem = Problem.of(query, key, key, alpha, True, 1.0)
    output, *saved = attention.attention(problem, query, key, key)
    attention.attention_backward(problem, output, query, key, key, *saved)
    attention.support(problem, query, key, *saved[1:])


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
