"""Context parallelism on gloo: ranks of one to four processes compute what one process computes."""

import re

import pytest
import torch
from rank_pool import RANKS, Failure
from rank_work import (
    LEARNED,
    attention,
    called,
    dtypes_of,
    forward,
    layouts,
    leaves,
    round_trip,
    sum_of,
)

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.distributed import context_parallel_attention
from flash_entmax.distributed.ranks import by_rank

pytestmark = pytest.mark.xdist_group("distributed")
SIZES = (1, 2, 3, 4)
LENGTH = 96
WAYS = [(method, layout) for method in ("gather", "heads") for layout in ("balanced", "contiguous")]
PER_HEAD = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)  # as many of them as there are heads
CASES = {  # options of the whole call
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (20, 5), "alpha": 1.3},
    "causal window": {"is_causal": True, "window_size": (30, 30)},
    "softcap, learned alpha": {"softcap": 2.0, "alpha": torch.tensor(1.6, dtype=torch.float64), "is_causal": True},
    "alpha and scale by head": {"alpha": 1.0 + PER_HEAD, "scale": PER_HEAD, "is_causal": True},
    "slopes by head": {"alibi_slopes": PER_HEAD, "is_causal": True},
    "slopes by batch row": {"alibi_slopes": torch.stack((PER_HEAD, 0.1 * PER_HEAD)), "scale": 0.7},
    "grouped heads": {"shared": 2, "is_causal": True, "alpha": 2.0},
    "padding on the right": {"key_lengths": torch.tensor([70, 15]), "is_causal": True},
    "padding anywhere": {"key_mask": torch.arange(2 * LENGTH).view(2, -1) % 7 > 2, "is_causal": True},
    "softmax": {"alpha": 1.0, "is_causal": True},
    "the specification": {"impl": "reference", "is_causal": True},
    "some heads at a time": {"heads_at_a_time": 2, "shared": 2, "is_causal": True, "alpha": 1.0 + PER_HEAD},
}


PACKED = {"cu_seq": torch.tensor([0, 11, 60, 90]), "is_causal": True}
COMPILED = [
    ("some heads at a time", ("gather", "balanced"), "inductor"),  # which may move operators, but not the exchange
    ("slopes by batch row", ("gather", "contiguous"), "aot_eager"),
    ("packed", ("gather", "balanced"), "aot_eager"),
    ("padding anywhere", ("heads", "contiguous"), "aot_eager"),
]


def case(options, key_heads, **sizes):
    """Inputs, and options for as many heads as they have; `shared` is how many heads share a key head."""
    heads = key_heads * options.get("shared", 1)
    options = {
        name: option[..., :heads] if name in LEARNED and torch.is_tensor(option) and option.dim() else option
        for name, option in options.items()
        if name != "shared"
    }
    return inputs(heads, key_heads, **sizes), options


