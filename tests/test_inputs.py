"""Each input that cannot be honoured is refused with the right exception, and the message quotes what was passed."""

import inspect
import re

import pytest
import torch

from flash_entmax import entmax_attention, entmax_attention_varlen, entmax_loss
from flash_entmax.core.keywords import SAID_BY


def tensor(*shape, **options):
    return torch.zeros(*shape or (2, 4, 8, 16), **options)


def whole(*shape, dtype=torch.int64, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def call(query=None, key=None, value=None, **options):
    tensors = (tensor() if given is None else given for given in (query, key, value))
    return entmax_attention(*tensors, **options)


SHAPES = [
    ({"query": tensor(8, 16)}, r"query.*\(8, 16\)"),
    ({"key": tensor(1, 2, 4, 8, 16)}, r"key.*\(1, 2, 4, 8, 16\)"),
    ({"value": tensor(4, 8, 16)}, r"value.*\(4, 8, 16\)"),
    ({"query": tensor(3, 4, 8, 16)}, "batch.*3, 2 and 2"),
    ({"value": tensor(5, 4, 8, 16)}, "batch.*2, 2 and 5"),
    ({"key": tensor(2, 3, 8, 16), "value": tensor(2, 3, 8, 16)}, "multiple.*4 query heads and 3 key heads"),
    ({"key": tensor(2, 8, 8, 16), "value": tensor(2, 8, 8, 16)}, "multiple.*4 query heads and 8 key heads"),
    ({"key": tensor(2, 0, 8, 16), "value": tensor(2, 0, 8, 16)}, "multiple.*4 query heads and 0 key heads"),
    ({"key": tensor(2, 2, 8, 16)}, "heads.*2 and 4"),
    ({"key": tensor(2, 4, 9, 16)}, "length.*9 and 8"),
    ({"key": tensor(2, 4, 8, 17)}, "head size.*16 and 17"),
    ({"query": tensor(2, 4, 8, 513), "key": tensor(2, 4, 8, 513)}, "query and key.*512.*513"),
    ({"value": tensor(2, 4, 8, 600)}, "value.*512.*600"),
    ({"value": tensor(2, 4, 8, 0)}, "value.*512.*got 0"),
    ({"value": tensor(device="meta")}, "device.*query cpu.*value meta"),
    ({"query": tensor().to_sparse()}, "query must be a dense tensor.*torch.sparse_coo"),
    ({"value": tensor().to_mkldnn()}, "value must be a dense tensor.*torch._mkldnn"),
]
TYPES = [
    ({"query": [[1.0]]}, "query.*list"),
    ({"value": 3.0}, "value.*float"),
    ({"query": tensor(dtype=torch.float16)}, "query torch.float16.*key torch.float32"),
    ({name: tensor(dtype=torch.int64) for name in ("query", "key", "value")}, "int64"),
    ({name: tensor(dtype=torch.complex64) for name in ("query", "key", "value")}, "complex64"),
    ({"alpha": "1.5"}, "alpha.*str"),
    ({"alpha": True}, "alpha.*bool"),
    ({"alpha": None}, "alpha.*NoneType"),
    ({"scale": "0.1"}, "scale.*str"),
    ({"alpha": torch.tensor(1)}, "alpha.*torch.int64"),
    ({"scale": torch.tensor(True)}, "scale.*torch.bool"),
    ({"window_size": 5}, r"window_size.*\(left, right\), got 5"),
    ({"window_size": (1, 2, 3)}, r"window_size.*got \(1, 2, 3\)"),
    ({"window_size": (1.0, 2)}, r"window_size.*got \(1.0, 2\)"),
    ({"window_size": (True, 2)}, r"window_size.*got \(True, 2\)"),
    ({"window_size": None}, "window_size.*got None"),
    ({"softcap": None}, "softcap.*NoneType"),
    ({"softcap": torch.tensor(1.0)}, "softcap.*Tensor"),
    ({"alibi_slopes": 0.5}, "alibi_slopes.*float"),
    ({"alibi_slopes": tensor(4, dtype=torch.int32)}, "alibi_slopes.*int32"),
    ({"query_positions": 1.5}, "query_positions.*float"),
    ({"query_positions": [1, 2]}, "query_positions.*list"),
    ({"query_positions": tensor(8)}, "query_positions.*float32"),
    ({"query_positions": tensor(8, dtype=torch.int16)}, "query_positions must be int32 or int64.*int16"),
    ({"key_lengths": [8, 8]}, "key_lengths.*list"),
    ({"key_lengths": tensor(2)}, "key_lengths must be int32 or int64.*float32"),
    ({"key_mask": [[True]]}, "key_mask.*list"),
    ({"key_mask": tensor(2, 8)}, "key_mask.*boolean.*float32: pass mask == 0, if it is added"),
    ({"block_mask": tensor(8, 8)}, "block_mask.*BlockMask.*Tensor"),
]
VALUES = [
    *(({"alpha": alpha}, f"alpha.*{re.escape(str(alpha))}") for alpha in (0.99, 2.01, 0, -1.5, float("inf"))),
    ({"alpha": float("nan")}, "alpha.*nan"),
    *(({"scale": scale}, f"scale.*{re.escape(str(scale))}") for scale in (0.0, -0.5, float("inf"), float("nan"))),
    ({"alpha": tensor(3)}, r"alpha must have shape \(\) or \(4,\), got \(3,\)"),
    ({"scale": tensor(2, 4)}, r"scale must have shape \(\) or \(4,\), got \(2, 4\)"),
    ({"alpha": tensor(4, device="meta")}, "alpha must be on the device of the query, cpu, got meta"),
    ({"scale": tensor(4, device="meta")}, "scale must be on the device of the query, cpu, got meta"),
    ({"window_size": (-2, 0)}, r"window_size.*-1 for no limit.*\(-2, 0\)"),
    ({"window_size": (0, -5)}, r"window_size.*\(0, -5\)"),
    (
        {"softcap": 1e-30, "scale": 1e9},
        "softcap / scale must be at least 1e-30, got softcap 1e-30 and",
    ),
    *(({"softcap": cap}, f"softcap.*{re.escape(str(cap))}") for cap in (-1.0, float("inf"), float("nan"))),
    ({"alibi_slopes": tensor(2)}, r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(2,\)"),
    ({"alibi_slopes": tensor(4, 2)}, r"alibi_slopes must have shape .*got \(4, 2\)"),
    ({"alibi_slopes": tensor(4, device="meta")}, "alibi_slopes must be on the device.*meta"),
    ({"query_positions": 2**31}, r"query_positions.*-2\^30 to 2\^30.*2147483648"),
    ({"query_positions": whole(7)}, r"query_positions must have shape \(8,\) or \(2, 8\), got \(7,\)"),
    ({"query_positions": whole(8, device="meta")}, "query_positions must be on the device.*meta"),
    ({"key_lengths": whole(3)}, r"key_lengths must have shape \(2,\), got \(3,\)"),
    ({"scale": 1e31}, r"\(alpha - 1\) \* scale must be from 1e-30 to 1e30, got alpha 1\.5 and scale 1e\+31"),
    ({"scale": 1e-31}, r"\(alpha - 1\) \* scale must be from 1e-30 to 1e30"),
    ({"key_lengths": torch.tensor([0, 99])}, r"key_lengths must be from 0 to \d+, the number of keys, got \[0, 99\]"),
    ({"key_lengths": torch.tensor([-1, 3])}, r"key_lengths must be from 0 to \d+, the number of keys, got \[-1, 3\]"),
    ({"key_lengths": whole(2, device="meta")}, "key_lengths must be on the device.*meta"),
    ({"key_mask": whole(8, dtype=torch.bool)}, r"key_mask must have shape \(2, 8\), got \(8,\)"),
    ({"key_mask": whole(2, 8, dtype=torch.bool, device="meta")}, "key_mask must be on the device.*meta"),
    ({"impl": "cuda"}, "impl.*'triton'.*'reference'.*'cuda'"),
    ({"impl": None}, "impl.*None"),
    ({"alpha": 1.0, "return_support": True}, "alpha=1 "),
]


def described(cases):
    return [pytest.param(options, match, id=match) for options, match in cases]


@pytest.mark.parametrize(("options", "match"), described(SHAPES + VALUES))
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_values_that_do_not_fit(options, match, impl):
    with pytest.raises(ValueError, match=match):
        call(**{"impl": impl, **options})


@pytest.mark.parametrize(("options", "match"), described(TYPES))
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_types_that_do_not_fit(options, match, impl):
    with pytest.raises(TypeError, match=match):
        call(**{"impl": impl, **options})


PACKED_TYPES = [
    ({"query": [[1.0]]}, "query.*list"),
    ({"cu_seq_q": [0, 4]}, "cu_seq_q.*list"),
    ({"cu_seq_q": tensor(2)}, "cu_seq_q must be int32 or int64.*float32"),
    ({"cu_seq_k": tensor(2)}, "cu_seq_k must be int32 or int64.*float32"),
    ({"query_positions": 3}, "query_positions of packed sequences.*int"),
]
PACKED_VALUES = [
    ({"query": tensor(1, 8, 4, 16)}, r"query must have shape \(tokens, heads, dim\), got \(1, 8, 4, 16\)"),
    ({"value": tensor(8, 16)}, r"value must have shape \(tokens, heads, dim\), got \(8, 16\)"),
    ({"cu_seq_q": whole(1, 2)}, r"cu_seq_q must have shape \(sequences \+ 1,\), got \(1, 2\)"),
    ({"cu_seq_q": whole(0)}, r"cu_seq_q must have shape \(sequences \+ 1,\), got \(0,\)"),
    ({"cu_seq_k": whole(3)}, "cu_seq_q and cu_seq_k must have one length, got 2 and 3"),
    ({"cu_seq_q": whole(2, device="meta")}, "cu_seq_q must be on the device.*meta"),
    ({"query_positions": whole(3)}, r"query_positions must have shape \(8,\).*got \(3,\)"),
    ({"alibi_slopes": tensor(3)}, r"alibi_slopes must have shape \(4,\).*got \(3,\)"),
]


def call_packed(query=None, key=None, value=None, cu_seq_q=None, cu_seq_k=None, **options):
    tensors = (tensor(8, 4, 16) if given is None else given for given in (query, key, value))
    cu_seq_q = torch.tensor([0, 8]) if cu_seq_q is None else cu_seq_q
    return entmax_attention_varlen(*tensors, cu_seq_q, cu_seq_k, 8, 8, **options)


@pytest.mark.parametrize(("options", "match"), described(PACKED_TYPES))
def test_types_that_do_not_fit_packed_sequences(options, match):
    with pytest.raises(TypeError, match=match):
        call_packed(**options)


@pytest.mark.parametrize(("options", "match"), described(PACKED_VALUES))
def test_values_that_do_not_fit_packed_sequences(options, match):
    with pytest.raises(ValueError, match=match):
        call_packed(**options)


def nested(heads=4):
    return torch.nested.nested_tensor_from_jagged(tensor(8, heads, 16), torch.tensor([0, 3, 8])).transpose(1, 2)


NESTED = [
    ({"key": tensor()}, r"key must be a jagged nested tensor.*got a tensor of shape \(2, 4, 8, 16\)"),
    ({"query": nested().transpose(1, 2)}, "query must be a jagged nested tensor"),
    ({"key_lengths": torch.tensor([3, 5])}, "key_lengths.*not for nested ones"),
    ({"key_mask": torch.ones(2, 8, dtype=torch.bool)}, "key_mask.*not for nested ones"),
    ({"query_positions": 0}, "query_positions.*not for nested ones"),
    ({"query": nested(3)}, "multiple.*3 query heads and 4 key heads"),
]


@pytest.mark.parametrize(("options", "match"), described(NESTED))
def test_options_that_do_not_fit_nested_tensors(options, match):
    with pytest.raises(ValueError, match=match):
        entmax_attention(**{"query": nested(), "key": nested(), "value": nested()} | options)


def test_unknown_options_are_refused():
    """By the name that they have, and those of other libraries with what says the same here."""
    with pytest.raises(TypeError, match=r"entmax_attention\(\) got an unexpected keyword argument 'other'$"):
        call(other=True)
    with pytest.raises(TypeError, match=r"argument 'is_casual' \(did you mean is_causal\?\)$"):
        call(is_casual=True)
    with pytest.raises(TypeError, match=r"arguments 'attn_mask' \(padding is key_mask .*, 'dropout_p' \(there is no"):
        call(attn_mask=tensor(8, 8) > 0, dropout_p=0.1)
    with pytest.raises(TypeError, match=r"got 4 arguments: options have names, as is_causal=True; of attn_mask"):
        entmax_attention(*(torch.ones(1, 1, 4, 8) for _ in range(3)), torch.ones(4, 4) > 0)
    with pytest.raises(TypeError, match=r"'s_aux' \(attention sinks are a term of softmax's denominator"):
        call(s_aux=tensor(1))
    with pytest.raises(TypeError, match=r"entmax_loss\(\) got .* 'weight' \(there are no weights of classes\)$"):
        entmax_loss(torch.ones(2, 3), torch.tensor([0, 1]), weight=torch.ones(3))
    with pytest.raises(TypeError, match=r"'cu_seqlens_q' \(for entmax_attention_varlen\)"):
        call(cu_seqlens_q=whole(2))
    boundaries = torch.tensor([0, 4])
    packed = *(torch.randn(4, 1, 8) for _ in range(3)), boundaries, None, 4, 4
    with pytest.raises(TypeError, match=r"entmax_attention_varlen\(\) .* 'causal' \(it is is_causal\)$"):
        entmax_attention_varlen(*packed, causal=True)
    with pytest.raises(TypeError, match=r"'max_seqlen_q' \(it is max_q\)"):
        entmax_attention_varlen(*packed, max_seqlen_q=4)
    with pytest.raises(TypeError, match="takes query, key, value by position"):
        entmax_attention(tensor(), tensor(), tensor(), 1.5)


def test_options_that_ask_for_what_is_so_anyway_are_taken():
    """As calls of scaled_dot_product_attention have them."""
    assert torch.equal(call(attn_mask=None, dropout_p=0.0, enable_gqa=True, is_causal=True), call(is_causal=True))
    with pytest.raises(TypeError, match=r"argument 'enable_gqa' \(the numbers of heads say it, leave it out\)$"):
        call(attn_mask=None, enable_gqa=False)


def test_what_stands_for_a_keyword_of_another_library_is_taken():
    """Every option that an advice names is one of the call."""
    taken = set(inspect.signature(entmax_attention).parameters)
    assert not taken & set(SAID_BY)
    words = set(re.findall(r"[a-z]+_[a-z_]+|\bscale\b|\bsoftcap\b", " ".join(SAID_BY.values())))
    assert words
    assert words - {"create_block_mask"} <= taken


def test_where_queries_stand_is_not_guessed():
    """Beside key_lengths, fewer queries than keys could be the last of either, and masks by position must know."""
    few, lengths = tensor(2, 4, 3, 16), whole(2) + 5
    for options in ({"is_causal": True}, {"window_size": (4, -1)}, {"alibi_slopes": torch.ones(4)}):
        with pytest.raises(ValueError, match=r"needs query_positions .*, got 3 and 8: .*arange\(-3, 0\).*, 5 if it is"):
            call(few, key_lengths=lengths, **options)
        for positions in (5, lengths.unsqueeze(1) + torch.arange(-3, 0)):
            call(few, key_lengths=lengths, query_positions=positions, **options)
        call(key_lengths=lengths, **options)
    for harmless in ({}, {"is_causal": True}):
        call(tensor(2, 4, 1, 16), key_lengths=lengths, **harmless)
    call(few, key_lengths=lengths)


def test_triton_refuses_float64():
    double = tensor(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton'.*float64"):
        call(double, double, double, impl="triton")


def test_triton_refuses_processor_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton'.*TRITON_INTERPRET=1"):
        call(impl="triton")


def test_triton_refuses_bfloat16_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    narrow = tensor(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"impl='triton'.*bfloat16"):
        call(narrow, narrow, narrow, impl="triton")


def test_triton_refuses_other_devices():
    meta = tensor(device="meta")
    with pytest.raises(ValueError, match=r"impl='triton'.*meta"):
        call(meta, meta, meta, impl="triton")


LIMITS = (
    {"alpha": 1}, {"alpha": 2}, {"alpha": 1.0001}, {"scale": 1}, {"scale": 1e-8}, {"impl": "auto"},
    {"window_size": (0, 0)}, {"window_size": [2**40, 2**40]}, {"softcap": 1e-6}, {"softcap": 1e6},
    {"query_positions": 2**30}, {"query_positions": -(2**30)}, {"key_lengths": torch.tensor([3])},
    {"key_lengths": torch.tensor([0])}, {"alpha": torch.tensor([1.5])}, {"scale": torch.tensor(0.1).double()},
)  # fmt: skip


def test_the_limits_are_accepted():
    wide = tensor(1, 1, 3, 256)
    for options in LIMITS:
        assert call(wide, wide, wide, **options).shape == wide.shape
    one = tensor(1, 1, 1, 1)
    assert call(one, one, one).shape == one.shape
