"""A state-space layer as inspection records it: the tokens that make up most of each output, as sparse rows."""

import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.tensors import ceil_div
from ...inspection.recorded import check_place, share, versions
from ...inspection.sparse_rows import HeadVisibility
from .measures import MEASURES
from .mixers import check_covered, check_hidden, check_mask, check_measure, check_mixer, is_accepted
from .split import shares

TILE = 64  # output tokens, and input tokens, of a tile


def recorder(*, measure: str = "norm", covered: float = 0.99) -> Callable[[nn.Module], Callable | None]:
    """What ``inspection.record(model, layers=...)`` takes to record the state-space layers of a model.

    Args:
        measure: ``"norm"`` or ``"alti"``, as for :func:`shares`.
        covered: the shares of an output are never zero. Its largest ones that reach this sum are kept, and the others
            are left out: "other".

    Raises:
        TypeError, ValueError: another measure; ``covered`` is not above 0 and at most 1.
    """
    check_measure(measure, MEASURES)
    check_covered(covered)

    def recorded(module: nn.Module) -> Callable | None:
        """Makes the record of one call of the module; None for a module that is no state-space layer."""
        return partial(RecordedMixer, module, measure, covered) if is_accepted(module) else None

    return recorded


class MixerSizes(NamedTuple):
    """Named as those of an attention call: a query is an output token, and a key an input token."""

    batch: int
    query_length: int
    key_length: int
    heads: int = 1
    key_heads: int = 1


