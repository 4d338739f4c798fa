"""PyTorch's machinery around the attention: compile, export, checkpoints, FLOP counts, CUDA graphs."""

from functools import partial

import pytest
import torch
from cases import boundaries, longest, make_case, packed_case
from conftest import HAS_CUDA
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from flash_entmax import (
    entmax_attention,
    entmax_attention_varlen,
    linear_entmax_loss,
    linear_form,
    register_flop_formulas,
)
from flash_entmax.backends import BACKENDS
from flash_entmax.nn import EntmaxAttention
from flash_entmax.testing import iid_inputs

OPERATOR = torch.ops.flash_entmax.attention.default


def step(function, leaves: dict, *arguments):
    """Output and the gradients of all leaves."""
    output = function(*leaves.values(), *arguments)
    return output.detach(), *torch.autograd.grad(output.square().sum(), list(leaves.values()))


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# torch.compile


def learned_attention(query, key, value, alpha, scale, slopes, impl):
    return entmax_attention(
        query, key, value, alpha=alpha, scale=scale, alibi_slopes=slopes, is_causal=True, window_size=(50, 0), impl=impl
    )


def learned_leaves(backend, length, alpha, batch=3):
    case = make_case(
        backend, batch=batch, length=length, alpha=torch.tensor(alpha, device=backend.device),
        scale=torch.tensor(0.3, device=backend.device), alibi_slopes=torch.tensor([0.1, 0.0], device=backend.device),
    )  # fmt: skip
    return case.leaves()


def test_a_learned_alpha_compiles_once(backend):
    """Its value changes, nothing is compiled again, and results are those of eager."""
    torch._dynamo.reset()
    compiled = torch.compile(learned_attention, fullgraph=True, dynamic=False)
    length = backend.sizes(40, 130, 300)
    step(compiled, learned_leaves(backend, length, 1.5), backend.impl)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (1.3, 1.9, 2.0):
            leaves = learned_leaves(backend, length, alpha)
            assert_same(step(compiled, leaves, backend.impl), step(learned_attention, leaves, backend.impl))


@pytest.mark.parametrize(
    "compute", [partial(entmax_attention, impl="reference"), linear_form], ids=("reference", "linear form")
)
def test_a_number_alpha_may_change_in_plain_pytorch(compute):
    """Compiled for one number, then for any, with a whole exponent or without."""
    torch._dynamo.reset()
    tensors = [tensor.double() for tensor in iid_inputs(1, 2, 20, 8)]
    compiled = torch.compile(lambda alpha: compute(*tensors, alpha=alpha), backend="aot_eager", fullgraph=True)
    for alpha in (2.0, 1.5, 4 / 3) if compute is linear_form else (1.3, 1.2, 1.35, 1.1):
        torch.testing.assert_close(compiled(alpha), compute(*tensors, alpha=alpha))


def test_a_block_mask_is_not_read_in_a_compiled_graph():
    torch._dynamo.reset()
    mask, tensors = (
        create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu"),
        iid_inputs(1, 2, 64, 8),
    )
    compiled = torch.compile(entmax_attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"inside torch.compile|ExceptionVariable\(<class 'ValueError'>\)"):
        compiled(*tensors, block_mask=mask)


