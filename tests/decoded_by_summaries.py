"""Decoding calls with KeySummaries, and what they must give."""

from dataclasses import replace

import torch
from cases import Case, attend, make_case, run_dense
from torch import Tensor

from flash_entmax import KeySummaries
from flash_entmax.testing import assert_within_budget

COPIES = 0.02  # how far keys that are nearly one lie apart


def decode(case: Case, impl: str, summaries: KeySummaries) -> Tensor:
    with torch.no_grad():
        return attend(case, impl, key_summary=summaries)


def check(case: Case, impl: str, summaries: KeySummaries | None = None) -> Tensor:
    """The output against the float64 reference, with summaries of both kinds."""
    if summaries is None:
        summaries = KeySummaries.of(case.key, impl=impl)
        if impl == "triton":
            check(case, impl, KeySummaries.of(case.key, skips_blocks=True, impl=impl))
    actual = decode(case, impl, summaries)
    exact = attend(case.in_float64(), "reference")
    dense = run_dense(case, case.grad_output()).output
    assert_within_budget(actual, exact, dense, name="output", magnitude=case.value.double().abs().amax().item())
    return actual


def few_queries(backend, queries=2, keys=None, **options) -> Case:
    keys = backend.sizes(130, 300, 700) if keys is None else keys
    return make_case(backend, length=queries, key_length=keys, **{"value_dim": 8, "key_heads": 1, **options})


def near_ties(backend, dtype=torch.float32) -> Case:
    """Keys that are nearly one: their scores differ by less than 8 bits can say, and their probabilities by much."""
    case = few_queries(backend, keys=150, dtype=dtype, dim=32, scale=30.0)
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(1, 1, 1, 32, generator=generator)
    key = one + COPIES * torch.randn(1, 1, 150, 32, generator=generator)
    return replace(case, key=key.to(case.key))


def sparse(backend, dtype=torch.float32) -> tuple[Case, Tensor]:
    """Each query attends to few keys, far above all others; and which keys these are."""
    case = few_queries(backend, heads=4, key_heads=2, keys=200, dim=32, dtype=dtype)
    near = torch.zeros(200, dtype=torch.bool, device=backend.device)
    near[[3, 64, 130, 199]] = True
    case.query[..., 0], case.key[..., 0] = 8.0, torch.where(near, 8.0, -8.0).to(dtype)
    return case, near


def blocks_apart(backend) -> tuple[Case, Tensor]:
    """Blocks of similar keys, of which one is near all queries; and which keys are in it."""
    case = few_queries(backend, heads=4, key_heads=2, keys=256, dim=32)
    near = torch.arange(256, device=backend.device) // 64 == 2
    case.query[..., 0], case.key[..., 0] = 8.0, torch.where(near, 8.0, -8.0)
    return case, near


def blocks_side_by_side(backend) -> Case:
    """Two blocks of equal keys share the support. The z of the second is 0.1 below the maximum."""
    case = few_queries(backend, keys=256, dim=32)
    case.query[..., 0] = 8.0
    case.key.zero_()
    place = torch.arange(256, device=backend.device) // 64
    case.key[..., 0] = torch.where(place == 0, 8.0, torch.where(place == 1, 8.0 - 0.1 * 2 * 32**0.5 / 8, -8.0))
    return case


def support_in_a_wide_block(backend) -> Case:
    """The first block of keys has all the support, but its mean is far from the queries and from the other keys."""
    case = few_queries(backend, keys=192)
    case.query[..., 0] += 8.0
    case.key[..., 0] += 6.0
    case.key[:, :, :64, 0] = torch.tensor([16.0, -16.0], device=backend.device).repeat(32)
    return case


def keys_of_whole_numbers(backend) -> Case:
    """Keys that 8 bits hold: only the query is rounded."""
    case = few_queries(backend, 16, 300, dim=32, scale=0.02)
    generator = torch.Generator().manual_seed(1)
    key = torch.randint(-127, 128, case.key.shape, generator=generator)
    key[..., 0] = 127
    return replace(case, key=key.to(case.key))
