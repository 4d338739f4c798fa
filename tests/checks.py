"""The checks that every implementation must pass, as plain functions.

test_attention applies them; test_mutations breaks the code and expects them to fail. `impl` is "torch" or "triton"; the
exact answer is the reference in float64.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from unittest import mock

import torch
from cases import Case, Result, Step, attend, names, run, run_dense
from torch import Tensor

from flash_entmax import entmax_attention
from flash_entmax.backends import BACKENDS, reference
from flash_entmax.core.call import Support
from flash_entmax.operators import attention as ops
from flash_entmax.testing import (
    DISTRIBUTIONS,
    FLOOR,
    assert_within_budget,
    iid_inputs,
    inputs_with_scores,
    score_rows,
    topic_inputs,
)


def by_head(number: float | Tensor) -> Tensor:
    """(1 or heads, 1, 1) in float64."""
    return torch.as_tensor(number, dtype=torch.float64).detach().view(-1, 1, 1)


class Pairs:
    """Every pair of a query and a key of a case in float64, (batch, heads, query length, key length).

    z: its score; terms: the sum of the absolute values that z adds, 0 where hidden; visible: whether the query sees the
    key; apart: how far it stands from the query's position.
    """

    def __init__(self, case: Case, exact: Support | None = None) -> None:
        """`exact` is the reference's support, by which distances are taken."""
        self.case, self.exact = case, exact
        case = case.in_float64()
        query, key, _ = (tensor.detach() for tensor in case.inputs)
        key = key.repeat_interleave(case.problem.group, dim=1)
        self.alpha, self.scale = (by_head(number).to(key.device) for number in case.numbers)
        visible, self.apart = reference.visible_mask(case.problem, case.visibility, key.device)
        scores, terms = self.scale * (query @ key.mT), self.scale * (query.abs() @ key.abs().mT)
        if softcap := case.score.softcap:
            scores, terms = softcap * torch.tanh(scores / softcap), terms + softcap
        if case.slopes is not None:
            bias = reference.alibi(case.slopes.detach(), self.apart)
            scores, terms, visible = scores - bias, terms + bias.abs(), visible & (bias < torch.inf)
        self.visible = visible.expand_as(scores)
        self.z, self.terms = (self.alpha - 1) * scores, (self.alpha - 1) * terms.masked_fill(~self.visible, 0.0)

    @cached_property
    def distance(self) -> Tensor:
        """z - tau; -inf where hidden."""
        z = self.z.masked_fill(~self.visible, -torch.inf)
        return z - self.exact.maximum.double().unsqueeze(-1) + self.exact.offset.double().unsqueeze(-1)

    @cached_property
    def slack(self) -> Tensor:
        """How far float32 rounding may move z - tau.

        A score is off by parts of the sum of its terms' absolute values, if any operation of it rounds: by some 2^-24
        for a few operations, and by 2^-24 for each 16 terms that matrix units add, since those cut off, always towards
        0, what float32 does not hold; by 2e-6 at most, however many they are. tau is off by as much as the keys that
        may be in the support, and by a few 2^-24.
        """
        terms = torch.zeros_like(self.terms) if self.case.scores_are_exact else self.terms
        slack = (min(1e-6 + self.case.query.shape[-1] / 16 * 2**-24, 2e-6) * terms).clamp_min(2e-6)
        slack = slack.masked_fill(self.distance == -torch.inf, 2e-6)  # no rounding brings a hidden key near
        return torch.maximum(slack, self.largest_slack(slack).unsqueeze(-1))

    def largest_slack(self, slack: Tensor) -> Tensor:
        """(batch, heads, query length), of a key that may be in the support."""
        return torch.nn.functional.pad(torch.where(self.distance > -slack, slack, 2e-6), (0, 1), value=2e-6).amax(-1)

    @cached_property
    def surely(self) -> Tensor:
        """In the support."""
        return self.distance > self.slack

    @cached_property
    def possibly(self) -> Tensor:
        """In the support, by what float32 can tell."""
        return self.distance > -self.slack


def any_in_tiles(marks: Tensor, tile_shape: tuple[int, int]) -> Tensor:
    """(..., rows, keys) bool -> (..., row tiles, key tiles) bool."""
    rows, keys = tile_shape
    padded = torch.nn.functional.pad(marks, (0, -marks.shape[-1] % keys, 0, -marks.shape[-2] % rows))
    return padded.unflatten(-1, (-1, keys)).unflatten(-3, (-1, rows)).any(-1).any(-2)


