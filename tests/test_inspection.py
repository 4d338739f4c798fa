"""What inspection reports of any call and model: names, supports, thresholds, tiles, and rows as the reference's."""

import pytest
import torch
from cases import Case, attend, attend_with_support, make_case, packed_case
from checks import any_in_tiles
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_entmax import entmax_attention, inspection
from flash_entmax.backends import reference
from flash_entmax.backends.reference import entmax_rows
from flash_entmax.testing import iid_inputs, topic_inputs


def tensor(*numbers, dtype=None):
    return lambda backend: torch.tensor(numbers, device=backend.device, dtype=dtype)


def striped(backend):
    """Every third key, and of the keys from 64 on none but to the first 20 queries."""
    return create_block_mask(
        lambda b, h, i, j: (j % 3 == 0) & ((j < 64) | (i < 20)), 1, None, 70, 130, device=backend.device, BLOCK_SIZE=64
    )


# Options of `make_case`; those that are functions take the backend.
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "cross, grouped": {"heads": 4, "key_heads": 2, "length": 70, "key_length": 130, "is_causal": True, "batch": 2},
    "sparsemax": {"alpha": 2.0, "is_causal": True},
    "alpha 1.3": {"alpha": 1.3, "length": 70},
    "alpha and scale by head": {"alpha": tensor(1.25, 1.5), "scale": tensor(0.4, 0.1), "is_causal": True},
    "window": {"window_size": (9, 3)},
    "position": {"query_positions": -5, "is_causal": True, "length": 40, "key_length": 70},
    "positions": {"query_positions": tensor(*range(69, -1, -1)), "is_causal": True, "length": 70},
    "key lengths": {"key_lengths": tensor(0, 33), "batch": 2, "length": 70},
    "key mask": {"key_mask": lambda b: torch.arange(260, device=b.device).view(2, 130) % 3 > 0, "batch": 2},
    "block mask": {"block_mask": striped, "length": 70, "key_length": 130},
    "slopes": {"alibi_slopes": tensor(0.3, torch.inf), "length": 70},
    "softcap": {"softcap": 1.5, "scale": 1.0, "length": 70},
    "together": {
        "heads": 4, "key_heads": 2, "batch": 2, "length": 70, "key_length": 130, "window_size": (90, 5), "softcap": 2.0,
        "alibi_slopes": lambda b: torch.tensor([[0.1, 0, 0.2, -0.01], [0, 0.3, 0.1, 0]], device=b.device),
        "alpha": tensor(1.2, 1.5, 2.0, 1.7), "key_lengths": tensor(130, 77), "query_positions": 60,
        "key_mask": lambda b: torch.arange(260, device=b.device).view(2, 130) % 7 > 1,
    },
}  # fmt: skip
FOR_THE_INTERPRETER = ("causal", "alpha and scale by head", "block mask", "together")


def case_of(name: str, backend) -> Case:
    if backend.is_interpreted and name not in FOR_THE_INTERPRETER:
        pytest.skip("the interpreter takes a few of the options")
    options = {key: option(backend) if callable(option) else option for key, option in OPTIONS[name].items()}
    return make_case(backend, **options, dtype=torch.float64 if backend.impl == "torch" else torch.float32)


def recorded(case: Case, impl: str) -> inspection.RecordedCall:
    with inspection.record() as calls:
        attend(case, impl)
    (call,) = calls
    return call


def dense(case: Case) -> torch.Tensor:
    """(batch, heads, query length, key length) float64: the reference's output for values that are the unit vectors."""
    case = case.in_float64()
    query, key, _ = case.inputs
    value = torch.eye(key.shape[2], dtype=torch.float64, device=key.device).expand(*key.shape[:3], -1)
    return reference.attention(case.problem, query, key, value, case.visibility)[0]


