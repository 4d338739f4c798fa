"""Attention as centred linear attention, of degree 1, 2 or 3, to which only the keys of the support write."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .backends.reference import entmax_rows, scores_by_definition
from .core.call import Problem, ScoreOptions
from .core.checks import checked_inputs, is_number, require_dense, typed
from .core.intervals import UNLIMITED
from .core.modes import as_given
from .core.tensors import row_dtype
from .core.visibility import Visibility

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DEGREES = {2.0: 1, 1.5: 2, 4 / 3: 3}  # 1 / (alpha - 1)
PLACES = "ijk"  # of a moment, in the notation of einsum


class LinearStates(NamedTuple):
    """What the support of each query has written: beside the query, all that its output depends on.

    Let S be the support of a query, and ``e_j = key_j - centre``. A moment of degree a sums the products of a
    components of ``e_j``. *Key size* is the head size; with ALiBi it is one more, since the distance to a key counts as
    one more component of it.

    Attributes:
        size: (batch, heads, query length) int64, the number of keys in S.
        centre: (batch, heads, query length, key size), the mean of the keys in S; 0 where there is none.
        key_moments: ``sum_S e_j e_j`` (..., key size, key size) for alpha 1.5 and 4/3, and then, for alpha 4/3,
            ``sum_S e_j e_j e_j`` (..., key size, key size, key size). For alpha 2 there is none.
        value_moments: ``sum_S value_j`` (..., value size), ``sum_S value_j e_j`` (..., value size, key size), and so on
            with ``e_j e_j`` for alpha 1.5 and 4/3, and ``e_j e_j e_j`` for alpha 4/3.
    """

    size: Tensor
    centre: Tensor
    key_moments: tuple[Tensor, ...]
    value_moments: tuple[Tensor, ...]

    def read(self, query: Tensor) -> Tensor:
        """What queries (batch, heads, query length, key size) in units of z read, (..., value size).

        ``z = query . key`` in these units: multiply a query by (alpha - 1) * scale. With ALiBi, its last component is
        -(alpha - 1) * slope. States are those of their own query's support. A query with another support reads a number
        that is not its attention, or NaN.
        """
        if query.shape != self.centre.shape or query.dtype != self.centre.dtype:
            wanted, got = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (self.centre, query))
            raise ValueError(f"query must be {wanted}, as the states are, got {got}")
        degree = len(self.value_moments) - 1
        h = mean_distance(self.size, query, self.key_moments)
        output = torch.zeros_like(self.value_moments[0])
        for power, moment in enumerate(self.value_moments):
            factor = math.comb(degree, power) * h.pow(degree - power)
            output = output + factor.unsqueeze(-1) * along(moment, query, power)
        return output


class LinearForm(NamedTuple):
    """Attention as linear attention.

    Attributes:
        support: (batch, heads, query length, key length) bool, the keys that wrote to the states of each query.
        states: what they wrote.
        output: (batch, heads, query length, value size), what each query reads in its states: its attention.
    """

    support: Tensor
    states: LinearStates
    output: Tensor


def linear_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float = 1.5,
    *,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    alibi_slopes: Tensor | None = None,
    query_positions: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    block_mask: "BlockMask | None" = None,
) -> LinearForm:
    """What a linear model would have to remember for each query, so that reading it gives exactly entmax attention.

    With ``m = 1 / (alpha - 1)``, S the support of a query and x the query in units of z, attention is::

        output = sum_a binom(m, a) h^(m - a) V_a(x, .., x)      V_a = sum_S value_j e_j .. e_j,  a from 0 to m
        1      = sum_a binom(m, a) h^(m - a) K_a(x, .., x)      K_a = sum_S e_j .. e_j,          e_j = key_j - centre

    The second line has one root h > 0, so no threshold is needed beside the states. For alpha 2, h is 1 / n, and the
    output is the mean value plus the state ``sum_S value_j e_j``, a matrix, times x. docs/math.md has the proof. The
    support depends on the query: states of one query do not serve another one.

    This is for analysis, and slow. Scores take queries * keys numbers. With the key size d (one more than the head
    size with ALiBi), the value size v and the largest support n, the states take queries * (v + 1) * d^m numbers, and
    making them queries * n * (v + 1) * d^m operations and up to n / d times their memory. Rounding grows with the
    largest ``|x| |e_j|``, to the power m.

    Args:
        query: (batch, heads, query length, head size). States and output are computed in float32, and for float64 in
            float64; the support in float64.
        key: (batch, key heads, key length, head size). Consecutive query heads share a key head.
        value: (batch, key heads, key length, value size).
        alpha: 2, 1.5 or 4 / 3. For these, a probability is a polynomial of the score.
        is_causal, scale, window_size, alibi_slopes, query_positions, key_lengths, key_mask, block_mask: as for
            :func:`flash_entmax.entmax_attention`. There is no softcap: a score with one is no polynomial of the query.

    Returns:
        A :class:`LinearForm`. The output is in the dtype of the inputs (of autocast, where that is on), and has the
        gradients of attention, through the states. A query without a visible key has output 0. One that sees a score of
        NaN or inf, or only scores of -inf, has no support, and its output is NaN.

    Raises:
        TypeError, ValueError: as ``entmax_attention``, and ValueError for another alpha.
    """
    degree = degree_of(alpha)
    score = ScoreOptions(alpha, scale, 0.0, alibi_slopes)
    visibility = Visibility(is_causal, window_size, query_positions, key_lengths, key_mask, block_mask)
    query, key, value = checked(query, key, value, score, visibility)
    with as_given(query):
        z, visible, distance = scores_in_z(query, key, score, visibility)
        support = entmax_rows(z, alpha)[0] > 0
        given, wide = query.dtype, row_dtype(query)
        query, key, value = (tensor.to(wide) for tensor in (query, key, value))
        states = states_of(support, key, value, distance.to(wide) if alibi_slopes is not None else None, degree)
        output = states.read(in_units_of_z(query, score))
    output = output.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    output = output.masked_fill(visible.any(-1, keepdim=True) & (support.sum(-1, keepdim=True) == 0), torch.nan)
    return LinearForm(support, states, output.to(given))


def degree_of(alpha: object) -> int:
    if not is_number(alpha):
        raise TypeError(f"alpha must be the number 2, 1.5 or 4 / 3, got {typed(alpha)}")
    if alpha not in DEGREES:
        raise ValueError(
            f"alpha must be 2, 1.5 or 4 / 3, where a probability is a polynomial of the score, got {alpha}"
        )
    return DEGREES[alpha]


def checked(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """The refusals of attention; jagged tensors have their lengths by query_positions and masks of their own."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dense(name, tensor)
    return checked_inputs(query, key, value, score, visibility)


