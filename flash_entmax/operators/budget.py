"""The operator that finds the threshold of rows with a budget. It has no derivative: a differentiable step follows.

flash_entmax::budget_offset  gaps (rows, n), budgets (rows,)  -> offsets (rows,)
"""

import torch
from torch import Tensor

from ..core import row_thresholds
from ..core.alphas import refuse_where
from ..core.modes import as_given
from ..core.registration import batch_into, fake, operator


@operator("Tensor gap, Tensor budgets", results=1)
def budget_offset(gap: Tensor, budgets: Tensor) -> Tensor:
    n = gap.shape[1]
    refuse_where((budgets < 0) | (budgets > n), budgets, f"budget must be from 0 to {n}, the entries of a row")
    with as_given(gap):
        return row_thresholds.budget_offset(gap, budgets)


@fake("budget_offset")
def _(gap: Tensor, budgets: Tensor) -> Tensor:
    return torch.empty_like(budgets)


batch_into(budget_offset, (0, 0), (0,))
