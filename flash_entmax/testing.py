"""What tests and benchmarks share: inputs with known properties, error budgets, poisoned memory.

In the package only the benchmarks import this file. It needs torch and nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Generator, Tensor

TOPIC_BLOCK = 64
TOPIC_SCORE = 30.0
SCORE_DEVIATION = 0.6
WIDE = 16.0

# A few roundings of the dtype, as a share of the largest number that enters the result.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


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
    directions = torch.linalg.qr(torch.randn(seen, topics, generator=plan, dtype=torch.float32)).Q.mT.contiguous()
    directions = torch.nn.functional.pad(directions, (0, dim - seen))
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
    "nearly equal": lambda *size: _gaussian(*size, deviation=1e-4),
    "one maximum over a crowd": _one_over_a_crowd,
    "very peaked": lambda *size: _gaussian(*size, deviation=30.0),
    "heavy ties": lambda *size: -(4 * _uniform(*size)).floor() / 4,
    "exponential tail with a sink": _exponential_with_sink,
    "gaussian 0.1": lambda *size: _gaussian(*size, deviation=0.1),
    "gaussian 1": _gaussian,
    "gaussian 3": lambda *size: _gaussian(*size, deviation=3.0),
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
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