def inputs(heads, key_heads, length=LENGTH, batch=2):
    """Whole tensors in float64; values have a head size of their own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (batch, heads, length, 8), "key": (batch, key_heads, length, 8),
        "value": (batch, key_heads, length, 6), "grad_output": (batch, heads, length, 6),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def in_one_process(tensors, options):
    """Output and gradients of the whole call."""
    options = {name: option for name, option in options.items() if name != "heads_at_a_time"}
    learned = {name: option for name, option in options.items() if name in LEARNED and torch.is_tensor(option)}
    own = leaves({name: tensors[name] for name in LEARNED[:3]} | learned)
    output = entmax_attention(**own, **{name: option for name, option in options.items() if name not in own})
    output.backward(tensors["grad_output"])
    return {"output": output.detach(), **{name: tensor.grad for name, tensor in own.items()}}


def put_together(answers):
    """The whole of what the ranks have of the sequence; parameters have one gradient on all ranks."""
    whole = {}
    for name in answers[0].keys() - {"positions"}:
        of_ranks = [answer[name] for answer in answers]
        if name in ("alpha", "scale", "alibi_slopes"):
            assert all(torch.equal(own, of_ranks[0]) for own in of_ranks)
            whole[name] = of_ranks[0]
            continue
        length = sum(own.shape[2] for own in of_ranks)
        whole[name] = of_ranks[0].new_full((*of_ranks[0].shape[:2], length, of_ranks[0].shape[3]), torch.nan)
        for answer in answers:
            whole[name][:, :, answer["positions"]] = answer[name]
    return whole


def check(answers, expected, tolerance=1e-12):
    whole = put_together(answers)
    assert whole.keys() == expected.keys()
    for name, tensor in expected.items():
        size = max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(
            whole[name], tensor, rtol=0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_computes(pool, name, size):
    """Outputs and gradients, also of alpha, scale and slopes, by both methods and in both layouts."""
    tensors, options = case(CASES[name], key_heads=max(2, size))
    ways = [way for way in WAYS if "heads_at_a_time" not in options or way[0] == "gather"]
    expected = in_one_process(tensors, options)
    for answers in zip(*pool.run(size, attention, tensors, options, ways), strict=True):
        check(answers, expected)


@pytest.mark.parametrize("size", SIZES)
def test_packed_sequences_cross_the_parts(pool, size):
    boundaries = torch.tensor([0, 11, 11, 60, 90])
    options = {"is_causal": True, "window_size": (25, -1), "alibi_slopes": PER_HEAD}
    tensors, options = case(options, key_heads=max(2, size), batch=1)
    own = leaves({name: tensors[name] for name in LEARNED[:3]} | {"alibi_slopes": options["alibi_slopes"]})
    rows = (own[name].squeeze(0).transpose(0, 1) for name in LEARNED[:3])
    packed = options | {"alibi_slopes": own["alibi_slopes"]}
    output = entmax_attention_varlen(*rows, boundaries, None, LENGTH, LENGTH, **packed).transpose(0, 1)[None]
    output.backward(tensors["grad_output"])
    expected = {"output": output.detach(), **{name: tensor.grad for name, tensor in own.items()}}
    options["cu_seq"] = boundaries
    for answers in zip(*pool.run(size, attention, tensors, options, WAYS), strict=True):
        check(answers, expected)


def test_any_number_of_heads_is_gathered(pool):
    """Of 4 heads and 2 key heads, 3 ranks could not have a share each."""
    tensors = inputs(heads=4, key_heads=2)
    ways = [("gather", "balanced"), ("gather", "contiguous")]
    expected = in_one_process(tensors, {"is_causal": True})
    for answers in zip(*pool.run(3, attention, tensors, {"is_causal": True}, ways), strict=True):
        check(answers, expected)


def test_repeats_are_bit_identical(pool):
    tensors = {name: tensor.float() for name, tensor in inputs(3, 3).items()}
    options = {"is_causal": True, "alpha": torch.tensor(1.5), "alibi_slopes": PER_HEAD[:3].float()}
    first, second = (pool.run(3, attention, tensors, options, WAYS) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for way, again in zip(one, other, strict=True):
            assert all(torch.equal(way[name], again[name]) for name in way)


@pytest.mark.parametrize("method", ["gather", "heads"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_types_and_autocast(pool, dtype, method):
    """Autocast casts before the exchange, so both compute the same bits of the output."""
    tensors = inputs(4, 2)
    plain, cast = (pool.run(2, dtypes_of, tensors, dtype, under, method) for under in (False, True))
    rounded = {name: tensor.to(dtype).double() for name, tensor in tensors.items()}
    expected = in_one_process(rounded, {"is_causal": True})
    tolerance = 4 * torch.finfo(dtype).eps
    for answers, of_gradients in ((plain, dtype), (cast, torch.float32)):
        parts = {name: torch.stack([answer[name] for answer in answers]) for name in answers[0]}
        assert parts["output"].dtype == dtype
        assert parts["key"].dtype == of_gradients
        for name, own in parts.items():
            early, late = own.double().chunk(2, 3)  # the chunks 0, 1 and 3, 2
            whole = torch.cat((early[0], early[1], late[1], late[0]), 2)
            size = expected[name].abs().max().item()
            torch.testing.assert_close(whole, expected[name], rtol=0, atol=tolerance * size)
    assert all(torch.equal(a["output"], b["output"]) for a, b in zip(plain, cast, strict=True))


def test_in_a_checkpoint(pool):
    """The same bits."""
    tensors = inputs(4, 2)
    answers = (pool.run(2, called, tensors, is_checkpoint) for is_checkpoint in (True, False))
    for own, plain in zip(*answers, strict=True):
        assert all(torch.equal(own[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("name", "way", "backend"), COMPILED)
def test_one_graph_of_a_compiled_call(pool, name, way, backend):
    """The same output and gradients, without a break of the graph; the same bits where nothing is fused."""
    tensors, options = case(CASES.get(name, PACKED), key_heads=2, batch=1 if name == "packed" else 2)
    tolerance = 1e-12 if backend == "inductor" else 0.0
    answers, plain = (pool.run(2, attention, tensors, options | {"compiled": how}, [way]) for how in (backend, None))
    for (own,), (expected,) in zip(answers, plain, strict=True):
        for part, wanted in expected.items():
            torch.testing.assert_close(own[part], wanted, rtol=tolerance, atol=tolerance, msg=part)


def test_each_rank_may_keep_its_share_of_a_parameters_gradient(pool):
    """For parameters that FSDP or DDP reduces: the shares add up to the whole."""
    tensors, options = inputs(3, 3), {"alpha": torch.tensor(1.5, dtype=torch.float64), "is_causal": True}
    expected = in_one_process(tensors, options)["alpha"]
    answers = pool.run(3, attention, tensors, options | {"sum_parameter_gradients": False}, WAYS)
    for of_way in zip(*answers, strict=True):
        shares = torch.stack([answer["alpha"] for answer in of_way])
        torch.testing.assert_close(shares.sum(), expected, rtol=1e-12, atol=1e-12)
        assert not torch.equal(shares[0], shares[1])


def test_layouts(pool):
    """Balanced: rank r has the chunks r and 2 n - 1 - r."""
    balanced = [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    contiguous = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for rank, own in enumerate(pool.run(3, layouts, 12)):
        assert own["balanced"].tolist() == balanced[rank]
        assert own["contiguous"].tolist() == contiguous[rank]


@pytest.mark.parametrize("layout", ["balanced", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.bool])
def test_parts_are_put_together_again(pool, dtype, layout):
    whole = (torch.arange(3 * 12 * 2).view(3, 12, 2) % 5).to(dtype)
    for back, of_whole, of_part, places in pool.run(3, round_trip, whole, -2, layout):
        assert torch.equal(back, whole)
        if of_whole is not None:
            own = torch.zeros(12, dtype=torch.bool)
            own[places] = True
            assert torch.equal(of_whole, own[:, None].expand_as(whole).to(dtype))
            assert torch.equal(of_part, 6 * whole[:, places])  # (1 + 2 + 3) times: the losses of three ranks


def test_sums_over_ranks_of_16_bit_types_are_added_in_float32(pool):
    """256 + 1 is 256 in bfloat16."""
    for total in pool.run(RANKS, sum_of, torch.tensor([256, 1, 1, 2], dtype=torch.bfloat16)):
        assert total.item() == 260


@pytest.mark.parametrize(("batch", "length"), [(0, LENGTH), (2, 0)])
def test_empty_inputs_have_empty_outputs(pool, batch, length):
    tensors = inputs(2, 2, length=length, batch=batch)
    for answers in zip(*pool.run(2, attention, tensors, {"is_causal": True}, WAYS), strict=True):
        assert all(answer["output"].shape == (batch, 2, length // 2, 6) for answer in answers)
        assert all(answer["key"].shape == (batch, 2, length // 2, 8) for answer in answers)


ALL_RANKS = {  # the same wrong call on all ranks
    "method": ({"method": "ring"}, "ValueError", "method must be 'gather' or 'heads', got 'ring'"),
    "layout": ({"layout": "striped"}, "ValueError", "layout must be 'balanced' or 'contiguous', got 'striped'"),
    "length": ({"length": 7}, "ValueError", "must divide into 6 chunks of one length, .* got length 21: pad it"),
    "heads": ({"method": "heads"}, "ValueError", "must be multiples of 3, the number of ranks, got 4 and 4"),
    "alpha": ({"alpha": 2.5}, "ValueError", r"alpha must be 1 \(softmax\).*got 2.5"),
    "lengths": ({"key": torch.ones(1, 4, 6, 4)}, "ValueError", "key and value must have the same length, got 6 and 8"),
    "nested": (
        {"key": torch.nested.nested_tensor([torch.ones(4, 4)] * 2, layout=torch.jagged)},
        "ValueError",
        "key must be a tensor that is not nested",
    ),
    "at a time": ({"heads_at_a_time": 0}, "ValueError", "heads_at_a_time must be at least 1, got 0"),
    "half": ({"heads_at_a_time": 1.5}, "TypeError", "heads_at_a_time must be an integer or None, got float 1.5"),
    "both": ({"heads_at_a_time": 1, "method": "heads", "heads": 3}, "ValueError", "is for method 'gather'"),
    "flag": ({"check_ranks": 1}, "TypeError", "check_ranks must be True or False, got 1"),
    "sum": ({"sum_parameter_gradients": "no"}, "TypeError", "sum_parameter_gradients must be True or False, got 'no'"),
    "boundaries": ({"cu_seq": torch.tensor([0, 99])}, "ValueError", "must rise from 0 to at most 24 tokens"),
    "index": ({"cu_seq": [0, 9]}, "TypeError", "cu_seq must be a torch.Tensor, got list"),
    "packed": (
        {"cu_seq": torch.tensor([0, 9]), "key_lengths": torch.tensor([9])}, "ValueError", "exclude each other"
    ),
    "softcap": ({"alpha": 1.0, "softcap": 2.0}, "ValueError", "softcap with alpha=1"),
    "impl": ({"impl": "fastest"}, "ValueError", "impl must be one of .*'fastest'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_RANKS)
def test_wrong_calls_are_refused(pool, name):
    options, kind, message = ALL_RANKS[name]
    for answer in pool.answers(3, forward, **options):
        assert isinstance(answer, Failure), answer
        assert answer.of[0] == kind
        assert re.search(message, answer.of[1], re.DOTALL), answer.of[1]


ONE_RANK = {  # what rank 1 does otherwise, what it is told, and what the others are told
    "refused": (
        {"alpha": "a"},
        "alpha must be 1, a float",
        "rank 1 of the group refuses its call.*alpha must be 1, a float",
    ),
    "alpha": ({"alpha": 1.6}, "same call, got alpha 1.5 on ranks 0, 2, 1.6 on rank 1", None),
    "length": ({"length": 10}, r"query torch.float32 \(1, 4, 8, 4\) on cpu on ranks 0, 2, .*10", None),
    "dtype": ({"dtype": torch.float64}, "query torch.float32 .* on ranks 0, 2, torch.float64", None),
    "layout": ({"layout": "contiguous"}, "layout 'balanced' on ranks 0, 2, 'contiguous' on rank 1", None),
    "causal": ({"is_causal": True}, "is_causal False on ranks 0, 2, True on rank 1", None),
    "padding": ({"key_lengths": torch.tensor([5])}, r"key_lengths None on ranks 0, 2, .*\[5\] on rank 1", None),
    "sum": ({"sum_parameter_gradients": False}, "sum_parameter_gradients True on ranks 0, 2, False on rank 1", None),
}


@pytest.mark.parametrize("name", ONE_RANK)
def test_ranks_whose_calls_differ_are_all_refused(pool, name):
    own, told, others = ONE_RANK[name]
    by_rank = [{"alpha": 1.5}, {"alpha": 1.5} | own, {"alpha": 1.5}]
    for rank, answer in enumerate(pool.answers(3, forward, by_rank)):
        assert isinstance(answer, Failure), answer
        assert re.search(told if rank == 1 else others or told, answer.of[1], re.DOTALL), answer.of[1]
    for output in pool.run(3, forward):  # the group goes on
        torch.testing.assert_close(output, torch.ones(1, 4, 8, 4))


def test_a_mesh_of_one_dimension_is_a_group(pool):
    for output in pool.run(RANKS, forward, mesh=[0, 1, 2, 3]):
        torch.testing.assert_close(output, torch.ones(1, 4, 8, 4))
    for answer in pool.answers(RANKS, forward, mesh=[[0, 1, 2, 3]]):
        assert isinstance(answer, Failure), answer
        assert "must be a DeviceMesh of one dimension, got 2" in answer.of[1]


def test_without_a_group_there_is_no_call():
    query = torch.ones(1, 1, 4, 4)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup .*, got 'world'"):
        context_parallel_attention(query, query, query, group="world")


def test_a_message_shows_where_long_texts_differ():
    texts = [f"[{', '.join(['7'] * 400)}, {rank}]" for rank in (3, 4)]
    first, second = by_rank(texts).split(" on rank 0, ")
    assert first.endswith("7, 3]")
    assert second.endswith("7, 4] on rank 1")
    assert by_rank(["a", "b", "a"]) == "a on ranks 0, 2, b on rank 1"
