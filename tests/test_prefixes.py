"""The keys up to the end of each chunk of a sequence, and their gradients."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flash_entmax.distributed.prefixes import prefixes


def test_prefixes_of_any_length_are_in_one_graph():
    """Their gradients are those of slices, and a compiler that keeps lengths open keeps one graph."""

    def weighted(tensor: torch.Tensor, take) -> torch.Tensor:
        length = tensor.shape[2]
        parts = take(tensor, (length // 4, length // 2, length // 2, length))
        return sum(((number + 1) * part.square()).sum() for number, part in enumerate(parts))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda tensor: weighted(tensor, prefixes), fullgraph=True, dynamic=True, backend=counter)
    for length in (16, 32, 48):
        tensor = torch.randn(1, 2, length, 3, dtype=torch.float64, requires_grad=True)
        plain = weighted(tensor, lambda tensor, lengths: [tensor[:, :, :n] for n in lengths])
        (expected,) = torch.autograd.grad(plain, tensor)
        for run in (compiled, lambda tensor: weighted(tensor, prefixes)):
            (gradient,) = torch.autograd.grad(run(tensor), tensor)
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
