"""Keys in pages: gathered first."""

from torch import Tensor

from ...core.call import Problem
from ...core.pages import Pages, attend_gathered
from .attention import attention_forward


def attention_paged(problem: Problem, pages: Pages, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """The output; see backends.Backend."""
    return attend_gathered(attention_forward, problem, pages, query, key_cache, value_cache)
