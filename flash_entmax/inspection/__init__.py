"""Which keys each query attends to, of any call: support sizes, live tiles, thresholds, and the sparse rows themselves.

with inspection.record(model) as calls:
    model(tokens)
for call in calls:
    print(call.name, call.keys_per_query, call.block_sparsity, call.key_sparsity)
rows = calls[3].rows(batch=0, head=2)  # a sparse CSR matrix: the keys of each query and their probabilities
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import product
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..backends import BACKENDS
from ..core.call import Support
from ..core.checks import check_flag, said
from ..core.tensors import ceil_div, row_dtype
from ..core.tile_filter import HIDDEN
from ..functional import entmax_attention
from ..operators import attention as ops
from .recorded import Recorded, check_place, share, versions
from .recording import Layers, watch_calls
from .sparse_rows import QUERIES, Head, HeadVisibility, union_sizes


@overload
def record(
    model: nn.Module | None = ..., *, only: Callable[[str], bool] | None = ..., keep_inputs: bool = ...,
    layers: None = ...,
) -> AbstractContextManager[list["RecordedCall"]]: ...  # fmt: skip


@overload
def record(
    model: nn.Module, *, only: Callable[[str], bool] | None = ..., keep_inputs: bool = ..., layers: Layers,
) -> AbstractContextManager[list[Recorded]]: ...  # fmt: skip


@contextmanager
def record(
    model: nn.Module | None = None,
    *,
    only: Callable[[str], bool] | None = None,
    keep_inputs: bool = True,
    layers: Layers | None = None,
) -> Iterator[list[Any]]:
    """Record every entmax attention call that runs in the ``with`` block, in order: your own, or those of any model.

    Calls are seen where PyTorch dispatches their operator, and nothing is patched. Autograd, autocast, activation
    checkpointing and inference mode may be on; what a backward pass computes again is not recorded again. Code that
    ``torch.compile`` has compiled runs eagerly in the block. Calls with ``impl="reference"`` or ``alpha=1`` do not use
    the operator and are not recorded, and neither are calls of other threads.

    Args:
        model: names each call after the innermost module of the model that is running, such as
            ``model.layers.3.self_attn``. Without a model, calls are named after their number.
        only: a function from a name to True or False: whether to record calls of this name.
        keep_inputs: False computes the :class:`Support` of each call at once and releases its query and key. Memory
            stays small, and ``rows`` is refused.
        layers: which layers without entmax attention to record as well, such as
            ``integrations.state_space.recorder()`` for those of Mamba. A function from a module of the model to None,
            or to what makes the record of one of its calls, given ``(name, number, arguments, keywords)``.

    Yields:
        The list of calls, which grows as they run and stays afterwards. A call holds its query and key by reference.
        Calls of attention are :class:`RecordedCall`; all have what :class:`Recorded` names.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: ``layers`` without a model.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if only is not None and not callable(only):
        raise TypeError(f"only must be a function from names to True or False, got {said(only)}")
    check_flag("keep_inputs", keep_inputs)
    if layers is not None and not callable(layers):
        raise TypeError(f"layers must be a function from modules to what makes their record, got {said(layers)}")
    if layers is not None and model is None:
        raise ValueError("layers are found in a model, and model is None")
    calls: list[Recorded] = []

    def keep(name: str, make: Callable[[], Recorded]) -> None:
        if only is None or only(name):
            calls.append(make())
            if not keep_inputs:
                calls[-1].release()

    with watch_calls(model, layers, RecordedCall, keep):
        yield calls


