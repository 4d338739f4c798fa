"""Each option of each public call and module: what is not accepted is refused in words that quote it."""

import re

import pytest
import torch

from flash_entmax import (
    entmax,
    entmax15,
    entmax15_loss,
    entmax_attention,
    entmax_attention_varlen,
    entmax_loss,
    linear_entmax_loss,
    sparsemax,
    sparsemax_loss,
)
from flash_entmax.nn import Entmax, EntmaxAttention, EntmaxLoss

MASK = torch.ones(3, 3, dtype=torch.bool)


def attention(**options):
    return entmax_attention(*torch.zeros(3, 1, 2, 3, 4), **options)


def packed(**options):
    boundaries, longest = torch.tensor([0, 3]), options.pop("max_k", 3)
    return entmax_attention_varlen(*torch.zeros(3, 3, 2, 4), boundaries, None, 3, longest, **options)


def jagged(**options):
    tensors = (torch.nested.nested_tensor_from_jagged(torch.zeros(3, 2, 4), torch.tensor([0, 3])) for _ in range(3))
    return entmax_attention(*(tensor.transpose(1, 2) for tensor in tensors), **options)


def loss(**options):
    return entmax_loss(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), **options)


def named_loss(**options):
    entmax15_loss(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), **options)
    return sparsemax_loss(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), **options)


def linear_loss(**options):
    return linear_entmax_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), **options)


def activation(**options):
    return entmax(torch.zeros(2, 5), **options)


def layer(**options):
    sizes = {"embed_dim": 8, "num_heads": 2} | options
    return EntmaxAttention(**sizes)


def forward(**options):
    return layer()(torch.zeros(3, 8) if "cu_seq" in options else torch.zeros(1, 3, 8), **options)


FLAG = "must be True or False, got "
NOT_FLAGS = {"'no'": "no", "None": None, "1": 1, "0.0": 0.0, "Tensor": MASK, "list": [True]}
FLAGS = [
    (call, option, value, f"{option} {FLAG}{said}")
    for call, options in (
        (attention, ("is_causal", "return_support")),
        (packed, ("is_causal", "return_support")),
        (jagged, ("is_causal", "return_support")),
        (layer, ("bias", "learn_alpha", "is_causal")),
        (Entmax, ("learn_alpha",)),
    )
    for option in options
    for said, value in NOT_FLAGS.items()
]
SIZES = [
    (layer, option, value, f"{option} must be an integer, got {said}")
    for option in ("embed_dim", "num_heads", "num_key_heads", "head_dim")
    for said, value in {"2.0": 2.0, "'2'": "2", "True": True, "Tensor": torch.tensor(2)}.items()
]
TYPES = [
    *(
        (call, "dim", dim, f"dim must be an integer, got {dim!r}")
        for call in (activation, Entmax)
        for dim in (1.0, True)
    ),
    (activation, "alpha", "1.5", "alpha must be a number or a tensor, got str"),
    (Entmax, "alpha", None, "alpha must be a number, got NoneType"),
    (EntmaxLoss, "alpha", True, "alpha must be a number, got bool"),
    *(
        (call, option, value, words)
        for call in (loss, named_loss, linear_loss, EntmaxLoss)
        for option, value, words in (
            ("ignore_index", -1.0, "ignore_index must be an integer, got -1.0"),
            ("ignore_index", True, "ignore_index must be an integer, got True"),
            ("label_smoothing", "0.1", "label_smoothing must be a number, got '0.1'"),
            ("label_smoothing", True, "label_smoothing must be a number, got True"),
        )
    ),
    *((call, "query_positions", True, "query_positions must be .* got bool") for call in (attention,)),
    (packed, "query_positions", True, "query_positions of packed sequences must be a tensor or None, got bool"),
    (packed, "max_k", True, "max_k must be an integer, got bool"),
    *((call, "window_size", 5, r"window_size must be a pair of integers .*, got 5") for call in (attention, layer)),
    (layer, "window_size", (True, 2), r"window_size must be a pair of integers .*, got \(True, 2\)"),
    (layer, "softcap", None, "softcap must be a positive float, or 0 for none, got NoneType"),
    (layer, "rope_base", "10000", "rope_base must be a positive number, got '10000'"),
    (layer, "rope_base", True, "rope_base must be a positive number, got True"),
    (layer, "alpha", torch.tensor(1.5), "alpha must be a number, got Tensor"),
    (forward, "alpha", "1.5", "alpha must be 1, a float from 1.0001 to 2, or a tensor, got str"),
]
VALUES = [
    *((layer, size, 0, f"{size} must be at least 1, got 0") for size in ("embed_dim", "num_heads", "head_dim")),
    (layer, "num_key_heads", -2, "num_key_heads must be at least 1, got -2"),
    (layer, "window_size", (-3, 0), r"window_size must be .*, or -1 for no limit, got \(-3, 0\)"),
    (layer, "softcap", 1e-45, "softcap must be at least 1e-30 and finite, or 0 for none, got 1e-45"),
    (layer, "softcap", -1.0, "softcap must be at least 1e-30 and finite, or 0 for none, got -1.0"),
    (layer, "rope_base", 0.0, "rope_base must be positive and finite, got 0.0"),
    (layer, "rope_base", float("nan"), "rope_base must be positive and finite, got nan"),
    (layer, "position", None, "position must be one of .* got None"),
    (layer, "temperature", 1.0, "temperature must be one of .* got 1.0"),
    (forward, "impl", True, "impl must be one of .* got True"),
    (EntmaxLoss, "impl", "fast", "impl must be one of 'auto', 'triton', 'torch', got 'fast'"),
    *(
        (call, "impl", "reference", "impl must be one of .* got 'reference'")
        for call in (activation, loss, linear_loss)
    ),
    *((call, "reduction", ["mean"], r"reduction must be one of .* got \['mean'\]") for call in (loss, EntmaxLoss)),
    *(
        (call, "label_smoothing", float("nan"), r"label_smoothing must be in \[0, 1\], got nan")
        for call in (loss, EntmaxLoss)
    ),
    (activation, "dim", 2, r"dim must be from -2 to 1 for shape \(2, 5\), got 2"),
]