@torch.no_grad()
def scores_in_z(
    query: Tensor, key: Tensor, score: ScoreOptions, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, heads, query length, key length) float64, ``(alpha - 1) * score``, -inf where the key is hidden; bool,
    True where it is visible; the distance from the query to the key, which broadcasts to these.
    """
    query, key = query.double(), key.double()
    lowered = score.lowered(query.shape, query.dtype, query.device)
    problem = Problem.of(query.shape, key.shape, lowered, visibility.lowered(query, key.shape[2], None))
    scores, visible, distance = scores_by_definition(problem, query, key, visibility)
    z = (score.alpha - 1.0) * scores
    return z.masked_fill(~visible, -torch.inf), visible.expand_as(z), distance


def in_units_of_z(query: Tensor, score: ScoreOptions) -> Tensor:
    """(batch, heads, query length, key size): the query as it reads states. With ALiBi it has one component more."""
    _, scale, _, slopes = score.lowered(query.shape, query.dtype, query.device)
    assert scale is not None  # the score is lowered
    scaled = (scale.view(-1, 1, 1) if isinstance(scale, Tensor) else scale) * query
    if slopes is not None:  # an infinite one hides keys, all but those at distance 0
        last = -slopes.masked_fill(slopes == torch.inf, 0.0)[:, :, None, None]
        scaled = torch.cat((scaled, last.expand(*query.shape[:3], 1)), -1)
    return (score.alpha - 1.0) * scaled


def states_of(support: Tensor, key: Tensor, value: Tensor, distance: Tensor | None, degree: int) -> LinearStates:
    """Of keys and values (batch, key heads, key length, dim); the distance is one more component of a key."""
    size = support.sum(-1)
    most = int(size.amax()) if size.numel() else 0
    index = support.long().argsort(dim=-1, descending=True, stable=True)[..., :most]
    writes = support.gather(-1, index).unsqueeze(-1)
    keys, values = rows_at(key, index), torch.where(writes, rows_at(value, index), 0.0)
    if distance is not None:
        keys = torch.cat((keys, distance.expand_as(support).gather(-1, index).unsqueeze(-1)), -1)
    centre = torch.where(writes, keys, 0.0).sum(-2) / size.clamp_min(1).unsqueeze(-1)
    e = torch.where(writes, keys - centre.unsqueeze(-2), 0.0)
    key_moments = tuple(moment(e, power) for power in range(2, degree + 1))
    return LinearStates(size, centre, key_moments, tuple(moment(e, power, values) for power in range(degree + 1)))


def rows_at(tensor: Tensor, index: Tensor) -> Tensor:
    """(batch, key heads, key length, dim) -> (batch, heads, query length, n, dim): the rows that the index names."""
    batch, heads = (torch.arange(size, device=index.device) for size in index.shape[:2])
    key_head = heads // max(1, index.shape[1] // max(1, tensor.shape[1]))
    return tensor[batch[:, None, None, None], key_head[:, None, None], index]


def moment(e: Tensor, power: int, values: Tensor | None = None) -> Tensor:
    """sum_j e_j .. e_j, `power` times, of (..., n, key size); times value_j, (..., n, value size), in front."""
    parts = [*([values] if values is not None else []), *[e] * power]
    names = "v" * (values is not None) + PLACES[:power]
    return torch.einsum(",".join(f"...n{name}" for name in names) + f"->...{names}", *parts)


def along(moment: Tensor, query: Tensor, times: int) -> Tensor:
    """The moment times the query (..., key size) in its last `times` places."""
    for _ in range(times):
        places = moment.dim() - query.dim()
        moment = (moment * query.view(*query.shape[:-1], *[1] * places, query.shape[-1])).sum(-1)
    return moment


def mean_distance(size: Tensor, query: Tensor, key_moments: tuple[Tensor, ...]) -> Tensor:
    """(batch, heads, query length): h, the mean of z_j - tau over the support: the root h > 0 of

    n h = 1,  or  n h^2 + K_2 = 1,  or  n h^3 + 3 K_2 h + K_3 = 1        K_a = K_a(query, .., query)

    The last one is Cardano's formula in a form whose terms are all positive, so that no digits cancel.
    """
    n = size.clamp_min(1).to(query.dtype)
    if not key_moments:
        return 1.0 / n
    moments = [along(moment, query, power) for power, moment in enumerate(key_moments, 2)]
    if len(moments) == 1:
        return ((1.0 - moments[0]) / n).sqrt()
    w, q = moments[0] / n, (1.0 - moments[1]) / (2.0 * n)
    u = (q + (q * q + w * w * w).sqrt()).pow(1.0 / 3.0)
    return 2.0 * q / (u * u + w + (w / u).square())