class RecordedCall:
    """One recorded attention call, with batch and heads as the operator got them.

    Packed sequences are one batch row, whose queries and keys count over all tokens. Thresholds are in units of
    ``z = (alpha - 1) * score``, as in :class:`Support`.

    Attributes:
        name: of the module that made the call.
        number: how many calls ran before it: the layer, in one pass through a model.
        problem: its sizes: ``batch``, ``heads``, ``key_heads``, ``query_length``, ``key_length``, ``head_size``.
        impl: ``"triton"`` or ``"torch"``.
        dtype: of query, key and value.
        covered: the sum of a row's probabilities, 1.
    """

    covered = 1.0

    def __init__(self, name: str, number: int, arguments: tuple, results: tuple[Tensor, ...]) -> None:
        inputs, options = arguments[:3], arguments[4:]
        tensors, self._numbers = options[: ops.TENSORS], options[ops.TENSORS :]
        # Let go of the graph that made them. Below autograd a detached tensor does not count the caller's writes.
        query, key, value, *detached = (
            tensor.detach() if tensor is not None and tensor.requires_grad else tensor for tensor in (*inputs, *tensors)
        )
        self._tensors = ops.OptionTensors(*detached)
        if self._tensors.alibi_slopes is not None:  # the caller's own, which an optimizer's step may write to
            self._tensors = self._tensors._replace(alibi_slopes=self._tensors.alibi_slopes.clone())
        self.name, self.number, self.dtype = name, number, query.dtype
        self.problem, self.impl = ops.unpack_arguments(query, value, self._tensors, self._numbers)
        self._inputs: tuple[Tensor, Tensor] | None = (query, key)
        self._versions: tuple[int | None, ...] | None = versions(query, key)
        self._state = tuple(tensor.detach() for tensor in results[2:])
        self._maximum, self._offset, self._reached_keys, _ = self._state
        self._tile = ops.tile_of(self.impl, query, value)

    def __getstate__(self) -> dict:
        """A copy counts its own writes, and knows if the inputs were written to before."""
        is_written = self._inputs is not None and versions(*self._inputs) != self._versions
        return {**vars(self), "_versions": None if is_written else self._versions}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self._inputs is not None and self._versions is not None:
            self._versions = versions(*self._inputs)

    def __repr__(self) -> str:
        p = self.problem
        shape = f"batch {p.batch}, heads {p.heads}, {p.query_length} queries, {p.key_length} keys"
        return f"RecordedCall({self.name!r}, {shape}, {self.impl}, {str(self.dtype).removeprefix('torch.')})"

    @property
    def alpha(self) -> float | Tensor:
        """A number, or (heads,) where each head has its own."""
        return self.problem.score.alpha

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Query (batch, heads, query length, head size) and key (batch, key heads, key length, head size), detached.

        Raises a RuntimeError where they were released, or written to after the call (which tensors count that need no
        gradient).
        """
        if self._inputs is None:
            raise RuntimeError(f"query and key of {self.name!r} were released: record with keep_inputs=True")
        if versions(*self._inputs) != self._versions:
            raise RuntimeError(
                f"query or key of {self.name!r} was written to after the call (as a static key-value cache does): "
                "read what you need of one call before the next, or record with keep_inputs=False"
            )
        return self._inputs

    def release(self) -> None:
        """Let go of query and key. The support is computed before; ``rows`` is refused afterwards."""
        if self._inputs is not None:
            _ = self.support
            self._inputs = None

    @cached_property
    def support(self) -> Support:
        """Maximum, offset, size, live tiles and keys of tiles, as ``return_support=True`` gives them."""
        query, key = self.inputs
        value = key.new_empty(()).expand(*key.shape[:3], self.problem.value_size)  # the operator reads its shape only
        arguments = query, key, value, *self._tensors, *self._state, *self._numbers
        maximum, size, tiles, keys = ops.attention_support(*arguments)
        return Support(maximum, self._offset, size, tiles, (self._tile, self._tile), keys)

    @property
    def tau(self) -> Tensor:
        """(batch, heads, query length), the threshold of each row in units of z; +inf where no key is visible."""
        return self.support.tau

    @property
    def tile(self) -> int:
        """How many queries, and keys, a tile of the call has: ``support.tile_shape[0]``."""
        return self._tile

    @property
    def size(self) -> Tensor:
        """(batch, heads, query length) int32, the number of keys with positive probability: ``support.size``."""
        return self.support.size

    @property
    def live_tiles(self) -> Tensor:
        """(batch, heads, query tiles, key tiles) bool: the tile holds a positive probability."""
        return self.support.tiles

    @cached_property
    def visible_tiles(self) -> Tensor:
        """(batch, heads, query tiles, key tiles) bool: a query of the tile sees a key of it, by all masks."""
        problem, tile = self.problem, self._tile
        grid = problem.batch, problem.heads, ceil_div(problem.query_length, tile), ceil_div(problem.key_length, tile)
        start, stop, _ = self.intervals.long().unbind(1)
        batch, row = (start < stop).nonzero(as_tuple=True)
        # Of each row, +1 at the first tile that it sees and -1 past the last: the sums count the rows that see a tile.
        steps = torch.zeros(problem.batch, grid[2], grid[3] + 1, dtype=torch.int32, device=start.device)
        one = torch.ones_like(row, dtype=torch.int32)
        steps.index_put_((batch, row // tile, start[batch, row] // tile), one, accumulate=True)
        steps.index_put_((batch, row // tile, (stop[batch, row] - 1) // tile + 1), -one, accumulate=True)
        seen = (steps.cumsum(-1)[..., :-1] > 0).unsqueeze(1).expand(grid)
        kinds = self._tensors.tile_kinds
        return seen if kinds is None else seen & (kinds[..., :-1] != HIDDEN)

    @property
    def block_sparsity(self) -> Tensor:
        """(heads,) float64: the share of the visible tiles, over the batch, that hold no positive probability."""
        return 1 - share(self.live_tiles.sum((0, 2, 3)), self.visible_tiles.sum((0, 2, 3)))

    @property
    def block_sparsity_by_position(self) -> Tensor:
        """(query tiles,) float64: the same share by tile of queries, over batch and heads; NaN if none is visible."""
        return 1 - share(self.live_tiles.sum((0, 1, 3)), self.visible_tiles.sum((0, 1, 3)))

    @property
    def key_density(self) -> Tensor:
        """(heads,) float64: of the keys that a tile of queries sees, the share to which one of its queries attends.

        Keys are counted over all tiles of queries of the batch, by the call itself: in its precision, and by its own
        tile, ``support.tile_shape[0]`` queries. ``1 - key_sparsity`` is the same share for 64 queries on every device,
        by the supports of ``rows``. At a tile of 64 queries the two differ by the keys whose score is within rounding
        of the threshold.
        """
        return share(self.support.keys.sum((0, 2)), self._visible_keys(self._tile).sum((0, 2)))

    @property
    def keys_per_query(self) -> Tensor:
        """(heads,) float64: the mean support size of the queries that see a key."""
        return share(self.support.size.sum((0, 2)), (self.support.maximum < torch.inf).sum((0, 2)))

    @cached_property
    def live_keys(self) -> Tensor:
        """(batch, heads, ceil(query length / 64)) int64: how many keys 64 consecutive queries attend to together.

        This is the size of the union of their supports: a key counts once, however many queries attend to it. The
        supports are those of ``rows``, with its memory and its errors. Packed tokens are cut every 64 as well.
        """
        p = self.problem
        counts = torch.zeros(p.batch, p.heads, ceil_div(p.query_length, QUERIES), dtype=torch.int64, device="cpu")
        for batch, head in product(range(p.batch), range(p.heads)):
            counts[batch, head] = self._head(batch, head).live_keys()
        return counts.to(self._maximum.device)

    @cached_property
    def visible_keys(self) -> Tensor:
        """(batch, heads, ceil(query length / 64)) int64: how many keys at least one of 64 consecutive queries sees."""
        return self._visible_keys(QUERIES)

    def _visible_keys(self, queries: int) -> Tensor:
        """The same of each group of `queries` consecutive queries, one tile or several."""
        p, kinds = self.problem, self._tensors.tile_kinds
        shape = p.batch, p.heads, ceil_div(p.query_length, queries)
        if kinds is None:
            return union_sizes(self.intervals.long(), queries).unsqueeze(1).expand(shape)
        counts = [
            [self.visibility(batch, head).visible_keys(queries) for head in range(kinds.shape[1])]
            for batch in range(p.batch)
        ]
        return torch.tensor(counts, device=kinds.device).view(p.batch, kinds.shape[1], -1).expand(shape)

    @property
    def keys_per_64_queries(self) -> Tensor:
        """(heads,) float64: the mean of ``live_keys`` over the groups of 64 queries that see a key."""
        return share(self.live_keys.sum((0, 2)), (self.visible_keys > 0).sum((0, 2)))

    @property
    def key_sparsity(self) -> Tensor:
        """(heads,) float64: of the keys that 64 consecutive queries see, the share that none of them attends to.

        It is the ``block_sparsity`` of tiles of 64 queries and one key. ``key_density`` says how its complement
        differs.
        """
        return 1 - share(self.live_keys.sum((0, 2)), self.visible_keys.sum((0, 2)))

    @cached_property
    def visible_per_query(self) -> float:
        """The mean number of keys of the queries that see a key."""
        places = product(range(self.problem.batch), range(self.mask_heads))
        count = torch.cat([self.intervals.new_zeros(0), *(self.visibility(*place).sizes() for place in places)])
        return float(share(count.sum(), (count > 0).sum()))

    @property
    def intervals(self) -> Tensor:
        """(batch, 3, query length) int32: the first key that a query may see, one past the last, and its position.

        Masks by tile (``key_mask``, ``block_mask``) may hide some of these keys.
        """
        return self.problem.intervals(self._maximum.device)

    def rows(self, batch: int = 0, head: int = 0) -> Tensor:
        """The attention of one head as a sparse CSR matrix (query length, key length), whose entries are the support.

        Probabilities are computed again in float64 from query and key, in the live tiles of the call, one row of tiles
        at a time. They are those of the reference, and memory follows the support, not the square of the length. The
        matrix is float32 (float64 for float64 inputs), and no probability is rounded to 0. ``support.size`` counts in
        the precision of the call: a key whose score is within rounding of the threshold may count there and not here.
        A query that sees no key, or has a NaN among its scores, has no entries.

        Raises:
            TypeError, IndexError: no such batch row or head.
            RuntimeError: query or key was released, or written to after the call.
        """
        view = self._head(batch, head)
        parts = [view.tile_row(index) for index in range(view.live.shape[0])]
        dtype = row_dtype(self.inputs[0])
        smallest = torch.finfo(dtype).tiny
        counts, keys, values = (
            torch.cat([part[field] for part in parts]) if parts else torch.zeros(0, device=view.query.device)
            for field in range(3)
        )
        offsets = pad(counts.long().cumsum(0), (1, 0))
        size = self.problem.query_length, self.problem.key_length
        device = values.device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # on first use
            values = values.to(dtype).clamp_min(smallest)
            return torch.sparse_csr_tensor(offsets, keys.long(), values, size, device=device, check_invariants=False)

    def _head(self, batch: int, head: int) -> Head:
        p = self.problem
        alpha, scale, softcap, slopes = p.score
        assert scale is not None
        check_place(batch, head, p.batch, p.heads)
        query, key = self.inputs
        return Head(
            query[batch, head].double(),
            key[batch, head // p.group].double(),
            alpha[head].item() if isinstance(alpha, Tensor) else alpha,
            scale[head].item() if isinstance(scale, Tensor) else scale,
            softcap,
            0.0 if slopes is None else slopes[batch, head].item(),
            self.visibility(batch, head),
            self._reached_tiles[batch, head],
        )

    @cached_property
    def _reached_tiles(self) -> Tensor:
        return BACKENDS[self.impl].reached_tiles(self.problem, self.dtype, self._reached_keys)

    @property
    def mask_heads(self) -> int:
        """1 where all heads see the same keys, else how many heads there are."""
        kinds = self._tensors.tile_kinds
        return 1 if kinds is None else kinds.shape[1]

    def visibility(self, batch: int, head: int) -> HeadVisibility:
        """Which keys one head sees in one batch row, by all masks."""
        p, visibility = self.problem, self.problem.visibility
        own_kinds = None
        if visibility.tile_kinds is not None:
            kinds = visibility.tile_kinds[..., :-1].expand(p.batch, -1, ceil_div(p.query_length, self._tile), -1)
            own_kinds = kinds[batch, head if kinds.shape[1] > 1 else 0]
        return HeadVisibility(self.intervals[batch].long(), own_kinds, visibility.tile_bits, self._tile)


def attention_rows(query: Tensor, key: Tensor, *, batch: int = 0, head: int = 0, **options: Any) -> Tensor:
    """The attention of one head as a sparse CSR matrix (query length, key length), without a model.

    `RecordedCall.rows` says what it holds.

    Args:
        query, key: (batch, heads, length, head size), as for :func:`flash_entmax.entmax_attention`.
        batch, head: the batch row and the head.
        options: those of ``entmax_attention``, which raises a TypeError for any other.

    Raises:
        TypeError, IndexError: no such batch row or head.
        ValueError: ``alpha=1`` or ``impl="reference"``, whose attention is dense; or what ``entmax_attention`` raises.
    """
    if options.get("return_support"):
        raise ValueError("return_support has no place here: record() gives the support of a call")
    if isinstance(query, Tensor) and query.dim() == 4:  # entmax_attention refuses others
        check_place(batch, head, *query.shape[:2])
    with torch.no_grad(), record() as calls:
        entmax_attention(query, key, key, **options)
    if not calls:
        raise ValueError("alpha=1 (softmax) and impl='reference' are dense: they have no sparse rows to give")
    return calls[0].rows(batch, head)