def test_a_block_mask_is_read_beside_a_compiled_graph():
    """Where breaks are allowed the call is not compiled, and sees what the mask says now."""
    torch._dynamo.reset()
    table, tensors = torch.arange(64) // 10, iid_inputs(1, 2, 64, 8)
    mask = create_block_mask(lambda b, h, q, k: table[q] == table[k], None, None, 64, 64, device="cpu")
    compiled = torch.compile(entmax_attention, backend="eager")
    for step in (10, 7, 7, 9):
        table.copy_(torch.arange(64) // step)
        expected = entmax_attention(*tensors, block_mask=mask, impl="reference")
        torch.testing.assert_close(compiled(*tensors, block_mask=mask), expected)


def test_every_length_compiles_once(backend):
    torch._dynamo.reset()
    compiled = torch.compile(learned_attention, fullgraph=True, dynamic=True)
    step(compiled, learned_leaves(backend, backend.sizes(70, 130, 130), 1.5), backend.impl)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in backend.sizes(((80, 4),), ((100, 4), (300, 5)), ((100, 4), (900, 5))):
            leaves = learned_leaves(backend, length, 1.7, batch)
            assert_same(step(compiled, leaves, backend.impl), step(learned_attention, leaves, backend.impl))


def test_a_compiled_mask_and_lengths(backend):
    torch._dynamo.reset()

    def masked(query, key, value, lengths, mask):
        return entmax_attention(
            query, key, value, key_lengths=lengths, key_mask=mask, window_size=(40, 10), impl=backend.impl
        )

    compiled = torch.compile(masked, fullgraph=True)
    leaves = make_case(backend, batch=2, length=70).leaves()
    mask = torch.arange(70, device=backend.device) % torch.tensor([[3], [7]], device=backend.device) > 0
    for lengths in ((70, 30), (0, 64)):
        lengths = torch.tensor(lengths, device=backend.device)
        assert_same(step(compiled, leaves, lengths, mask), step(masked, leaves, lengths, mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_sequences_compile(backend, dynamic):
    """Boundaries are data: other ones of the same number compile nothing."""
    torch._dynamo.reset()

    def packed(query, key, value, cu_seq, most):
        return entmax_attention_varlen(query, key, value, cu_seq, None, most, most, is_causal=True, impl=backend.impl)

    compiled = torch.compile(packed, fullgraph=True, dynamic=dynamic)
    leaves = packed_case(backend, (70,)).leaves()
    cu_seq = boundaries((20, 0, 44), backend.device)
    assert_same(step(compiled, leaves, cu_seq, 70), step(packed, leaves, cu_seq, 70))
    with torch._dynamo.config.patch(error_on_recompile=True):
        cu_seq = boundaries((1, 50, 3), backend.device)
        assert_same(step(compiled, leaves, cu_seq, 70), step(packed, leaves, cu_seq, 70))
        if dynamic:  # nor does another number of tokens, or another longest sequence
            leaves = packed_case(backend, (100,)).leaves()
            assert_same(step(compiled, leaves, cu_seq, 90), step(packed, leaves, cu_seq, 90))


# torch.export


class Attention(torch.nn.Module):
    """A layer with a learned alpha, as a model would hold it."""

    def __init__(self, backend) -> None:
        super().__init__()
        self.impl = backend.impl
        self.alpha = torch.nn.Parameter(torch.tensor([1.4, 1.6], device=backend.device))

    def forward(self, query, key, value):
        return entmax_attention(query, key, value, alpha=self.alpha, is_causal=True, impl=self.impl)


def test_export(backend):
    """The exported program holds the operator, and gives what the module gives for any batch size and length."""
    module = Attention(backend)
    tensors = iid_inputs(3, 2, 70, 16, device=backend.device)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=65_536)
    program = torch.export.export(module, tensors, dynamic_shapes=[{0: batch, 2: length}] * 3, strict=False)
    assert OPERATOR in {node.target for node in program.graph.nodes}
    for of_batch, of_length in backend.sizes(
        [(2, 2)], [(3, 70), (2, 2), (2, 64), (2, 2100)], [(3, 70), (2, 2), (2, 2100)]
    ):
        other = iid_inputs(of_batch, 2, of_length, 16, device=backend.device)
        assert_same([program.module()(*other)], [module(*other)])


def test_export_of_a_layer_of_any_length():
    """With parameters, and without a largest length."""
    layer, x = EntmaxAttention(16, 4), torch.randn(2, 9, 16)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": shape})
    for batch, length in ((1, 1), (2, 65), (3, 300)):
        other = torch.randn(batch, length, 16)
        torch.testing.assert_close(program.module()(other), layer(other))


def masked(query, key, value, mask, impl):
    return entmax_attention(query, key, value, key_mask=mask, is_causal=True, impl=impl)


def softmax(query, key, value, mask, impl):
    return entmax_attention(query, key, value, key_mask=mask, alpha=1, impl=impl)


def packed(query, key, value, mask, impl):
    tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    cu_seq, longest = boundaries((1, 1), query.device), query.shape[2]
    return entmax_attention_varlen(*tokens, cu_seq, None, longest, longest, impl=impl)


def linear(query, key, value, mask, impl):
    hidden, target = query[0, 0], mask[0].long()
    return linear_entmax_loss(hidden, key[0, 0, :2], target, impl=impl)


@pytest.mark.parametrize("call", [masked, softmax, packed, linear])
def test_one_graph_for_all_lengths(backend, call):
    """dynamic=True, for lengths of one tile, of some, and of more than a word has bits for."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")

    def inputs(length):
        leaves = {
            name: tensor.requires_grad_()
            for name, tensor in zip(("q", "k", "v"), iid_inputs(2, 2, length, 16, device=backend.device), strict=True)
        }
        return leaves, (torch.arange(length, device=backend.device) % 3 > 0).expand(2, -1), backend.impl

    def run_with(function, length):
        leaves, *rest = inputs(length)
        output = function(*leaves.values(), *rest)
        gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()), allow_unused=True)
        return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]

    run_with(compiled, 70)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in backend.sizes((2, 40), (2, 64, 65, 2100), (2, 64, 65, 2100)):
            assert_same(run_with(compiled, length), run_with(call, length))


# Activation checkpointing


def save_attention(_, operator, *arguments, **options):
    return CheckpointPolicy.MUST_SAVE if operator is OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {"context_fn": partial(create_selective_checkpoint_contexts, save_attention)}


@pytest.mark.parametrize(("options", "runs"), [({}, 2), (SELECTIVE, 1)], ids=["all", "selective"])
def test_selective_checkpointing_saves_the_attention(backend, options, runs, monkeypatch):
    """A plain checkpoint computes the attention twice, a selective one that saves it once; gradients stay the same."""
    module, leaves = Attention(backend), make_case(backend, length=50).leaves()
    stages = BACKENDS[backend.impl]
    original, calls = stages.attention_forward, []

    def counted(*arguments):
        calls.append(1)
        return original(*arguments)

    def layer(query, key, value):
        return torch.tanh(module(query * 1.0, key * 1.0, value * 1.0)) * 2

    expected = step(layer, leaves)
    monkeypatch.setattr(stages, "attention_forward", counted)
    actual = step(partial(checkpoint, layer, use_reentrant=False, **options), leaves)
    assert len(calls) == runs
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


# FLOPs


@pytest.mark.parametrize("key_heads", [1, 4])
def test_flops_are_those_of_dense_attention(backend, key_heads):
    """As for scaled_dot_product_attention: 2 products of all pairs, whatever is skipped, and 5 for the gradient."""
    shape = {"query_length": 20, "dim": 16, "key_length": 30, "key_heads": key_heads, "value_dim": 8}
    leaves = [tensor.requires_grad_() for tensor in iid_inputs(2, 4, device=backend.device, **shape)]
    register_flop_formulas()
    pairs = 2 * 4 * 20 * 30
    forward, backward = 2 * pairs * (16 + 8), 2 * pairs * (3 * 16 + 2 * 8)
    with FlopCounterMode(display=False) as dense, sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(*(t.detach().cpu() for t in leaves), enable_gqa=True)
    with FlopCounterMode(display=False) as ours:
        output = entmax_attention(*leaves, impl=backend.impl)
    assert dense.get_total_flops() == forward
    assert ours.get_total_flops() == forward
    with FlopCounterMode(display=False) as ours:
        output.sum().backward()
    assert ours.get_total_flops() == backward


def test_flops_of_a_linear_loss_are_those_of_its_products():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        linear_entmax_loss(hidden, weight, torch.zeros(6).long()).backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 8 * 10


# Second derivatives


@pytest.mark.parametrize("name", ["alpha", "scale", "slopes"])
def test_second_derivatives_of_parameters_are_refused(backend, name):
    leaves = learned_leaves(backend, 20, 1.5)
    output = learned_attention(*leaves.values(), backend.impl)
    leaf = leaves["alibi_slopes" if name == "slopes" else name]
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), leaf)


# CUDA graphs


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graph_replays_on_new_data(packed):
    """Forward and backward, captured once: a replay sees new inputs, alpha and boundaries in the same memory."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (500, 4, 64) if packed else (2, 4, 500, 64)
    leaves = [torch.randn(shape, generator=generator, device="cuda", requires_grad=True) for _ in range(3)]
    leaves.append(torch.tensor([1.5, 1.3, 1.7, 2.0], device="cuda", requires_grad=True))
    cu_seq = boundaries((300, 0, 200), "cuda")

    def training_step():
        *tensors, alpha = leaves
        if packed:
            output = entmax_attention_varlen(*tensors, cu_seq, None, 500, 500, alpha=alpha, is_causal=True)
        else:
            output = entmax_attention(*tensors, alpha=alpha, is_causal=True)
        return output.detach(), *torch.autograd.grad(output.square().sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            training_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step()
    with torch.no_grad():
        for tensor in leaves[:3]:
            tensor.normal_(generator=generator)
        leaves[3].copy_(torch.tensor([1.2, 2.0, 1.5, 1.4]))
        cu_seq.copy_(boundaries((10, 90, 350), "cuda"))
    assert longest(cu_seq) <= 500
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, training_step(), strict=True))


def test_flops_of_a_tangent():
    """The pass itself, and three products of scores and two of values for the tangents."""
    register_flop_formulas()
    query, key, value = torch.randn(1, 4, 20, 16), torch.randn(1, 4, 30, 16), torch.randn(1, 4, 30, 8)
    with FlopCounterMode(display=False) as counter:
        torch.func.jvp(lambda query: entmax_attention(query, key, value), (query,), (query,))
    assert counter.get_total_flops() == 4 * 20 * 30 * 2 * ((16 + 8) + (3 * 16 + 2 * 8))
