"""Nothing is timed before it is right. Output and gradients of the very call to be timed are compared with float64.

The comparison covers the first key head and the query heads that share it. Up to EVERY_ROW tokens it covers all rows
of the output. Beyond, it covers the last LAST_ROWS rows, and the gradient of the output is zero in all others. These
last rows see every key and decide all gradients alone, so that the reference need not compute any other row. The
gradients of query, key and value are compared in full.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_entmax import entmax_attention
from flash_entmax.testing import relative_error

from .cases import BenchCase
from .measure import Attend, step

EVERY_ROW = 8192
LAST_ROWS = 256
SLICE_SCORES = 2**24
QUANTITIES = ("output", "gradient of query", "gradient of key", "gradient of value")
OUR_OUTPUT_BUDGET = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
OUR_GRADIENT_BUDGET = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}
# In 16 bits softmax rounds its delta, with the same sign for all keys. Its gradient of query is off by up to 3e-2.
PEER_OUTPUT_BUDGET, PEER_GRADIENT_BUDGET = 5e-2, 8e-2


class GateVerdict(NamedTuple):
    """max |difference| / max |exact| of every quantity; and in words, what is wrong, or nothing."""

    errors: dict[str, float]
    wrong: str


class Truth:
    """The float64 results of a case, computed when they are first needed; and the gradient of the output for them."""

    def __init__(self, case: BenchCase, inputs: tuple[Tensor, Tensor, Tensor], grad_output: Tensor) -> None:
        self.group, self.inputs = case.group, inputs
        self.first_row = 0 if case.length <= EVERY_ROW else case.length - LAST_ROWS
        self.grad_output = grad_output.clone()
        self.grad_output[:, :, : self.first_row] = 0
        self.cache: dict[float, tuple[Tensor, ...]] = {}

    def results(self, alpha: float) -> tuple[Tensor, ...]:
        """Output and gradients in float64, by the reference; alpha 1 is softmax."""
        if alpha not in self.cache:
            query, key, value = (tensor.detach().double() for tensor in self.first_key_head(self.inputs))
            grad_output = self.first_key_head([self.grad_output])[0].double()
            self.cache[alpha] = exact(query, key, value, grad_output, alpha, self.first_row)
        return self.cache[alpha]

    def first_key_head(self, tensors) -> list[Tensor]:
        """The first key head of keys and values, and the query heads that share it."""
        heads = self.inputs[0].shape[1]
        return [tensor[:, : self.group if tensor.shape[1] == heads else 1] for tensor in tensors]

    def judge(self, attend: Attend, alpha: float, is_ours: bool) -> GateVerdict:
        results = self.first_key_head(step(attend, self.inputs, self.grad_output))
        results[0], truth = results[0][:, :, self.first_row :], self.results(alpha)
        errors, wrong = {}, ""
        for name, result, expected in zip(QUANTITIES, results, truth, strict=True):
            budget = self.budget(name, is_ours)
            errors[name] = relative_error(result, expected)
            if not errors[name] <= budget and not wrong:
                wrong = f"relative error {errors[name]:.2g} of the {name}, over {budget:g}"
        return GateVerdict(errors, wrong)

    def budget(self, name: str, is_ours: bool) -> float:
        if not is_ours:
            return PEER_OUTPUT_BUDGET if name == "output" else PEER_GRADIENT_BUDGET
        budgets = OUR_OUTPUT_BUDGET if name == "output" else OUR_GRADIENT_BUDGET
        return budgets[self.inputs[0].dtype]


def exact(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, alpha: float, first_row: int
) -> tuple[Tensor, ...]:
    """Output of the rows from first_row on, and all gradients, causal. A slice of rows is computed at a time."""
    length = query.shape[2]
    outputs, gradients = [], [torch.zeros_like(tensor) for tensor in (query, key, value)]
    rows = max(1, SLICE_SCORES // (length * query.shape[0] * query.shape[1]))
    for start in range(first_row, length, rows):
        stop = min(length, start + rows)
        parts = slice(start, stop), slice(0, stop), slice(0, stop)
        tensors = [tensor[:, :, part].requires_grad_() for tensor, part in zip((query, key, value), parts, strict=True)]
        output = entmax_attention(*tensors, alpha=alpha, is_causal=True, impl="reference")
        found = torch.autograd.grad(output, tensors, grad_output[:, :, start:stop])
        for gradient, part, piece in zip(gradients, parts, found, strict=True):
            gradient[:, :, part] += piece
        outputs.append(output.detach())
    return torch.cat(outputs, dim=2), *gradients
