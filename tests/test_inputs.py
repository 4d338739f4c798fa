"""Each input that cannot be honoured is refused with the right exception, and the message quotes what was passed."""

import re

import pytest
import torch

from flash_entmax import entmax_attention


def tensor(*shape, **options):
    return torch.zeros(*shape or (2, 4, 8, 16), **options)


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
    ({"query": tensor(2, 4, 8, 257), "key": tensor(2, 4, 8, 257)}, "query and key.*256.*257"),
    ({"value": tensor(2, 4, 8, 300)}, "value.*256.*300"),
    ({"value": tensor(2, 4, 8, 0)}, "value.*256.*got 0"),
    ({"value": tensor(device="meta")}, "device.*query cpu.*value meta"),
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
    ({"alpha": torch.tensor(1.5)}, "alpha.*Tensor"),
    ({"scale": "0.1"}, "scale.*str"),
    ({"scale": torch.tensor(1.0)}, "scale.*Tensor"),
]
VALUES = [
    *(({"alpha": alpha}, f"alpha.*{re.escape(str(alpha))}") for alpha in (0.99, 2.01, 0, -1.5, float("inf"))),
    ({"alpha": float("nan")}, "alpha.*nan"),
    *(({"scale": scale}, f"scale.*{re.escape(str(scale))}") for scale in (0.0, -0.5, float("inf"), float("nan"))),
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


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="dropout_p"):
        call(dropout_p=0.1)
    with pytest.raises(TypeError, match="positional"):
        entmax_attention(tensor(), tensor(), tensor(), 1.5)


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


def test_the_limits_are_accepted():
    wide = tensor(1, 1, 3, 256)
    for options in ({"alpha": 1}, {"alpha": 2}, {"alpha": 1.0001}, {"scale": 1}, {"scale": 1e-8}, {"impl": "auto"}):
        assert call(wide, wide, wide, **options).shape == wide.shape
    one = tensor(1, 1, 1, 1)
    assert call(one, one, one).shape == one.shape