def check_rows(call: inspection.RecordedCall, expected: torch.Tensor) -> None:
    for batch in range(call.problem.batch):
        for head in range(call.problem.heads):
            rows = call.rows(batch, head)
            assert rows.layout == torch.sparse_csr
            exact = expected[batch, head]
            assert torch.equal(rows.crow_indices().diff(), (exact > 0).sum(-1))
            assert torch.equal(rows.col_indices(), (exact > 0).nonzero()[:, 1])
            tolerance = 1e-10 if rows.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(rows.values().double(), exact[exact > 0], rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("keys", [None, (9, 0, 66, 0)], ids=["self", "cross"])
def test_rows_of_packed_sequences(backend, keys):
    dtype = torch.float64 if backend.impl == "torch" else torch.float32
    case = packed_case(backend, (5, 3, 70, 0), keys, spare=4, is_causal=True, dtype=dtype)
    call = recorded(case, backend.impl)
    check_rows(call, dense(case))
    check_keys_together(call, case, dense(case) > 0)
    assert (call.rows(0, 1).crow_indices().diff()[-4:] == 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(backend, name):
    """Of one call: rows, support, tiles, and what is computed from them."""
    case = case_of(name, backend)
    call, expected = recorded(case, backend.impl), dense(case)
    check_rows(call, expected)
    check_numbers(call, case, expected > 0)
    check_keys_together(call, case, expected > 0)
    _, support = attend_with_support(case, backend.impl)
    for ours, theirs in zip(call.support, support, strict=True):
        assert ours == theirs if isinstance(ours, tuple) else torch.equal(ours, theirs)
    assert torch.equal(call.tau, support.tau)


def check_numbers(call: inspection.RecordedCall, case: Case, exact: torch.Tensor) -> None:
    tile = call.support.tile_shape
    assert torch.equal(call.live_tiles, any_in_tiles(exact, tile))
    assert torch.equal(call.support.keys, any_in_tiles(exact, (tile[0], 1)).sum(-1))
    visible, _ = reference.visible_mask(case.problem, case.visibility, case.query.device)
    visible = any_in_tiles(visible.expand_as(exact), tile)
    assert torch.equal(call.visible_tiles, visible)
    empty = visible & ~any_in_tiles(exact, tile)
    assert call.block_sparsity.tolist() == pytest.approx(
        (empty.sum((0, 2, 3)).double() / visible.sum((0, 2, 3))).tolist()
    )
    along = empty.sum((0, 1, 3)).double() / visible.sum((0, 1, 3))
    assert call.block_sparsity_by_position.tolist() == pytest.approx(along.tolist(), nan_ok=True)
    sizes = exact.sum(-1).transpose(0, 1).flatten(1).double()
    means = [row[row > 0].mean().item() for row in sizes]
    assert call.keys_per_query.tolist() == pytest.approx(means)


def check_keys_together(call: inspection.RecordedCall, case: Case, exact: torch.Tensor) -> None:
    """Of each 64 consecutive queries: the keys that one of them attends to, and those that one of them sees."""
    visible, _ = reference.visible_mask(case.problem, case.visibility, case.query.device)
    live, seen = (any_in_tiles(marks, (64, 1)).sum(-1) for marks in (exact, visible.expand_as(exact)))
    assert torch.equal(call.live_keys, live)
    assert torch.equal(call.visible_keys, seen)
    assert call.key_sparsity.tolist() == pytest.approx((1 - live.sum((0, 2)).double() / seen.sum((0, 2))).tolist())
    means = [live[:, head][seen[:, head] > 0].double().mean().item() for head in range(live.shape[1])]
    assert call.keys_per_64_queries.tolist() == pytest.approx(means)
    own = call.support.tile_shape[0], 1
    live, seen = (any_in_tiles(marks, own).sum((0, 2, 3)).double() for marks in (exact, visible.expand_as(exact)))
    assert call.key_density.tolist() == pytest.approx((live / seen).tolist(), nan_ok=True)
    if own == (64, 1):
        assert call.key_density.tolist() == pytest.approx((1 - call.key_sparsity).tolist(), nan_ok=True)


def test_tau_is_in_units_of_z(backend):
    """A key has positive probability exactly when (alpha - 1) * score is above tau."""
    case = make_case(backend, length=70, alpha=1.7, scale=0.3)
    call = recorded(case, backend.impl)
    z = 0.7 * 0.3 * (case.query @ case.key.mT)
    assert torch.equal((z > call.tau.unsqueeze(-1)).sum(-1), (dense(case) > 0).sum(-1))


def test_visible_keys_of_a_causal_call(backend):
    call = recorded(make_case(backend, length=70, is_causal=True), backend.impl)
    assert call.visible_per_query == pytest.approx(71 / 2)


def test_keys_that_queries_far_apart_see_together():
    """Windows of one tile of queries that overlap, touch and leave gaps, in any order; and queries that see nothing."""
    positions = torch.tensor([90, 3, 4, 40, 250, 41, 44, -50, 91] + [200] * 60)
    query, key, value = iid_inputs(1, 1, 69, 16, key_length=220)
    with inspection.record() as calls:
        entmax_attention(query, key, value, query_positions=positions, window_size=(2, 1))
    seen = {k for position in positions[:64].tolist() for k in range(position - 2, position + 2) if 0 <= k < 220}
    assert calls[0].visible_keys.tolist() == [[[len(seen), 4]]]
    assert calls[0].live_keys[0, 0, 1] <= 4


# Rows that are none, and memory


def test_rows_without_a_key_or_with_a_nan_are_empty():
    query, key, value = iid_inputs(1, 1, 66, 16)
    query[0, 0, 40, 3] = torch.nan
    with inspection.record() as calls:
        entmax_attention(query, key, value, is_causal=True, query_positions=-2)
    sizes = calls[0].rows().crow_indices().diff()
    assert (sizes == 0).nonzero().flatten().tolist() == [0, 1, 40]
    assert calls[0].rows().values().isfinite().all()


def test_a_probability_is_never_rounded_to_zero():
    """At alpha 1.02 p is the 50th power of a distance: far below what float32 holds."""
    query = torch.ones(1, 1, 1, 16)
    key = torch.linspace(-46, 0, 60).view(1, 1, 60, 1).expand(1, 1, 60, 16).contiguous()
    rows = inspection.attention_rows(query, key, alpha=1.02, scale=1 / 16)
    assert (rows.values() > 0).all()
    assert (rows.values() == torch.finfo(torch.float32).tiny).any()


def test_memory_of_rows_follows_the_support():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.layout == torch.strided:
                self.numel = max(self.numel, result.numel())
            return result

    length = 4096
    with inspection.record() as calls:
        entmax_attention(*topic_inputs(1, 1, length, 64, 32), is_causal=True)
    with Largest() as largest:
        rows = calls[0].rows()
        assert calls[0].live_keys.shape == (1, 1, 64)
        assert calls[0].visible_keys.sum() == 64 * 65 / 2 * 64
    assert largest.numel < length**2 / 16
    assert rows.to_dense().sum(-1).allclose(torch.ones(length))


# Recording


class Attention(nn.Module):
    def __init__(self, impl: str = "auto") -> None:
        super().__init__()
        self.mix, self.impl = nn.Linear(16, 48, bias=False), impl

    def forward(self, x):
        query, key, value = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return entmax_attention(query, key, value, is_causal=True, impl=self.impl).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, impl: str = "auto", layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": Attention(impl)}) for _ in range(layers))

    def forward(self, x, own=False):
        for layer in self.layers:
            x = x + layer["attention"](x)
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return entmax_attention(heads, heads, heads) if own else x


def test_calls_are_named_after_modules(backend):
    model = Model(backend.impl).to(backend.device)
    x = torch.randn(2, 20, 16, device=backend.device)
    with inspection.record(model) as calls:
        model(x, own=not backend.is_interpreted)
    expected = ["layers.0.attention", "layers.1.attention", "Model"][: 2 if backend.is_interpreted else 3]
    assert [call.name for call in calls] == expected
    assert [call.number for call in calls] == list(range(len(calls)))
    assert (calls[1].problem.batch, calls[1].problem.heads, calls[1].problem.query_length) == (2, 2, 20)
    assert calls[0].impl == backend.impl
    assert repr(calls[0]).startswith("RecordedCall('layers.0.attention', batch 2, heads 2, 20 queries, 20 keys")
    with inspection.record() as unnamed:
        model(x)
    assert [call.name for call in unnamed] == ["call 0", "call 1"]
    model(x)
    assert len(calls) == len(expected)


def test_nothing_stays_on_the_model():
    model, x = Model(), torch.randn(1, 5, 16)
    with pytest.raises(RuntimeError), inspection.record(model) as calls:
        model(torch.randn(1, 5, 3))
    assert calls == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with inspection.record(model) as calls:
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 5, 3))
        entmax_attention(*iid_inputs(1, 1, 5, 8))
        model(x)
    assert [call.name for call in calls] == ["call 0", "layers.0.attention", "layers.1.attention"]


