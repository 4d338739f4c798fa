"""The inputs of testing.key_sparse_inputs have the keys and tiles that they were made for."""

from functools import cache

import pytest
import torch
from cases import Case
from checks import any_in_tiles, check_attention

from flash_entmax.backends import reference
from flash_entmax.core.call import Support
from flash_entmax.testing import KEY_PATTERNS, PATTERNS_BY_TILE, PATTERNS_WITH_DENSITY, key_sparse_inputs, topic_inputs

LENGTH = 1000  # 16 tiles, the last of 40 tokens


@cache
def attended(pattern: str, is_causal: bool = True, length: int = LENGTH, dim: int = 64, **options):
    """(Support of the reference, probabilities of each query) of two heads."""
    case = Case(*key_sparse_inputs(pattern, 1, 2, length, dim, **options), is_causal=is_causal)
    unit = torch.eye(length).expand(1, 2, -1, -1)
    probability, support = reference.attention(case.problem, case.query, case.key, unit)
    return support, probability


def reached(probability: torch.Tensor) -> torch.Tensor:
    """(batch, heads, query tiles, keys) bool: a query of the tile attends to the key."""
    return any_in_tiles(probability > 0, (64, 1))


def density(support: Support, is_causal: bool) -> float:
    """Of the keys that a tile of queries sees, the share to which one of its queries attends."""
    length, tiles = support.size.shape[-1], support.keys.shape[-1]
    seen = (torch.arange(1, tiles + 1) * 64).clamp_max(length) if is_causal else torch.full((tiles,), length)
    return (support.keys.double().sum() / (seen.sum() * support.keys[..., 0].numel())).item()


def live_tiles(support: Support, is_causal: bool) -> float:
    tiles = support.tiles.double().mean((0, 1))
    count = torch.ones_like(tiles).tril().sum() if is_causal else tiles.numel()
    return (tiles.sum() / count).item()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.1])
@pytest.mark.parametrize("pattern", PATTERNS_WITH_DENSITY)
def test_patterns_have_the_density_that_is_asked_for(pattern, share, is_causal):
    """Of tiles of 64 keys 1 - (1 - density)^64 hold a key that is reached."""
    support, _ = attended(pattern, is_causal, density=share)
    assert density(support, is_causal) == pytest.approx(share, rel=0.2)
    assert live_tiles(support, is_causal) == pytest.approx(1 - (1 - share) ** 64, abs=0.12)


def test_a_query_attends_to_a_part_of_the_keys_of_its_tile():
    support, _ = attended("scattered keys", density=0.1)
    assert support.size[:, :, 512:960].double().mean() < 0.6 * support.keys[:, :, 8:15].double().mean()


def test_scattered_keys_differ_from_tile_to_tile():
    keys = reached(attended("scattered keys")[1])
    one, another = keys[0, 0, -2], keys[0, 0, -3]
    assert (one & another).sum() < 0.5 * one.sum()


def test_stripes_are_the_same_keys_for_all_queries():
    keys = reached(attended("stripes", is_causal=False)[1])
    stripes = keys.any(2)
    assert stripes.sum(-1).tolist() == [[50, 50]]
    assert keys.sum((2, 3)).tolist() == [[50 * 16, 50 * 16]]
    assert not torch.equal(stripes[:, 0], stripes[:, 1])


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_every_query_attends_to_a_sink_and_most_to_other_keys(share):
    support, probability = attended("sink", density=share)
    assert (probability[..., 0] > 0).all()
    assert (support.size[:, :, 64:] > 1).double().mean() > 0.95
    weights = attended("scattered keys", density=share)[1][..., 0]
    assert not (weights > 0).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_key_in_every_tile(is_causal):
    support, probability = attended("one key in every tile", is_causal)
    assert live_tiles(support, is_causal) == 1
    assert any_in_tiles(reached(probability), (1, 64)).sum() == support.keys.sum() == support.tiles.sum()
    places = reached(probability)[0, 0, -2].nonzero().flatten() % 64
    assert places.unique().numel() > 8


@pytest.mark.parametrize("is_causal", [True, False])
def test_all_keys_of_one_tile(is_causal):
    support, _ = attended("all keys of one tile", is_causal)
    assert (support.tiles.sum(-1) == 1).all()
    assert support.tiles.any(2).sum(-1).min() >= 3
    assert support.keys.double().mean() > 62
    assert support.keys.max() == 64


@pytest.mark.parametrize("pattern", KEY_PATTERNS)
@pytest.mark.parametrize(("length", "dim"), [(1, 1), (63, 1), (65, 2), (200, 3), (129, 16)])
def test_any_length_and_head_size(pattern, length, dim):
    """Every query sees a key of its group: the scores of others are around 0, and z is half a score."""
    support, probability = attended(pattern, length=length, dim=dim)
    assert (support.maximum > 10).all()
    torch.testing.assert_close(probability.sum(-1), torch.ones(1, 2, length))


@pytest.mark.parametrize("pattern", KEY_PATTERNS)
def test_seeds_dtypes_and_grouped_heads(pattern):
    def make(**options):
        return key_sparse_inputs(pattern, 2, 4, 70, 16, key_heads=2, **options)

    query, key, value = make()
    assert query.shape == (2, 4, 70, 16)
    assert key.shape == value.shape == (2, 2, 70, 16)
    assert all(torch.equal(ours, again) for ours, again in zip((query, key, value), make(), strict=True))
    assert not torch.equal(key, make(seed=1)[1])
    half = make(dtype=torch.float16)
    assert all(torch.equal(ours.half(), other) for ours, other in zip((query, key, value), half, strict=True))


@pytest.mark.parametrize("pattern", KEY_PATTERNS)
def test_results_are_exact(pattern, backend):
    tensors = key_sparse_inputs(pattern, 1, 2, backend.sizes(130, 700, 4096), 32, key_heads=1, device=backend.device)
    check_attention(Case(*tensors, is_causal=True), backend.impl)


def test_what_is_refused():
    for pattern in PATTERNS_BY_TILE:
        with pytest.raises(ValueError, match=rf"density must be None with the pattern '{pattern}'.*got 0.5"):
            key_sparse_inputs(pattern, 1, 1, 70, 16, density=0.5)
    with pytest.raises(ValueError, match=r"pattern must be one of 'scattered keys'.*got 'stripe'"):
        key_sparse_inputs("stripe", 1, 1, 70, 16)
    for wrong in (0.001, 1.5):
        with pytest.raises(ValueError, match=rf"density must be from 1 / 512 to 1 with 8 groups, got {wrong}"):
            key_sparse_inputs("sink", 1, 1, 70, 64, density=wrong)
    with pytest.raises(ValueError, match=r"density must be from 0 to 1, got -0.1"):
        key_sparse_inputs("stripes", 1, 1, 70, 64, density=-0.1)


def test_topics_are_the_same_numbers_as_ever():
    """Results of earlier runs were measured on these."""
    query, _, _ = topic_inputs(1, 1, 3, 4, 2)
    torch.testing.assert_close(query[0, 0, 0], torch.tensor([-3.6480, 6.0742, 3.1299, -0.6955]), atol=1e-4, rtol=0)
