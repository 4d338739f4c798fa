"""The checks that every implementation must pass, as plain functions.

test_attention applies them; test_mutations breaks the code and expects them to fail. `impl` is "torch" or "triton"; the
exact answer is the reference in float64.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_entmax import entmax_attention, ops, reference
from flash_entmax.problem import Problem, Support, unpack_tiles
from flash_entmax.testing import (
    DISTRIBUTIONS,
    FLOOR,
    assert_within_budget,
    iid_inputs,
    inputs_with_scores,
    score_rows,
    topic_inputs,
)

GRADIENTS = ("grad_query", "grad_key", "grad_value")


@dataclass
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: float = 1.5
    is_causal: bool = False
    scale: float | None = None
    seed: int = 0
    scores_are_exact: bool = False

    @property
    def problem(self) -> Problem:
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return Problem.of(self.query, self.key, self.value, self.alpha, self.is_causal, scale)

    def in_float64(self) -> "Case":
        return replace(self, query=self.query.double(), key=self.key.double(), value=self.value.double())

    def grad_output(self) -> Tensor:
        problem = self.problem
        shape = problem.batch, problem.heads, problem.query_length, problem.value_size
        generator = torch.Generator().manual_seed(self.seed + 7)
        return torch.randn(shape, generator=generator).to(self.query.device, self.query.dtype)


@dataclass
class Result:
    output: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    support: Support | None = None


def run(case: Case, impl: str, grad_output: Tensor) -> Result:
    """Forward and backward through the public call, on leaves that keep the strides of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output, support = entmax_attention(
        *leaves, alpha=case.alpha, is_causal=case.is_causal, scale=case.scale, impl=impl, return_support=True
    )
    return Result(output.detach(), torch.autograd.grad(output, leaves, grad_output), support)


def run_dense(case: Case, grad_output: Tensor) -> Result:
    """Entmax attention as plain PyTorch computes it in the inputs' dtype: products in it, the rows in float32.

    Scores are not rounded to 16 bits, since no implementation here does so; probabilities and gradients are.
    """
    problem, dtype = case.problem, case.query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    key, value = (tensor.repeat_interleave(problem.group, dim=1) for tensor in leaves[1:])
    z = problem.slope * (leaves[0].to(wide) @ key.to(wide).mT)
    z = z.masked_fill(~reference.visible_mask(problem, z.device), -torch.inf)
    output = reference.entmax_rows(z, case.alpha)[0].to(dtype) @ value
    return Result(output.detach(), torch.autograd.grad(output, leaves, grad_output))


def distances(case: Case, support: Support) -> tuple[Tensor, Tensor]:
    """z - tau of every pair in float64 (-inf where hidden), and how far float32 rounding may move each row's.

    A float32 dot product is off by some 2^-24 of the sum of its terms' absolute values, if any operation of it rounds;
    the offset is off by a few 2^-24.
    """
    exact = case.in_float64()
    problem = exact.problem
    key = exact.key.repeat_interleave(problem.group, dim=1)
    visible = reference.visible_mask(problem, key.device)
    z = (problem.slope * (exact.query @ key.mT)).masked_fill(~visible, -torch.inf)
    terms = problem.slope * (exact.query.abs() @ key.abs().mT)
    largest = terms.masked_fill(~visible, 0.0).amax(-1, keepdim=True)
    slack = 2e-6 * (torch.ones_like(largest) if case.scores_are_exact else largest.clamp_min(1.0))
    return z - support.maximum.double().unsqueeze(-1) + support.offset.double().unsqueeze(-1), slack


def any_in_tiles(marks: Tensor, tile_shape: tuple[int, int]) -> Tensor:
    """(..., rows, keys) bool -> (..., row tiles, key tiles) bool."""
    rows, keys = tile_shape
    padded = torch.nn.functional.pad(marks, (0, -marks.shape[-1] % keys, 0, -marks.shape[-2] % rows))
    return padded.unflatten(-1, (-1, keys)).unflatten(-3, (-1, rows)).any(-1).any(-2)


