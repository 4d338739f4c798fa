"""What the attention layers of a model need so that each process has a part of every sequence."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..core.checks import check_flag
from .attention import Method, check_heads_at_a_time, check_method, context_parallel_attention
from .layout import Layout, check_layout, chunks
from .ranks import Ranks
from .shards import positions


@dataclass(frozen=True)
class ContextParallel:
    """A group whose ranks each have a part of every sequence, and how attention brings the parts together.

    Attention layers take it as ``context_parallel``. They take a group as well, which stands for this with the
    defaults. Copies of a layer share it.

    Args:
        group: a ``ProcessGroup`` or a one-dimensional ``DeviceMesh``.
        method, layout, heads_at_a_time, check_ranks: as for :func:`context_parallel_attention`.

    Raises:
        TypeError, ValueError: another group, and options of the wrong type or out of range.
    """

    group: ProcessGroup | DeviceMesh
    method: Method = "gather"
    layout: Layout = "balanced"
    heads_at_a_time: int | None = None
    check_ranks: bool = True

    def __post_init__(self) -> None:
        Ranks.of(self.group)
        check_method(self.method)
        check_layout(self.layout)
        check_heads_at_a_time(self.heads_at_a_time, self.method)
        check_flag("check_ranks", self.check_ranks)

    @classmethod
    def of(cls, given: object) -> "ContextParallel":
        """What was given, or the defaults for a group that was given."""
        return given if isinstance(given, cls) else cls(cast(ProcessGroup, given))

    def __deepcopy__(self, memo: dict) -> "ContextParallel":
        return self

    @property
    def size(self) -> int:
        """The number of ranks."""
        return Ranks.of(self.group).size

    def positions(self, local_length: int, device: torch.device) -> Tensor:
        """The positions of this rank's tokens in the whole sequence, (local length,) int64."""
        if local_length % len(chunks(self.size, self.layout)[0]):
            return torch.arange(local_length, device=device)  # `attention` refuses the length, on all ranks at once
        return positions(local_length * self.size, self.group, self.layout, device=device)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """:func:`context_parallel_attention`, in which each rank keeps its share of the gradient of a parameter."""
        return context_parallel_attention(
            query, key, value, group=self.group, method=self.method, layout=self.layout,
            heads_at_a_time=self.heads_at_a_time, check_ranks=self.check_ranks, sum_parameter_gradients=False,
            **options,
        )  # fmt: skip
