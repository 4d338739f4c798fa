"""What computes a call: the table of backends, what each must offer, and the one place that chooses and says why.

A backend is a module in this folder that offers the functions of `Backend`. Its name in `BackendName` is the table.
`reference` is no backend, but the specification, in autograd; `softmax` is the limit alpha = 1, by PyTorch.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Literal, Protocol, get_args

from torch import Tensor, device, dtype

from ..core.call import KeySummary, OwnOptions, Problem, RoundedKeys, Tangents
from ..core.loss import LossOptions
from ..core.pages import Pages

BackendName = Literal["triton", "torch"]  # "auto" takes the first that is a default for the device and has no obstacle
Impl = Literal["auto", BackendName, "reference"]


class PreparedStep(Protocol):
    """What computes training steps whose tensors have the shapes, strides, dtypes and devices of some before them.

    Either pass returns None where `attention_forward` or `attention_backward` has to compute it, which the other pass
    need not know. The strides of what the backward takes are looked at: they may be any.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """What `attention_forward` returns with `needs_backward`."""

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor,
        offset: Tensor, reached_keys: Tensor, reaching_queries: Tensor, own: OwnOptions, /,
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """(grad_query, grad_key, grad_value)."""


class Backend(Protocol):
    """What a backend offers.

    Shapes: query (batch, heads, query length, head size), key (batch, key heads, key length, head size), value (batch,
    key heads, key length, value size). Rows are (batch, heads, query length), float32, or float64 for float64 inputs.
    `maximum` and `offset` are the threshold of each row: tau = maximum - offset in units of z, but a backend keeps its
    maximum in a unit of its own, which only its own functions read. `reached_keys` says which keys each tile of queries
    may reach, and `reaching_queries` which queries may reach each tile of keys. Both are int32, in a form of the
    backend's own. `row_maxima`, `sums_at` and `output_at` may be taken of a part of the keys. The maxima of parts
    combine by max, over the parts in which a row sees a key. Everything else combines by addition.
    """

    def obstacle(self, dtype: dtype, device: device) -> str:
        """Why this backend cannot take tensors of a dtype on a device; empty if it can."""

    def is_default_for(self, device: device) -> bool:
        """Whether "auto" may choose this backend for tensors on a device."""

    def tile_size(self, dtype: dtype, size: int) -> int:
        """Queries, and keys, of one tile, for the larger head size of keys and values."""

    def reach_shapes(self, problem: Problem, dtype: dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `reached_keys` and `reaching_queries`. The first dimension is the batch."""

    def reached_tiles(self, problem: Problem, dtype: dtype, reached_keys: Tensor) -> Tensor:
        """(batch, heads, query tiles, key tiles) bool: a query of the tile may reach a key of it."""

    def summarise(self, key: Tensor, value_size: int) -> KeySummary:
        """The summary of blocks of keys, for calls whose values have this head size."""

    def append_keys(self, rounded_keys: RoundedKeys, key: Tensor, lengths: Tensor) -> None:
        """Write keys (batch, key heads, new keys, head size) to the positions from lengths (batch,) int32 on. What lies
        past the capacity is left out."""

    def attention_forward(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(output, value_mean, maximum, offset, reached_keys, reaching_queries).

        `problem.summary` is that of these keys. Where it is None, a backend that needs one makes it.
        `problem.rounded_keys` holds these keys, where a call is decoded and the caller keeps them. value_mean is
        O1 = sum u v / sum u, in the shape and dtype of the output. Without `needs_backward` all but the output have no
        element.
        """

    def prepare(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor, OwnOptions], Tensor | None] | None:
        """What computes the output of `attention_forward` for this problem without `needs_backward`, from query, key
        and value with the shapes, strides, dtypes and devices of these, and own options in place of those that the
        problem has; or returns None where `attention_forward` has to. None where nothing is prepared. The problem holds
        no other tensors.
        """

    def prepare_step(self, problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> PreparedStep | None:
        """Likewise what computes training steps: the forward pass with `needs_backward`, and its backward."""

    def attention_paged(
        self, problem: Problem, pages: Pages, query: Tensor, key_cache: Tensor, value_cache: Tensor
    ) -> Tensor:
        """The output for keys and values in pages: caches (pages, page size, key heads, dim).

        The problem has the longest queries of a row, and as many keys as the pages of a row have room for. Packed
        queries are (1, heads, tokens, head size); tokens of no row get 0. Rows that do not fit get NaN, see
        `core.pages.rows_fit`.
        """

    def attention_backward(
        self, problem: Problem, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor,
        maximum: Tensor, offset: Tensor, reached_keys: Tensor, reaching_queries: Tensor, needs_parameters: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(grad_query, grad_key, grad_value, grad_parameters); the last is (3, batch, heads): of alpha, scale and ALiBi
        slopes, and has no element without `needs_parameters`."""

    def attention_tangent(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor,
        offset: Tensor, reached_keys: Tensor, reaching_queries: Tensor, tangents: Tangents,
    ) -> Tensor:  # fmt: skip
        """The output's derivative along the tangents, in the shape and dtype of the output."""

    def attention_support(
        self, problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, reached_keys: Tensor,
        reaching_queries: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """(maximum in units of z, support size of each row in int32, exact map of live tiles in bool, keys of each tile
        of queries in int32). Support says what these are."""

    def row_maxima(self, problem: Problem, query: Tensor, key: Tensor) -> Tensor:
        """Each row's maximum over the keys; +inf where it sees none."""

    def sums_at(
        self, problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(F, sum u) of each row over the keys, at a threshold."""

    def output_at(
        self, problem: Problem, query: Tensor, key: Tensor, value: Tensor, maximum: Tensor, offset: Tensor
    ) -> Tensor:
        """sum p v over the keys at a threshold, (batch, heads, query length, value size) in the dtype of rows."""

    def entmax(self, x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
        """Probabilities of each row of x, (rows, n); alphas is (rows,), in place of the number."""

    def entmax_backward(
        self, grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, needs_grad_alpha: bool
    ) -> tuple[Tensor, Tensor]:
        """(grad_x, grad_alphas (rows,), without elements unless needed), from the probabilities."""

    def loss(self, x: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
        """(losses (rows,), state (3, rows)) of the Fenchel-Young loss, without the target's own entropy."""

    def loss_backward(self, grad: Tensor, x: Tensor, target: Tensor, state: Tensor, options: LossOptions) -> Tensor:
        """grad_x, from the state that each row was solved to."""


BACKENDS: dict[str, Backend] = {name: import_module(f".{name}", __name__) for name in get_args(BackendName)}


def choose(dtype: dtype, device: device, impl: str, others: tuple[str, ...] = ()) -> str:
    """The name of the backend for tensors of a dtype on a device, or `impl` itself if it is one of `others`.

    An explicit choice that cannot run here is refused: nothing falls back.
    """
    check_impl(impl, others)
    if impl == "auto":
        for name, backend in BACKENDS.items():
            if backend.is_default_for(device) and not backend.obstacle(dtype, device):
                return name
    if impl in BACKENDS:
        obstacle = BACKENDS[impl].obstacle(dtype, device)
        if obstacle:
            raise ValueError(f"impl={impl!r} cannot run here: {obstacle}")
    return impl


def check_impl(impl: object, others: tuple[str, ...] = ()) -> None:
    """Refuse what is neither "auto", nor a backend, nor one of `others`."""
    names = "auto", *BACKENDS, *others
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(map(repr, names))}, got {impl!r}")