def check_support(case: Case, support: Support, exact: Support) -> None:
    """Sizes and tiles are the reference's, but for keys so close to tau that float32 cannot tell their side."""
    distance, slack = distances(case, exact)
    surely, possibly = distance > slack, distance > -slack
    size = support.size.long()
    assert support.size.dtype == torch.int32
    assert (surely.sum(-1) <= size).all(), "a row's support lacks a key that is in it"
    assert (size <= possibly.sum(-1)).all(), "a row's support has a key that is not in it"
    assert support.tiles.dtype == torch.bool
    assert not (any_in_tiles(surely, support.tile_shape) & ~support.tiles).any(), "a tile that holds support is missing"
    assert not (support.tiles & ~any_in_tiles(possibly, support.tile_shape)).any(), "a tile without support is marked"
    has_key = exact.maximum < torch.inf
    assert torch.equal(support.maximum < torch.inf, has_key)
    tau, exact_tau = (s.maximum.double() - s.offset.double() for s in (support, exact))
    tau_error = (tau - exact_tau)[has_key].abs()
    assert (tau_error <= slack.squeeze(-1)[has_key]).all(), "tau differs from the reference's"


def settled_grad_output(case: Case, exact: Support) -> Tensor:
    """A random gradient, 0 on rows where some key is so close to tau that the gradient itself is not determined.

    u = d^(1 / (alpha - 1) - 1) jumps at d = 0 for alpha = 2, and its slope there is infinite from alpha = 1.5 on.
    """
    grad_output = case.grad_output()
    if case.alpha <= 1.5:
        return grad_output
    distance, slack = distances(case, exact)
    settled = (distance.abs() > 4 * slack).all(-1, keepdim=True)
    assert settled.numel() < 100 or settled.float().mean() > 0.3, "too few rows are left to check the gradient on"
    return grad_output * settled


def magnitudes(case: Case, grad_output: Tensor, exact: Support) -> dict[str, float]:
    """The size of the terms that output and gradients add up; dS = u (dP - delta) may cancel to far less.

    A rounding of delta reaches dQ times sum u of its row.
    """
    if 0 in (grad_output.numel(), case.value.numel()):
        return {}
    scale = case.problem.scale
    size = {name: getattr(case, name).detach().double().abs().amax().item() for name in ("query", "key", "value")}
    value_norm = case.value.double().norm(dim=-1).amax()
    u = distances(case, exact)[0].clamp_min(0)
    weight = torch.where(u > 0, u ** (1 / (case.alpha - 1) - 1), 0.0).sum(-1).amax().clamp_min(1).item()
    products = (grad_output.double().norm(dim=-1).amax() * value_norm).item()
    return {
        "output": size["value"],
        "grad_query": scale * products * size["key"] * weight,
        "grad_key": scale * products * size["query"],
        "grad_value": grad_output.double().abs().amax().item(),
    }


def check_attention(case: Case, impl: str, more: float = 0.0) -> Result:
    """Output, gradients and support against the float64 reference; returns what the implementation gave.

    `more` is added to the floor of a few roundings that every result is allowed.
    """
    problem = case.problem
    exact_case = case.in_float64()
    _, exact_support = entmax_attention(
        exact_case.query,
        exact_case.key,
        exact_case.value,
        alpha=case.alpha,
        is_causal=case.is_causal,
        scale=problem.scale,
        impl="reference",
        return_support=True,
    )
    grad_output = settled_grad_output(case, exact_support)
    exact = run(exact_case, "reference", grad_output.double())
    dense = run_dense(case, grad_output)
    result = run(case, impl, grad_output)

    assert result.output.dtype == case.query.dtype
    assert result.output.is_contiguous()
    sizes = magnitudes(case, grad_output, exact_support)
    names = ("output", *GRADIENTS)
    floor = FLOOR[case.query.dtype] + more
    for name, actual, expected, plain in zip(names, *(flat(r) for r in (result, exact, dense)), strict=True):
        assert_within_budget(actual, expected, plain, name=name, magnitude=sizes.get(name), floor=floor)
    check_support(case, result.support, exact_support)
    check_live_map(case, impl, exact_support)
    return result