def test_a_recording_in_another_is_recorded_once():
    query = torch.randn(1, 2, 64, 16)
    with inspection.record() as outer:
        with inspection.record() as inner:
            entmax_attention(query, query, query)
        entmax_attention(query, query, query)
    assert ([call.name for call in outer], [call.name for call in inner]) == (["call 0", "call 1"], ["call 0"])


def test_only_some_calls():
    model, x = Model(layers=4), torch.randn(1, 5, 16)
    with inspection.record(model, only=lambda name: name.startswith("layers.2")) as calls:
        model(x)
    assert [(call.name, call.number) for call in calls] == [("layers.2.attention", 2)]


def test_released_inputs():
    model, x = Model(), torch.randn(1, 70, 16)
    with inspection.record(model) as kept:
        model(x)
    with inspection.record(model, keep_inputs=False) as calls:
        model(x)
    assert torch.equal(calls[1].support.size, kept[1].support.size)
    assert torch.equal(calls[1].block_sparsity, kept[1].block_sparsity)
    assert torch.equal(calls[1].key_density, kept[1].key_density)
    with pytest.raises(RuntimeError, match=r"query and key of 'layers.1.attention' were released"):
        calls[1].rows()


def test_inputs_written_to_after_the_call_are_refused():
    query, key, value = iid_inputs(1, 1, 20, 8)
    with inspection.record() as calls:
        entmax_attention(query, key[:, :, :10], value[:, :, :10])
        entmax_attention(query, key, value)
    rows = calls[0].rows()
    key[:, :, 10:] += 1
    with pytest.raises(RuntimeError, match=r"query or key of 'call 0' was written to after the call"):
        calls[0].rows()
    assert rows.shape == (20, 10)


