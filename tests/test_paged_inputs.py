"""Each input of a call with pages that cannot be honoured is refused, and the message quotes what was passed."""

import pytest
import torch

from flash_entmax import entmax_attention_paged

EMPTY = {
    "query": (3, 4, 1, 16),
    "key_cache": (9, 16, 2, 16),
    "value_cache": (9, 16, 2, 8),
    "block_table": (3, 5),
    "key_lengths": (3,),
    "cu_seq_q": (4,),
}


def tensor(name, *shape, **options):
    dtype = torch.float32 if name in ("query", "key_cache", "value_cache") else torch.int32
    return torch.zeros(shape or EMPTY[name], **{"dtype": dtype, **options})


def call(**given):
    inputs = {name: given.pop(name, tensor(name)) for name in list(EMPTY)[:5]}
    return entmax_attention_paged(*inputs.values(), **given)


def of(name, *shape, **options):
    return {name: tensor(name, *shape, **options)}


PACKED = {"query": tensor("query", 5, 4, 16), "cu_seq_q": tensor("cu_seq_q"), "max_q": 2}
TYPES = [
    ({"key_cache": [1.0]}, "key_cache must be a torch.Tensor, got list"),
    ({"block_table": [[0]]}, "block_table must be a torch.Tensor, got list"),
    ({"key_lengths": None}, "key_lengths must be a torch.Tensor, got NoneType"),
    (of("value_cache", dtype=torch.float16), "query, key_cache and value_cache.*one dtype.*value_cache torch.float16"),
    ({n: tensor(n, dtype=torch.int64) for n in list(EMPTY)[:3]}, "query, key_cache and value_cache.*int64"),
    (of("block_table", dtype=torch.int16), "block_table must be int32 or int64, got torch.int16"),
    (of("key_lengths", dtype=torch.float32), "key_lengths must be int32 or int64, got torch.float32"),
    (PACKED | {"max_q": 2.0}, "max_q must be an integer, got float 2.0"),
    (PACKED | {"cu_seq_q": [0, 1, 2, 3]}, "cu_seq_q must be a torch.Tensor, got list"),
    (PACKED | of("cu_seq_q", dtype=torch.float32), "cu_seq_q must be int32 or int64, got torch.float32"),
    ({"window_size": 5}, "window_size.*got 5"),
    ({"alpha": "1.5"}, "alpha.*str"),
]
VALUES = [
    (PACKED | {"max_q": None}, "max_q, at least the most queries of a row, must be given beside cu_seq_q, got None"),
    (of("query", 4, 1, 16), r"query.*\(batch, heads, queries, dim\), or \(tokens.* beside cu_seq_q, got \(4, 1, 16\)"),
    (of("key_cache", 9, 16, 16), r"key_cache.*\(pages, page size, key heads, dim\), got \(9, 16, 16\)"),
    (of("value_cache", 9, 32, 2, 8), r"same pages, page size and key heads, got \(9, 16, 2, 16\) and \(9, 32, 2, 8\)"),
    (of("key_cache", 0, 16, 2, 16) | of("value_cache", 0, 16, 2, 8), "at least one page.*0, 16, 2, 16"),
    (of("query", 3, 3, 1, 16), "multiple.*3 query heads and 2 key heads"),
    (of("query", 3, 4, 1, 8), "same head size, got 8 and 16"),
    (of("value_cache", 9, 16, 2, 600), "head size of value.*512, got 600"),
    (of("block_table", 3, 5, 1), r"block_table must have shape \(batch, pages of a row\).*got \(3, 5, 1\)"),
    (of("block_table", 3, 0), r"block_table.*at least one page, got \(3, 0\)"),
    (of("block_table", 2, 5), r"key_lengths must have shape \(2,\), got \(3,\)"),
    (of("query", 2, 4, 1, 16), "query and block_table must have one batch size, got 2 and 3"),
    (of("key_lengths", 3, 1), r"key_lengths must have shape \(3,\), got \(3, 1\)"),
    (of("key_lengths", device="meta"), "key_lengths must be on the device of the query, cpu, got meta"),
    (of("block_table", device="meta"), "block_table must be on the device of the query, cpu, got meta"),
    (of("key_cache", device="meta"), "one device.*key_cache meta"),
    ({"max_q": 3}, "max_q is for packed queries, beside cu_seq_q, got 3"),
    (PACKED | of("query"), r"query.*\(tokens, heads, dim\) beside cu_seq_q, got \(3, 4, 1, 16\)"),
    (PACKED | of("cu_seq_q", 3), r"cu_seq_q must have shape \(4,\), got \(3,\)"),
    (PACKED | {"max_q": 0}, "max_q must be at least 1, got 0"),
    (PACKED | {"alibi_slopes": torch.zeros(3, 4)}, r"alibi_slopes must have shape \(4,\) or \(1, 4\), got \(3, 4\)"),
    ({"window_size": (-2, 0)}, r"window_size.*\(-2, 0\)"),
    ({"alpha": 2.5}, "alpha must be 1 .*got 2.5"),
    ({"softcap": 1.0, "alpha": 1.0}, "softcap with alpha=1"),
    ({"impl": "cuda"}, "impl must be one of .*'cuda'"),
    (of("query", requires_grad=True), "no derivatives, got query that may need them"),
    ({"alpha": torch.tensor(1.5, requires_grad=True)}, "no derivatives, got alpha that may need them"),
    (of("value_cache", requires_grad=True), "no derivatives, got value_cache"),
    ({"query": torch.nested.nested_tensor([torch.zeros(4, 1, 16)], layout=torch.jagged)}, "query.*not nested"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "message"), TYPES)
def test_types(inputs, message):
    with pytest.raises(TypeError, match=message):
        call(**inputs)


@pytest.mark.parametrize(("inputs", "message"), VALUES)
def test_values(inputs, message):
    with pytest.raises(ValueError, match=message):
        call(**inputs)


def test_what_is_right_is_taken():
    assert call().shape == (3, 4, 1, 8)
    assert call(**PACKED).shape == (5, 4, 8)


def test_leaves_are_taken_where_gradients_are_off():
    with torch.no_grad():
        assert not call(**of("query", requires_grad=True)).requires_grad


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_are_refused(transform):
    def attend(query):
        return call(query=query).sum()

    query = torch.zeros(2, *EMPTY["query"]) if transform is torch.func.vmap else tensor("query")
    with pytest.raises(ValueError, match="no derivatives, got query"):
        transform(attend)(query)


def test_autocast_casts_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.float32