def check_support(pairs: Pairs, support: Support) -> None:
    """Sizes and tiles are the reference's, but for keys so close to tau that float32 cannot tell their side."""
    surely, possibly, exact = pairs.surely, pairs.possibly, pairs.exact
    size = support.size.long()
    assert support.size.dtype == torch.int32
    assert (surely.sum(-1) <= size).all(), "a row's support lacks a key that is in it"
    assert (size <= possibly.sum(-1)).all(), "a row's support has a key that is not in it"
    assert support.tiles.dtype == torch.bool
    assert not (any_in_tiles(surely, support.tile_shape) & ~support.tiles).any(), "a tile that holds support is missing"
    assert not (support.tiles & ~any_in_tiles(possibly, support.tile_shape)).any(), "a tile without support is marked"
    for counted in (support, exact):
        one_key = counted.tile_shape[0], 1
        fewest, most = (any_in_tiles(marks, one_key).sum(-1) for marks in (surely, possibly))
        assert counted.keys.dtype == torch.int32
        assert (fewest <= counted.keys).all(), "a key that a query of the tile attends to is not counted"
        assert (counted.keys <= most).all(), "a key is counted twice, or without a query that attends to it"
    has_key = exact.maximum < torch.inf
    assert torch.equal(support.maximum < torch.inf, has_key)
    tau, exact_tau = (s.maximum.double() - s.offset.double() for s in (support, exact))
    tau_error = (tau - exact_tau)[has_key].abs()
    assert (tau_error <= pairs.largest_slack(pairs.slack)[has_key]).all(), "tau differs from the reference's"


def settled_grad_output(pairs: Pairs) -> Tensor:
    """A random gradient, 0 on rows where some key is so close to tau that the gradient itself is not determined.

    u = d^(1 / (alpha - 1) - 1) jumps at d = 0 for alpha = 2, and its slope there is infinite from alpha = 1.5 on.
    """
    grad_output = pairs.case.grad_output()
    if (pairs.alpha <= 1.5).all():
        return grad_output
    settled = ((pairs.distance.abs() > 4 * pairs.slack) | (pairs.alpha <= 1.5)).all(-1, keepdim=True)
    assert settled.numel() < 100 or settled.float().mean() > 0.3, "too few rows are left to check the gradient on"
    return grad_output * pairs.case.as_given(settled)


def magnitudes(pairs: Pairs, grad_output: Tensor) -> dict[str, float]:
    """The size of the terms that output and gradients add up; dS = u (dP - delta) may cancel to far less.

    A rounding of delta reaches dQ times sum u of its row.
    """
    case, distance = pairs.case, pairs.distance
    if 0 in (grad_output.numel(), case.value.numel()):
        return {}
    size = {name: getattr(case, name).detach().double().abs().amax().item() for name in ("query", "key", "value")}
    u = torch.where(distance > 0, distance.clamp_min(0) ** (1 / (pairs.alpha - 1) - 1), 0.0)
    weight = u.sum(-1).amax().clamp_min(1).item()
    products = case.batched(grad_output).double().norm(dim=-1) * case.value.detach().double().norm(dim=-1).amax()
    largest = pairs.scale.amax().item() * products.amax().item()
    return {
        "output": size["value"],
        "grad_query": largest * size["key"] * weight,
        "grad_key": largest * size["query"],
        "grad_value": grad_output.double().abs().amax().item(),
        **parameter_magnitudes(pairs, products, u),
    }


def parameter_magnitudes(pairs: Pairs, products: Tensor, u: Tensor) -> dict[str, float]:
    """The gradient of a parameter is a sum over rows, whose errors are independent, by `products` |dO| |v| of each.

    That of alpha adds (p - w) / (alpha - 1)^2 and entropies / (alpha - 1): see docs/math.md.
    """
    sharpness, entropy = 1 / (pairs.alpha.squeeze(-1) - 1), math.log(1 + pairs.case.problem.key_length)
    scores = pairs.terms / ((pairs.alpha - 1) * pairs.scale)
    score, distance = (torch.where(u > 0, numbers, 0.0).amax(-1) for numbers in (scores, pairs.apart))
    by_rows = {
        "grad_alpha": sharpness * (sharpness + entropy),
        "grad_scale": u.sum(-1) * score,
        "grad_alibi_slopes": u.sum(-1) * distance,
    }
    return {name: (products * numbers).norm().item() for name, numbers in by_rows.items()}


def check_attention(case: Case, impl: str, more: float = 0.0) -> Result:
    """Output, all gradients and support against the float64 reference; returns what the implementation gave.

    `more` is added to the floor of a few roundings that every result is allowed.
    """
    exact = Step(case.in_float64(), "reference")
    pairs = Pairs(case, exact.support)
    grad_output = settled_grad_output(pairs)
    exact = exact.backward(grad_output.double())
    dense = run_dense(case, grad_output)
    with recorded_words() as kept:
        result = run(case, impl, grad_output)

    assert result.output.dtype == case.query.dtype
    check_layout(case, result.output)
    sizes = magnitudes(pairs, grad_output)
    results = (result.tensors, exact.tensors, dense.tensors)
    for name, actual, expected, plain in zip(names(case), *results, strict=True):
        leaf = case.tensors.get(name.removeprefix("grad_"), case.query)
        assert actual.dtype == leaf.dtype, name
        floor = max(FLOOR[case.query.dtype], FLOOR[leaf.dtype]) + more
        assert_within_budget(actual, expected, plain, name=name, magnitude=sizes.get(name), floor=floor)
    check_support(pairs, result.support)
    check_live_words(pairs, impl, kept[0])
    return result