class RecordedMixer:
    """One recorded call of a state-space layer. It has what :class:`flash_entmax.inspection.Recorded` names.

    The layer is one head. Its keys are the fewest input tokens whose shares reach ``covered`` of an output.

    Attributes:
        name, number: as of a recorded attention call.
        mixer: the layer.
        problem: ``batch``, ``query_length`` and ``key_length`` (both are the number of tokens), ``heads`` (1).
        measure: ``"norm"`` or ``"alti"``.
        covered: which sum the kept shares of a row reach.
        dtype: of the layer's input.
    """

    tile = TILE

    def __init__(
        self, mixer: nn.Module, measure: str, covered: float, name: str, number: int, arguments: tuple, options: dict
    ) -> None:
        self.mixer, self.measure, self.covered, self.name, self.number = mixer, measure, covered, name, number
        hidden, mask = inputs_of(name, mixer, arguments, options)
        check_mixer(mixer)
        check_hidden(mixer, hidden)
        check_mask(hidden, mask)
        batch, tokens, _ = hidden.shape
        self.problem, self.dtype = MixerSizes(batch, tokens, tokens), hidden.dtype
        self._inputs: tuple[Tensor, Tensor | None] | None = (hidden.detach(), mask)
        self._versions = versions(hidden.detach(), *mixer.parameters())

    def __repr__(self) -> str:
        kind, p = type(self.mixer).__name__, self.problem
        return f"RecordedMixer({self.name!r}, {kind}, batch {p.batch}, {p.query_length} tokens, {self.measure})"

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """The layer's input (batch, tokens, width), detached, and the mask of its padding.

        Raises a RuntimeError where they were released, or where they or the layer's weights were written to since.
        """
        if self._inputs is None:
            raise RuntimeError(f"the input of {self.name!r} was released: record with keep_inputs=True")
        if versions(self._inputs[0], *self.mixer.parameters()) != self._versions:
            raise RuntimeError(
                f"the input or a weight of {self.name!r} was written to after the call (as an optimizer does): read "
                "what you need of one call before, or record with keep_inputs=False"
            )
        return self._inputs

    def release(self) -> None:
        """Let go of the layer's input. The rows are computed before, and stay."""
        if self._inputs is not None:
            _ = self._rows
            self._inputs = None

    def shares(self) -> Tensor:
        """All shares, (batch, output tokens, input tokens): see :func:`shares`."""
        hidden, mask = self.inputs
        return shares(self.mixer, hidden, attention_mask=mask, measure=self.measure)

    def rows(self, batch: int = 0, head: int = 0) -> Tensor:
        """The largest shares of each output token, as a sparse CSR matrix (tokens, tokens).

        The entries of a row are as few as reach ``covered``. What is missing from the sum 1 is "other". A row to which
        no token contributes (padding) has no entries.

        Raises:
            TypeError, IndexError: no such batch row, or a head that is not 0.
            RuntimeError: the layer's input was released, or it or a weight was written to after the call.
        """
        check_place(batch, head, self.problem.batch, 1)
        return self._rows[batch]

    @cached_property
    def _rows(self) -> list[Tensor]:
        return [largest(row, self.covered) for row in self.shares()]

    @cached_property
    def size(self) -> Tensor:
        """(batch, 1, tokens), how many input tokens each output token keeps."""
        return torch.stack([rows.crow_indices().diff() for rows in self._rows]).unsqueeze(1)

    @cached_property
    def live_tiles(self) -> Tensor:
        """(batch, 1, tiles, tiles) bool: the tile of 64 x 64 tokens holds an entry."""
        return self._by_tiles(TILE).unsqueeze(1)

    def _by_tiles(self, keys: int) -> Tensor:
        """(batch, groups of 64 output tokens, groups of ``keys`` input tokens) bool: which hold an entry."""
        tokens = self.problem.query_length
        found = torch.zeros(self.problem.batch, ceil_div(tokens, TILE), ceil_div(tokens, keys), dtype=torch.bool)
        for live, rows in zip(found, self._rows, strict=True):
            row = torch.arange(tokens, device=rows.device).repeat_interleave(rows.crow_indices().diff())
            live[row.cpu() // TILE, rows.col_indices().cpu() // keys] = True
        return found.to(self._rows[0].device)

    @property
    def block_sparsity(self) -> Tensor:
        """(1,) float64: the share of the tiles up to the diagonal that hold no entry."""
        tiles = self.live_tiles.shape[-1]
        return 1 - share(self.live_tiles.sum((0, 2, 3)), torch.tensor(self.problem.batch * tiles * (tiles + 1) // 2))

    @property
    def block_sparsity_by_position(self) -> Tensor:
        """(tiles,) float64: the same share by tile of output tokens."""
        tiles = torch.arange(1, self.live_tiles.shape[-1] + 1, device=self.live_tiles.device)
        return 1 - share(self.live_tiles.sum((0, 1, 3)), self.problem.batch * tiles)

    @property
    def keys_per_query(self) -> Tensor:
        """(1,) float64: the mean number of kept tokens of the rows that have any."""
        return share(self.size.sum((0, 2)), (self.size > 0).sum((0, 2)))

    @cached_property
    def live_keys(self) -> Tensor:
        """(batch, 1, ceil(tokens / 64)): how many tokens 64 consecutive output tokens keep together."""
        return self._by_tiles(1).sum(-1).unsqueeze(1)

    @property
    def keys_per_64_queries(self) -> Tensor:
        """(1,) float64: the mean of ``live_keys``."""
        return self.live_keys.double().mean((0, 2))

    @property
    def key_sparsity(self) -> Tensor:
        """(1,) float64: of the tokens that 64 consecutive output tokens see, the share that none of them keeps."""
        tokens = self.problem.query_length
        seen = (TILE * torch.arange(1, ceil_div(tokens, TILE) + 1)).clamp_max(tokens).sum()
        return 1 - share(self.live_keys.sum((0, 2)), self.problem.batch * seen.to(self.live_keys.device))

    @property
    def intervals(self) -> Tensor:
        """(batch, 3, tokens) int32: the first token that an output token sees, one past the last, and its position."""
        position = torch.arange(self.problem.query_length, dtype=torch.int32)
        return torch.stack((torch.zeros_like(position), position + 1, position)).repeat(self.problem.batch, 1, 1)

    mask_heads = 1

    def visibility(self, batch: int, head: int) -> HeadVisibility:
        """Which tokens an output token sees, in one batch row; the head is 0."""
        return HeadVisibility(self.intervals[batch].long(), None, None, TILE)

    @property
    def visible_per_query(self) -> float:
        """The mean number of tokens that an output token sees; padding counts."""
        return (self.problem.query_length + 1) / 2


def inputs_of(name: str, mixer: nn.Module, arguments: tuple, options: dict) -> tuple[Tensor, Tensor | None]:
    """What ``mixer(*arguments, **options)`` reads: its input, and the mask of padding. ValueError if it reads more."""
    names = "hidden_states", "cache", "attention_mask"
    given = dict(zip(names, arguments, strict=False)) | options
    cache = given.get("cache", given.get("cache_params"))
    if cache is not None and cache.has_previous_state(mixer.layer_idx):
        raise ValueError(
            f"{name} goes on from the state of a cache, which hides what came before: record one pass over the whole "
            "text, or leave layers away"
        )
    if given.get("seq_idx") is not None:
        raise ValueError(f"{name} was called with seq_idx (packed sequences): record one sequence, without padding")
    return given.get("hidden_states"), given.get("attention_mask")


def largest(shares: Tensor, covered: float) -> Tensor:
    """(tokens, tokens), rows that sum to 1 or are 0 -> sparse CSR: of each row as few entries as reach ``covered``."""
    ordered, order = shares.double().sort(-1, descending=True)
    in_front = pad(ordered.cumsum(-1)[:, :-1], (1, 0))  # the sum of the larger ones
    kept = (ordered > 0) & (in_front < (covered if covered < 1 else torch.inf))  # the sum itself is rounded
    kept = torch.zeros_like(kept).scatter_(1, order, kept)
    row, key = kept.nonzero(as_tuple=True)
    offsets = pad(kept.sum(-1).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # on first use
        return torch.sparse_csr_tensor(offsets, key, shares[row, key], shares.shape, check_invariants=False)