def described(cases):
    return [pytest.param(*case, id=f"{case[0].__name__}, {case[3]}") for case in cases]


@pytest.mark.parametrize(("call", "option", "value", "words"), described(FLAGS + SIZES + TYPES))
def test_options_of_the_wrong_type(call, option, value, words):
    with pytest.raises(TypeError, match=f"^{words}"):
        call(**{option: value})


@pytest.mark.parametrize(("call", "option", "value", "words"), described(VALUES))
def test_options_out_of_range(call, option, value, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        call(**{option: value})


def test_named_activations_take_no_alpha():
    for call in (sparsemax, entmax15):
        with pytest.raises(TypeError, match="alpha"):
            call(torch.zeros(2, 5), alpha=1.5)


@pytest.mark.parametrize(
    ("boundaries", "error", "words"),
    [
        ([0, 3], TypeError, "cu_seq must be a torch.Tensor, got list"),
        (torch.tensor([0.0, 3.0]), TypeError, "cu_seq must be int32 or int64, got torch.float32"),
        (torch.tensor([[0, 3]]), ValueError, "cu_seq must have shape (sequences + 1,), got (1, 2)"),
        (torch.tensor([0, 3], device="meta"), ValueError, "cu_seq must be on the device of the query, cpu, got meta"),
    ],
)
def test_boundaries_of_a_layer(boundaries, error, words):
    with pytest.raises(error, match=re.escape(words)):
        forward(cu_seq=boundaries, max_seq=3)
    with pytest.raises(TypeError, match="max_q must be an integer, got float"):
        forward(cu_seq=torch.tensor([0, 3]), max_seq=3.0)


def test_nothing_runs_before_options_are_checked(monkeypatch):
    monkeypatch.setattr("flash_entmax.operators.attention.attention", lambda *_: pytest.fail("it ran"))
    for option in ("is_causal", "return_support"):
        with pytest.raises(TypeError, match=option):
            attention(**{option: "no"})


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_flag_that_a_compiler_made_of_lengths_is_one(is_causal):
    """As in `is_causal=length > 1`, where the length is dynamic."""
    torch._dynamo.reset()

    def call(query, key):
        return entmax_attention(query, key, key, is_causal=query.shape[2] > (1 if is_causal else 1000), impl="torch")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        query, key = torch.randn(2, 1, 2, length, 4)
        torch.testing.assert_close(compiled(query, key), call(query, key))