def check_layout(case: Case, output: Tensor) -> None:
    """The output is contiguous, in the order of the query's dimensions."""
    query = case.batched(case.query)
    rows_first = query.stride(1) < query.stride(2)
    output = case.batched(output)
    assert (output.transpose(1, 2) if rows_first else output).is_contiguous()


def score_rounding(case: Case) -> float:
    """How far rounding may move a probability where dense PyTorch happens to be exact, as at p = 1 of a single key.

    One rounding is that of the largest |query| |key|, or score with its bias, in units of z and in the dtype of the
    scores. Two ways to add a score differ by a few, and p = d^r with r = 1 / (alpha - 1) and d <= 1 moves r times as
    much.
    """
    if 0 in (case.query.numel(), case.key.numel()):
        return 0.0
    lengths = (tensor.detach().double().norm(dim=-1).amax().item() for tensor in (case.query, case.key))
    score_dtype = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    alpha, scale = (by_head(number) for number in case.numbers)
    largest = ((alpha - 1) * scale).amax().item() * math.prod(lengths)
    rounding = torch.finfo(score_dtype).eps / 2 * max(largest, Pairs(case).terms.amax().item())
    return 4 * rounding * (1 / (alpha - 1)).amax().item()


class AskedError(Exception):
    """The operator was called; nothing is computed."""


def operator_arguments(case: Case, impl: str) -> tuple:
    """What the public call gives to flash_entmax::attention."""
    with mock.patch.object(ops, "attention", side_effect=AskedError) as recorded, suppress(AskedError):
        attend(case, impl)
    return recorded.call_args_list[0].args


@contextmanager
def recorded_words() -> Iterator[list[Tensor]]:
    """What flash_entmax::attention returns of the keys that each tile of queries reaches."""
    operator, kept = ops.attention, []

    def recording(*arguments):
        results = operator(*arguments)
        kept.append(results[4])
        return results

    with mock.patch.object(ops, "attention", recording):
        yield kept


def check_live_map(case: Case, impl: str, exact: Support) -> Tensor:
    """No tile with support was dropped by the public call."""
    with torch.no_grad(), recorded_words() as kept:
        attend(case, impl, return_support=True)
    return check_live_words(Pairs(case, exact), impl, kept[0])


def check_live_words(pairs: Pairs, impl: str, words: Tensor) -> Tensor:
    """No tile with support was dropped; the tiles kept, (batch, heads, query tiles, key tiles) bool."""
    case = pairs.case
    tile = ops.tile_of(impl, case.query, case.value)
    live = BACKENDS[impl].reached_tiles(case.problem, case.query.dtype, words)
    lost = any_in_tiles(pairs.surely, (tile, tile)) & ~live
    assert not lost.any(), f"{int(lost.sum())} tiles that hold support are not reached"
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
    output = attend(case, impl)[0]
    spoiled = output.isnan().all(-1)
    assert torch.equal(output.isnan().any(-1), spoiled), "a row is NaN in some columns only"
    assert torch.equal(spoiled, expected), "other rows than the expected ones are NaN"
    assert_unchanged(output[~expected], clean[0][~expected])


def check_bad_query(bad: float, alpha: float, is_causal: bool, impl: str, device: str) -> None:
    case = positive_case(device, alpha=alpha, is_causal=is_causal)
    clean = attend(case, impl)
    case.query[0, 1, 50, 3] = bad
    expected = torch.zeros(2, 80, dtype=torch.bool, device=device)
    expected[1, 50] = True
    check_spoiled(case, clean, expected, impl)


def check_bad_key(bad: float, alpha: float, is_causal: bool, impl: str, device: str) -> None:
    case = positive_case(device, alpha=alpha, is_causal=is_causal)
    clean = attend(case, impl)
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
    check_options(impl, device)


def check_options(impl: str, device: str) -> None:
    """Masks, biases and learned numbers, each where leaving it out would show."""
    inputs = iid_inputs(1, 2, 40, 16, key_length=130, key_heads=1, device=device)
    pair = {name: torch.tensor(numbers, device=device) for name, numbers in PAIRS.items()}
    check_attention(Case(*inputs, **pair), impl)
    check_attention(Case(*inputs, alpha=pair["alpha"], options={"softcap": 1.0}, scale=1.0), impl)
    slopes = torch.tensor([0.1, -0.2], device=device)
    check_attention(Case(*inputs, options={"alibi_slopes": slopes, "window_size": (70, 20)}), impl)
    infinite = torch.tensor([torch.inf, 0.0], device=device)
    check_attention(Case(*inputs, options={"alibi_slopes": infinite}), impl)
    mask = torch.arange(130, device=device)[None] % 3 > 0
    lengths = torch.tensor([120], device=device)
    padding = {"key_mask": mask, "key_lengths": lengths, "query_positions": 90}
    check_attention(Case(*inputs, is_causal=True, options=padding), impl)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in inputs)
    cu_seq_q, cu_seq_k = (torch.tensor(edges, device=device) for edges in ((0, 10, 38), (0, 66, 128)))
    options = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k}
    check_attention(Case(query, key, value, is_causal=True, options=options), impl)


PAIRS = {"alpha": (1.4, 1.5), "scale": (0.3, 0.2)}
