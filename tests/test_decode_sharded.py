"""Decoding with a cache whose parts lie on ranks, on gloo: what one process computes with the whole cache."""

import pytest
import torch
from rank_pool import Failure
from rank_work import LEARNED, decode, refused_decode
from test_distributed import LENGTH, PER_HEAD, SIZES, case

from flash_entmax import entmax_attention

pytestmark = pytest.mark.xdist_group("distributed")


DECODED = {
    "one query": {},
    "causal": {"queries": 5, "is_causal": True, "alpha": 1.3},
    "a window at given positions": {"queries": 3, "query_positions": 40, "window_size": (30, 2)},
    "a part that no query sees": {"key_lengths": torch.tensor([17, 60])},
    "rows that see no key": {"queries": 4, "query_positions": -2, "is_causal": True},
    "hidden keys": {"key_mask": torch.arange(2 * LENGTH).view(2, -1) % 7 > 2},
    "slopes, softcap, learned": {
        "alibi_slopes": PER_HEAD, "softcap": 2.0, "alpha": 1.0 + PER_HEAD, "scale": PER_HEAD, "is_causal": True,
    },
    "grouped heads": {"shared": 2, "alpha": 2.0},
}  # fmt: skip


def decoding_case(name):
    options = dict(DECODED[name])
    queries = options.pop("queries", 1)
    tensors, options = case(options, key_heads=4)
    return tensors | {"query": tensors["query"][:, :, :queries]}, options


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DECODED)
def test_a_sharded_cache_is_decoded_as_a_whole_one(pool, name, size):
    tensors, options = decoding_case(name)
    expected = entmax_attention(*(tensors[name] for name in LEARNED[:3]), **options)
    answers = pool.run(size, decode, tensors, options)
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)
        assert torch.equal(answer, answers[0])


def test_parts_of_a_cache_may_have_any_length(pool):
    tensors, options = decoding_case("causal")
    expected = entmax_attention(*(tensors[name] for name in LEARNED[:3]), **options)
    options |= {"first_key": None, "query_positions": LENGTH - 5}
    for answer in pool.run(3, decode, tensors, options, [0, 50, 50, LENGTH]):
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)


def test_parts_of_a_cache_may_end_before_its_length(pool):
    tensors, options = decoding_case("causal")
    batch = tensors["key"].shape[0]
    options |= {"key_lengths": torch.full((batch,), LENGTH - 7), "query_positions": LENGTH - 8}
    expected = entmax_attention(*(tensors[name] for name in LEARNED[:3]), **options)
    for answer in pool.run(3, decode, tensors, options | {"first_key": None}, [0, 20, 50, LENGTH]):
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)


def test_keys_that_two_ranks_hold_are_refused(pool):
    tensors, options = decoding_case("causal")
    options |= {"first_key": None, "query_positions": LENGTH - 5}
    for answer in pool.answers(3, decode, tensors, options, [0, 20, 50, LENGTH], 1):
        assert isinstance(answer, Failure), answer
        assert "must not overlap, got first_key=0 to 20 on rank 0 and first_key=20 to 50 on rank 1" in answer.of[1]


@pytest.mark.parametrize("queries", [3, LENGTH // 2])
def test_where_queries_stand_beside_lengths_is_not_guessed(pool, queries):
    """As for one process: also where a rank has as many keys as there are queries."""
    tensors, options = decoding_case("causal")
    tensors["query"] = tensors["key"][:, :, :queries]
    options |= {"key_lengths": torch.full((2,), LENGTH - 3)}
    with pytest.raises(ValueError, match="needs query_positions") as own:
        entmax_attention(*(tensors[name] for name in LEARNED[:3]), **options)
    for answer in pool.answers(2, decode, tensors, options):
        assert isinstance(answer, Failure), answer
        assert answer.of[1] == str(own.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_every_dtype(pool, dtype):
    tensors, options = decoding_case("causal")
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected = entmax_attention(*(rounded[name].double() for name in LEARNED[:3]), **options)
    for answer in pool.run(3, decode, rounded, options):
        assert answer.dtype == dtype
        tolerance = 4 * max(torch.finfo(dtype).eps, 2.0**-20)
        torch.testing.assert_close(answer.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requires_grad": True}, "has no gradient: call it under torch.no_grad"),
        ({"alpha": 1.0}, "alpha must be above 1 here, got 1"),
        ({"first_key": 3}, "first_key=3 needs query_positions"),
        ({"first_key": -1, "query_positions": 0}, "first_key must be from 0 to 2^30, got -1"),
        ({"first_key": "a"}, "first_key must be an integer or None, got str 'a'"),
        ({"impl": "reference"}, "impl must be one of"),
        ({"key_lengths": torch.tensor([3])}, "key_lengths must be from 0 to 0, the number of keys, got [3]"),
    ],
)
def test_wrong_decoding_is_refused(pool, options, message):
    for answer in pool.answers(2, refused_decode, **options):
        assert isinstance(answer, Failure), answer
        assert message in answer.of[1]