def score_rounding(case: Case) -> float:
    """One rounding, in the dtype of the scores, of the largest |query| |key| in units of z.

    Two ways to add a score differ by about as much, and a distance, and so a probability, moves with it. Sums in dense
    PyTorch may happen to be better.
    """
    lengths = (tensor.detach().double().norm(dim=-1).amax().item() for tensor in (case.query, case.key))
    score_dtype = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    return torch.finfo(score_dtype).eps / 2 * case.problem.slope * math.prod(lengths)


def flat(result: Result) -> tuple[Tensor, ...]:
    return result.output, *result.gradients


def live_map(case: Case, impl: str) -> tuple[Tensor, int]:
    """The tiles that the operator kept, (batch, heads, query tiles, key tiles) bool, and the extent of a tile."""
    problem = case.problem
    tensors = case.query.detach(), case.key.detach(), case.value.detach()
    *_, words = ops.attention(*tensors, problem.alpha, problem.is_causal, problem.scale, impl)
    extent = ops.tile(impl, case.query)
    assert words.shape == problem.live_shape(extent)
    return unpack_tiles(words, -(-problem.key_length // extent)), extent


def check_live_map(case: Case, impl: str, exact: Support) -> Tensor:
    """No tile with support was dropped."""
    live, extent = live_map(case, impl)
    distance, slack = distances(case, exact)
    lost = any_in_tiles(distance > slack, (extent, extent)) & ~live
    assert not lost.any(), f"{int(lost.sum())} tiles that hold support are not in the live map"
    return live


def row_sums(z: Tensor, maximum: Tensor, offset: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """sum p in float64 by the given threshold, and the error that is allowed: 1e-5, and the last bit of the offset.

    F moves by r sum u for each unit that the offset moves. For a crowd of keys just above tau that is hundreds, so the
    float32 nearest to the true offset may miss 1 by more than 1e-5; the output, which divides by the sum, may not.
    """
    r = 1 / (alpha - 1)
    distance = (z.double() - maximum.double().unsqueeze(-1) + offset.double().unsqueeze(-1)).clamp_min(0)
    weight = torch.where(distance > 0, distance ** (r - 1), 0.0).sum(-1)
    last_bit = torch.finfo(offset.dtype).eps * offset.double()
    return (distance**r).sum(-1), 1e-5 + r * weight * last_bit


def check_row_sums(z: Tensor, alpha: float, impl: str, is_causal: bool = False) -> None:
    """Rows of z sum to 1: by the returned threshold in float64, and by what the output does to a value of ones."""
    query, key, scale = inputs_with_scores(z, alpha)
    value = torch.ones(*key.shape[:3], 1, dtype=z.dtype, device=z.device)
    output, support = entmax_attention(
        query, key, value, alpha=alpha, is_causal=is_causal, scale=scale, impl=impl, return_support=True
    )
    if is_causal:
        hidden = torch.ones_like(z, dtype=torch.bool).triu(z.shape[1] - z.shape[0] + 1)
        z = z.masked_fill(hidden, -torch.inf)
    total, allowed = row_sums(z, support.maximum[0, 0], support.offset[0, 0], alpha)
    excess = (total - 1).abs()
    assert (excess <= allowed).all(), f"sum p - 1 = {excess.max().item():.3g} by the returned threshold"
    assert z.dtype in (torch.float32, torch.float64)
    excess = (output[0, 0, :, 0].double() - 1).abs()
    assert (excess <= 1e-5).all(), f"sum p - 1 = {excess.max().item():.3g} in the output"


def check_causal_alignment(queries: int, keys: int, impl: str, device: str) -> None:
    """Query i sees keys 0 .. i + keys - queries: with equal scores and one-hot values the output shows which."""
    query, key = (torch.zeros(1, 1, n, 4, device=device) for n in (queries, keys))
    value = torch.eye(keys, device=device)[None, None, :, :256]
    output = entmax_attention(query, key, value, is_causal=True, impl=impl)[0, 0].cpu()
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert torch.equal(output > 0, seen), "another mask than the one aligned to the lower right"
    expected = seen / seen.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def positive_case(device: str, **options) -> Case:
    """Query and key above 0, so that an infinite entry of one makes every score of it infinite, never NaN."""
    query, key, value = iid_inputs(1, 2, 80, 16, key_heads=1, device=device, seed=5)
    return Case(query.abs() + 0.1, key.abs() + 0.1, value, **options)


def assert_unchanged(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def check_spoiled(case: Case, clean: Tensor, expected: Tensor, impl: str) -> None:
    """The expected rows are NaN throughout, the others what they were, to rounding: the bracket may start elsewhere."""
    output = entmax_attention(case.query, case.key, case.value, alpha=case.alpha, is_causal=case.is_causal, impl=impl)[
        0
    ]
    spoiled = output.isnan().all(-1)
    assert torch.equal(output.isnan().any(-1), spoiled), "a row is NaN in some columns only"
    assert torch.equal(spoiled, expected), "other rows than the expected ones are NaN"
    assert_unchanged(output[~expected], clean[0][~expected])


def check_bad_query(bad: float, alpha: float, is_causal: bool, impl: str, device: str) -> None:
    case = positive_case(device, alpha=alpha, is_causal=is_causal)
    clean = entmax_attention(case.query, case.key, case.value, alpha=alpha, is_causal=is_causal, impl=impl)
    case.query[0, 1, 50, 3] = bad
    expected = torch.zeros(2, 80, dtype=torch.bool, device=device)
    expected[1, 50] = True
    check_spoiled(case, clean, expected, impl)


def check_bad_key(bad: float, alpha: float, is_causal: bool, impl: str, device: str) -> None:
    case = positive_case(device, alpha=alpha, is_causal=is_causal)
    clean = entmax_attention(case.query, case.key, case.value, alpha=alpha, is_causal=is_causal, impl=impl)
    case.key[0, 0, 50, 3] = bad
    expected = torch.ones(2, 80, dtype=torch.bool, device=device)
    expected[:, : 50 * is_causal] = False
    check_spoiled(case, clean, expected, impl)


def check_everything(impl: str, device: str) -> None:
    """One small input for each way to be wrong; about 100 tiles, so that the interpreter can afford it."""
    for alpha in (1.5, 2.0, 1.3):
        inputs = iid_inputs(1, 2, 70, 16, key_length=130, key_heads=1, value_dim=8, device=device)
        check_attention(Case(*inputs, alpha=alpha, is_causal=True), impl)
        inputs = iid_inputs(2, 2, 40, 5, device=device)
        check_attention(Case(*inputs, alpha=alpha, scale=1.0), impl)
    inputs = topic_inputs(1, 1, 192, 16, 2, device=device)
    check_attention(Case(*inputs), impl)
    z = score_rows("around 1000", 130, rows=8, dtype=torch.float32, device=device)
    query, key, scale = inputs_with_scores(z, 1.5)
    value = iid_inputs(1, 1, 130, 8, device=device)[2]
    check_attention(Case(query, key, value, scale=scale, scores_are_exact=True), impl)
    rows = [score_rows(name, 150, dtype=torch.float32, device=device) for name in DISTRIBUTIONS]
    for alpha in (1.5, 2.0, 1.3):
        check_row_sums(torch.cat(rows), alpha, impl)
    check_causal_alignment(70, 100, impl, device)
    check_causal_alignment(100, 70, impl, device)
    check_bad_query(torch.nan, 1.5, False, impl, device)
    check_bad_key(torch.nan, 1.5, True, impl, device)
