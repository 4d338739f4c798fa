"""What tests and benchmarks share: inputs with known properties, error budgets, poisoned memory.

In the package only the benchmarks and the check of speeds import this file. It needs torch and nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

TOPIC_BLOCK = 64
TOPIC_SCORE = 30.0
SCORE_DEVIATION = 0.6
WIDE = 16.0
KEY_TILE = 64
GROUPS = 8
KEY_DEVIATION = 0.4
SINK_SCORE = 1.2  # above the other keys: three deviations, and less than what leaves the sink alone

# (tiles of queries,), the group of each; (groups, keys), 0 or how strongly a group attends to a key, around 1
KeyPlan = tuple[Tensor, Tensor]

# A few roundings of the dtype, as a share of the largest number that enters the result.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _orthonormal(plan: Generator, dim: int, count: int) -> Tensor:
    """(count, dim) random directions."""
    return torch.linalg.qr(torch.randn(dim, count, generator=plan, dtype=torch.float32)).Q.mT.contiguous()


def topic_inputs(
    batch: int,
    heads: int,
    length: int,
    dim: int,
    topics: int,
    *,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    wide_blocks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value whose block sparsity is about 1 - 1 / topics, at the default scale 1 / sqrt(dim).

    Each block of 64 consecutive tokens draws one of `topics` orthonormal directions. Query and key are
    c * direction + noise, with c^2 / sqrt(dim) = 30 and noise orthogonal to all directions. Scores are then
    30 + N(0, 0.6^2) within a topic and N(0, 0.6^2) across topics, far below any threshold. The directions take
    `topics` of the `dim` dimensions, so the deviation within a topic is a little smaller than 0.6 unless `topics` is
    small compared with `dim`.

    With `wide_blocks` the last quarter of the dimensions is 0 in queries and WIDE * N(0, 1) in keys. Scores do not
    change, but the keys of a block lie far apart, and bounds on whole blocks rule out nothing.
    """
    key_heads = heads if key_heads is None else key_heads
    seen = dim - dim // 4 if wide_blocks else dim
    if not 1 <= topics <= seen:
        raise ValueError(f"topics must be from 1 to {seen}, to have orthonormal directions, got {topics}")
    plan = Generator().manual_seed(seed)
    directions = torch.nn.functional.pad(_orthonormal(plan, seen, topics), (0, dim - seen))
    blocks = -(-length // TOPIC_BLOCK)
    topic = torch.randint(topics, (batch, key_heads, blocks), generator=plan)
    topic = topic.repeat_interleave(TOPIC_BLOCK, dim=-1)[..., :length].to(device)
    directions = directions.to(device)
    centre = directions[topic] * (TOPIC_SCORE * dim**0.5) ** 0.5

    generator = Generator(device=device).manual_seed(seed + 1)
    normal = partial(torch.randn, generator=generator, dtype=torch.float32, device=device)

    def noise(count: int) -> Tensor:
        # noise . noise / sqrt(dim) of two tokens has deviation (deviation of one coordinate)^2
        white = normal(batch, count, length, dim) * SCORE_DEVIATION**0.5
        white[..., seen:] = 0
        return white - (white @ directions.mT) @ directions

    query = centre.repeat_interleave(heads // key_heads, dim=1) + noise(heads)
    key = centre + noise(key_heads)
    value = normal(batch, key_heads, length, dim)
    if wide_blocks:
        key[..., seen:] = WIDE * normal(key[..., seen:].shape)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _groups_in_turn(length: int, groups: int) -> Tensor:
    """(tiles of queries,): the group of each."""
    return torch.arange(-(-length // KEY_TILE)) % groups


def _scattered_keys(plan: Generator, groups: int, length: int, density: float) -> KeyPlan:
    """Keys drawn for each group on its own, and the first key of each tile for the group of its queries."""
    certain = 1 / (KEY_TILE * groups)
    if not certain <= density <= 1:
        raise ValueError(f"density must be from 1 / {KEY_TILE * groups} to 1 with {groups} groups, got {density}")
    group = _groups_in_turn(length, groups)
    drawn = torch.rand(groups, length, generator=plan) < (density - certain) / (1 - certain)
    drawn[group, KEY_TILE * torch.arange(len(group))] = True
    return group, drawn.float()


def _stripes(plan: Generator, groups: int, length: int, density: float) -> KeyPlan:
    """The same keys for all queries, among them the first."""
    if not 0 <= density <= 1:
        raise ValueError(f"density must be from 0 to 1, got {density}")
    others = 1 + torch.randperm(max(0, length - 1), generator=plan)[: max(0, round(density * length) - 1)]
    strength = torch.zeros(length)
    strength[:1], strength[others] = 1.0, 1.0
    return _groups_in_turn(length, groups), strength.expand(groups, -1)


def _sink(plan: Generator, groups: int, length: int, density: float) -> KeyPlan:
    """Scattered keys, and the first key above them for all queries."""
    group, strength = _scattered_keys(plan, groups, length, density)
    strength[:, :1] = 1 + SINK_SCORE / TOPIC_SCORE
    return group, strength


def _one_key_in_every_tile(plan: Generator, groups: int, length: int) -> KeyPlan:
    """For each group one key of each tile: the first one in the tile of its own queries, elsewhere any."""
    group = _groups_in_turn(length, groups)
    tile = torch.arange(len(group))
    first = KEY_TILE * tile.unsqueeze(-1)
    place = torch.randint(KEY_TILE, (len(group), groups), generator=plan) % (length - first)
    place[tile, group] = 0
    return group, torch.zeros(groups, length).scatter_(1, (first + place).mT, 1.0)


def _all_keys_of_one_tile(plan: Generator, groups: int, length: int) -> KeyPlan:
    """Each group has a tile of keys, the first group the first tile. Queries are of a group whose tile they see."""
    tile = torch.arange(-(-length // KEY_TILE))
    own = torch.randint(max(1, len(tile)), (groups,), generator=plan)
    own[0] = 0
    seen = own <= tile.unsqueeze(-1)
    group = torch.rand(len(tile), groups, generator=plan).masked_fill(~seen, -1.0).argmax(-1)
    return group, (torch.arange(length) // KEY_TILE == own.unsqueeze(-1)).float()


PATTERNS_WITH_DENSITY: dict[str, Callable[[Generator, int, int, float], KeyPlan]] = {
    "scattered keys": _scattered_keys,
    "stripes": _stripes,
    "sink": _sink,
}
PATTERNS_BY_TILE: dict[str, Callable[[Generator, int, int], KeyPlan]] = {
    "one key in every tile": _one_key_in_every_tile,
    "all keys of one tile": _all_keys_of_one_tile,
}
KEY_PATTERNS = (*PATTERNS_WITH_DENSITY, *PATTERNS_BY_TILE)


def _key_plan_of(
    pattern: str, density: float | None, plan: Generator, groups: int, length: int
) -> Callable[[], KeyPlan]:
    """What draws one plan after another of a pattern."""
    if pattern in PATTERNS_WITH_DENSITY:
        return partial(PATTERNS_WITH_DENSITY[pattern], plan, groups, length, 0.05 if density is None else density)
    if pattern not in PATTERNS_BY_TILE:
        raise ValueError(f"pattern must be one of {', '.join(map(repr, KEY_PATTERNS))}, got {pattern!r}")
    if density is not None:
        raise ValueError(f"density must be None with the pattern {pattern!r}, which has its own, got {density}")
    return partial(PATTERNS_BY_TILE[pattern], plan, groups, length)


def key_sparse_inputs(
    pattern: str,
    batch: int,
    heads: int,
    length: int,
    dim: int,
    *,
    density: float | None = None,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of which 64 queries attend together to few keys, at the default scale, causal or not.

    `pattern` is one of KEY_PATTERNS. Keys to which a tile of 64 queries attends lie

    - "scattered keys": anywhere; they are the share `density` (0.05 if None) of all keys. Nearly all tiles are live.
    - "stripes": anywhere, but the same for all queries; they are the share `density`.
    - "sink": anywhere, as scattered keys, and every single query attends to the first key.
    - "one key in every tile": one in each tile of keys that the queries see. All tiles are live.
    - "all keys of one tile": all in one tile, which is the only one that is live.

    Each tile of queries is of one of at most GROUPS groups, which have orthonormal directions. A query is
    c * direction + noise. A key is c * (the directions of the groups that attend to it) + noise. Noise is orthogonal to
    the directions, and c^2 / sqrt(dim) = 30. Scores are 30 + N(0, 0.4^2) at a key of the group, and N(0, 0.4^2) at
    others. A query attends to some of the keys of its group. The queries of a tile attend to nearly all of them, up to
    some 2,000. With a head size of 1 there is no noise, and each query attends to all. Each query sees a key of its
    group in a causal call. All query heads of a key head have its groups.
    """
    key_heads = heads if key_heads is None else key_heads
    groups = min(GROUPS, max(1, dim // 2))
    plan = Generator().manual_seed(seed)
    directions = _orthonormal(plan, dim, groups).to(device)
    make = _key_plan_of(pattern, density, plan, groups, length)
    plans = (make() for _ in range(batch * key_heads))
    group, strength = (
        torch.stack(parts).unflatten(0, (batch, key_heads)).to(device) for parts in zip(*plans, strict=True)
    )
    group = group.repeat_interleave(KEY_TILE, dim=-1)[..., :length]

    generator = Generator(device=device).manual_seed(seed + 1)
    normal = partial(torch.randn, generator=generator, dtype=torch.float32, device=device)

    def noise(count: int) -> Tensor:
        white = normal(batch, count, length, dim) * KEY_DEVIATION**0.5
        return white - (white @ directions.mT) @ directions

    centre = (TOPIC_SCORE * dim**0.5) ** 0.5
    query = (centre * directions[group]).repeat_interleave(heads // key_heads, dim=1) + noise(heads)
    is_sink = strength.amax(-2).unsqueeze(-1) > 1  # has no noise, so that no query misses it
    key = centre * (strength.mT @ directions) + noise(key_heads).masked_fill(is_sink, 0.0)
    return query.to(dtype), key.to(dtype), normal(batch, key_heads, length, dim).to(dtype)


def iid_inputs(
    batch: int,
    heads: int,
    query_length: int,
    dim: int,
    *,
    key_length: int | None = None,
    key_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with independent N(0, 1) entries, (batch, heads, length, dim) each."""
    key_length = query_length if key_length is None else key_length
    key_heads = heads if key_heads is None else key_heads
    value_dim = dim if value_dim is None else value_dim
    generator = Generator(device=device).manual_seed(seed)
    shapes = (heads, query_length, dim), (key_heads, key_length, dim), (key_heads, key_length, value_dim)
    normal = partial(torch.randn, batch, generator=generator, dtype=torch.float32, device=device)
    query, key, value = (normal(*shape).to(dtype) for shape in shapes)
    return query, key, value


def decoding_inputs(
    batch: int,
    heads: int,
    key_length: int,
    dim: int,
    *,
    queries: int = 1,
    key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Few queries of which each attends to 10 to 400 of many keys, for alpha = 1.5 and the default scale 1 / sqrt(dim).

    Queries of a key head are orthogonal, of one length. Each draws its number of keys, n, log-uniformly, and these keys
    anywhere. Their scores are 15 - 2 sqrt(3 / n) uniform(0, 1), so that all of them are just in the support. Each key
    has one query at most. Scores of other keys are around 0, with a deviation below 1. In 16 bits some keys leave.
    """
    key_heads = heads if key_heads is None else key_heads
    rows = heads // key_heads * queries
    generator = Generator(device=device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float32, device=device)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float32, device=device)
    directions = torch.linalg.qr(normal(batch, key_heads, dim, rows)).Q.mT
    count = (10 * 40 ** uniform(batch, key_heads, rows, 1)).clamp_max(key_length // rows)
    order = uniform(batch, key_heads, 1, key_length).argsort(-1).argsort(-1)
    place = order - key_length // rows * torch.arange(rows, device=device).unsqueeze(-1)
    spread = 2 * (3 / count).sqrt() * uniform(batch, key_heads, rows, key_length)
    planted = torch.where((place >= 0) & (place < count), 15 - spread, 0.0)
    length = (15 * dim**0.5) ** 0.5
    noise = SCORE_DEVIATION * normal(batch, key_heads, key_length, dim)
    is_planted = planted.amax(-2).unsqueeze(-1) > 0
    noise = torch.where(is_planted, noise - (noise @ directions.mT) @ directions, noise)
    key = noise + planted.mT @ directions * (dim**0.5 / length)
    query = (length * directions).reshape(batch, heads, queries, dim)
    return query.to(dtype), key.to(dtype), normal(batch, key_heads, key_length, dim).to(dtype)


def _gaussian(rows: int, length: int, generator: Generator, deviation: float = 1.0) -> Tensor:
    return deviation * torch.randn(rows, length, generator=generator, dtype=torch.float64)


def _uniform(rows: int, length: int, generator: Generator) -> Tensor:
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


def _one_over_a_crowd(rows: int, length: int, generator: Generator) -> Tensor:
    z = torch.full((rows, length), -0.97, dtype=torch.float64)
    winner = torch.randint(length, (rows, 1), generator=generator)
    return z.scatter(-1, winner, 0.0)


def _exponential_with_sink(rows: int, length: int, generator: Generator) -> Tensor:
    z = _uniform(rows, length, generator).clamp_min(1e-12).log()
    z[:, 0] = 0.5
    return z


DISTRIBUTIONS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "all equal": lambda rows, length, _: torch.zeros(rows, length, dtype=torch.float64),
    "nearly equal": partial(_gaussian, deviation=1e-4),
    "one maximum over a crowd": _one_over_a_crowd,
    "very peaked": partial(_gaussian, deviation=30.0),
    "heavy ties": lambda *size: -(4 * _uniform(*size)).floor() / 4,
    "exponential tail with a sink": _exponential_with_sink,
    "gaussian 0.1": partial(_gaussian, deviation=0.1),
    "gaussian 1": _gaussian,
    "gaussian 3": partial(_gaussian, deviation=3.0),
    "uniform on [-3, 0]": lambda *size: -3 * _uniform(*size),
    "around 1000": lambda *size: 1000 + _gaussian(*size),
    "all below -1000": lambda *size: -1000 - _gaussian(*size).abs(),
}


def score_rows(
    distribution: str,
    length: int,
    rows: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """(rows, length) of z = (alpha - 1) * score from one of the named DISTRIBUTIONS."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))}, got {distribution!r}")
    return DISTRIBUTIONS[distribution](rows, length, Generator().manual_seed(seed)).to(device, dtype)


def inputs_with_scores(z: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Query (1, 1, rows, rows), key (1, 1, keys, rows) and scale that make attention see exactly the rows of z.

    Query i is the i-th unit vector and key j is 2 z[:, j], so that query . key has a single term that is not zero. The
    scale 0.5 / (alpha - 1) makes z_scale = (alpha - 1) * scale = 1/2. No operation rounds, in any float dtype.
    """
    query = torch.eye(z.shape[0], dtype=z.dtype, device=z.device)
    return query[None, None], 2 * z.mT[None, None], 0.5 / (alpha - 1.0)


def relative_error(actual: Tensor, expected: Tensor, magnitude: float | None = None) -> float:
    """max |actual - expected| / max |expected|, in float64. A `magnitude` that is given replaces the denominator."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} differs from the expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    expected = expected.double()
    error = (actual.double() - expected).abs().max().item()
    magnitude = expected.abs().max().item() if magnitude is None else magnitude
    return error / magnitude if magnitude else error


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    dense: Tensor,
    *,
    name: str = "result",
    magnitude: float | None = None,
    floor: float | None = None,
) -> None:
    """Assert that the error against float64 is at most twice that of dense PyTorch in the same dtype, plus a floor.

    `magnitude` is the size of the terms whose sum is the result. It matters if they cancel, as in a gradient of zero.
    """
    size = max(exact.abs().max().item(), magnitude or 0.0) if exact.numel() else 0.0
    floor = FLOOR[actual.dtype] if floor is None else floor
    error = relative_error(actual, exact, size)
    allowed = 2 * relative_error(dense, exact, size) + floor
    if not error <= allowed:
        raise AssertionError(f"{name}: relative error {error:.3g} is above {allowed:.3g} (2 x dense + {floor:.3g})")


@contextmanager
def poisoned() -> Iterator[None]:
    """While active, every torch.empty (new_empty, empty_like, empty_strided) holds NaN, or the largest integer.

    PyTorch fills uninitialised memory so in its deterministic mode, on CPU and CUDA alike. Operations without a
    deterministic form only warn. As far as possible nothing but the memory differs from a plain call.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # whose attributes are those of a module's properties
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