def test_autograd_and_its_modes():
    model, x = Model(), torch.randn(1, 70, 16)
    with inspection.record(model) as plain:
        expected = model(x)
        model(x).sum().backward()
    assert len(plain) == 4
    assert not any(tensor.requires_grad for tensor in plain[0].inputs)
    with inspection.record(model) as calls, torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert torch.equal(calls[1].rows().col_indices(), plain[1].rows().col_indices())
    with inspection.record(model) as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert calls[0].dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_is_not_recorded(use_reentrant):
    model, x = Model(), torch.randn(1, 70, 16, requires_grad=True)
    with inspection.record(model) as calls:
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert [call.name for call in calls] == ["layers.0.attention", "layers.1.attention"]
    assert x.grad.abs().sum() > 0


def test_compiled_code_is_recorded():
    model, x = Model(), torch.randn(1, 70, 16)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with inspection.record(compiled) as calls:
        compiled(x)
    assert [call.name for call in calls] == ["layers.0.attention", "layers.1.attention"]


def test_attention_rows():
    query, key, value = iid_inputs(2, 4, 70, 16, key_heads=2)
    options = {"is_causal": True, "window_size": (30, -1), "alpha": 1.7}
    with inspection.record() as calls:
        entmax_attention(query, key, value, **options)
    rows = inspection.attention_rows(query, key, batch=1, head=3, **options)
    assert torch.equal(rows.to_dense(), calls[0].rows(1, 3).to_dense())
    for wrong in ({"alpha": 1.0}, {"impl": "reference"}, {"return_support": True}):
        with pytest.raises(ValueError, match=r"dense|return_support"):
            inspection.attention_rows(query, key, **wrong)
    with pytest.raises(TypeError, match="is_casual"):
        inspection.attention_rows(query, key, is_casual=True)
    with pytest.raises(IndexError, match="head must be from 0 to 3, got 4"):
        calls[0].rows(0, 4)


# Transformers


def tiny_llama(layers=2):
    pytest.importorskip("transformers")
    pytest.importorskip("flash_entmax.integrations.transformers").register()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, attn_implementation="entmax15",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_model_of_transformers():
    """Left padding in the second row: its queries have no keys, and nobody attends to it."""
    model = tiny_llama()
    ids = torch.randint(64, (2, 70), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    seen[1, :9] = 0
    with torch.no_grad(), inspection.record(model) as calls:
        model(ids, attention_mask=seen)
    assert [call.name for call in calls] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    query, key = (tensor.double() for tensor in calls[1].inputs)
    z = 0.5 * 8**-0.5 * (query @ key.repeat_interleave(2, dim=1).mT)
    hidden = torch.ones(70, 70).triu(1).bool() | ~seen.bool()[:, None, None, :]
    expected = entmax_rows(z.masked_fill(hidden, -torch.inf), 1.5)[0]
    check_rows(calls[1], expected)
    rows = calls[1].rows(1, 0)
    assert (rows.crow_indices()[:10] == 0).all()
    assert rows.col_indices().min() == 9
