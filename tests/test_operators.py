"""The operators as PyTorch sees them: schemas, shapes for tracing, compilation, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_entmax import entmax_attention, ops
from flash_entmax.testing import iid_inputs, topic_inputs

each_mask = pytest.mark.parametrize("is_causal", [False, True])
SCALARS = (1.5, True, 0.25)


def leaves(*sizes, **options):
    return tuple(tensor.requires_grad_() for tensor in iid_inputs(*sizes, **options))


def shapes(backend):
    length = backend.sizes(40, 150, 300)
    yield {"query_length": length, "key_length": length}
    yield {"query_length": 3, "key_length": length, "key_heads": 1}
    yield {"query_length": length, "key_length": 65, "value_dim": 5}


def forward(tensors, backend, scalars=SCALARS):
    return ops.attention(*(t.detach() for t in tensors), *scalars, backend.impl)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_opcheck_attention(backend, alpha):
    for shape in shapes(backend):
        tensors = leaves(1, 2, dim=16, device=backend.device, **shape)
        torch.library.opcheck(ops.attention, (*tensors, alpha, True, 0.25, backend.impl))


def test_opcheck_of_strided_inputs(backend):
    tensors = tuple(
        t.transpose(1, 2).detach().requires_grad_() for t in iid_inputs(1, 70, 2, 16, device=backend.device)
    )
    torch.library.opcheck(ops.attention, (*tensors, *SCALARS, backend.impl))


def test_opcheck_backward_and_support(backend):
    for shape in shapes(backend):
        tensors = iid_inputs(1, 2, dim=16, device=backend.device, **shape)
        output, *saved = forward(tensors, backend)
        torch.library.opcheck(
            ops.attention_backward, (torch.randn_like(output), *tensors, *saved, *SCALARS, backend.impl)
        )
        torch.library.opcheck(ops.attention_support, (*tensors, *saved[1:], *SCALARS, backend.impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(backend, dtype):
    if dtype not in backend.dtypes:
        tensors = iid_inputs(1, 1, 3, 4, dtype=dtype, device=backend.device)
        with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
            entmax_attention(*tensors, impl=backend.impl)
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    def everything(tensors):
        output, *saved = forward(tensors, backend)
        gradients = ops.attention_backward(output, *tensors, *saved, *SCALARS, backend.impl)
        return output, *saved, *gradients, *ops.attention_support(*tensors, *saved[1:], *SCALARS, backend.impl)

    for shape in shapes(backend):
        tensors = iid_inputs(1, 2, dim=16, dtype=dtype, device=backend.device, **shape)
        tensors = tensors[0].transpose(1, 2).contiguous().transpose(1, 2), *tensors[1:]
        real = everything(tensors)
        with FakeTensorMode() as mode:
            fake = everything(tuple(mode.from_tensor(tensor) for tensor in tensors))
        for ours, theirs in zip(fake, real, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
            assert ours.device.type == theirs.device.type


class Layer(torch.nn.Module):
    """A training step's worth of model: projections around the attention, heads seen through a transpose."""

    def __init__(self, backend, is_causal: bool) -> None:
        super().__init__()
        self.impl, self.is_causal = backend.impl, is_causal
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 32, 32, generator=generator) * 0.4
        self.weight = torch.nn.Parameter(weight.to(backend.device))

    def forward(self, x):
        heads = (torch.nn.functional.linear(x, w).unflatten(-1, (2, 16)).transpose(1, 2) for w in self.weight)
        output = entmax_attention(*heads, is_causal=self.is_causal, impl=self.impl)
        return torch.tanh(output.transpose(1, 2).flatten(2)) + x


def step(layer, x):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output = layer(x)
    output.square().mean().backward()
    return output.detach(), x.grad, layer.weight.grad.clone()


def tokens(backend, length, batch=1):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 32, generator=generator).to(backend.device)


def assert_same(actual, expected, **tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@each_mask
def test_compiled_training_step_equals_eager(backend, is_causal):
    torch._dynamo.reset()
    layer = Layer(backend, is_causal)
    compiled = torch.compile(layer, fullgraph=True)
    x = tokens(backend, backend.sizes(70, 150, 500))
    assert_same(step(compiled, x), step(layer, x), rtol=1e-4, atol=1e-5)


def test_compiled_once_for_every_length(backend):
    """dynamic=True: new lengths and batch sizes do not compile again.

    That is, while the live map has more than one tile and the same number of words, up to 32 tiles each: PyTorch
    compiles extents of 0 and 1 by themselves.
    """
    torch._dynamo.reset()
    layer = Layer(backend, True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    step(compiled, tokens(backend, backend.sizes(34, 130, 130), batch=2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in backend.sizes(((36, 2), (40, 3)), ((66, 2), (100, 3), (700, 2)), ((66, 2), (700, 3))):
            x = tokens(backend, length, batch)
            assert_same(step(compiled, x), step(layer, x), rtol=1e-4, atol=1e-5)


def test_support_in_a_compiled_graph(backend):
    torch._dynamo.reset()
    tensors = iid_inputs(1, 2, 70, 16, device=backend.device)

    def attend(*tensors):
        output, support = entmax_attention(*tensors, impl=backend.impl, return_support=True)
        return output, support.tau, support.size, support.tiles

    assert_same(torch.compile(attend, fullgraph=True)(*tensors), attend(*tensors))


@each_mask
def test_checkpointing_changes_nothing(backend, is_causal):
    layer = Layer(backend, is_causal)
    x = tokens(backend, backend.sizes(50, 100, 100))

    class Checkpointed(torch.nn.Module):
        weight = layer.weight

        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=False)

    assert_same(step(Checkpointed(), x), step(layer, x), rtol=0, atol=0)


def test_double_backward_is_refused(backend):
    """A second derivative is not defined here: it must raise, not be silently wrong."""
    query, key, value = leaves(1, 1, 20, 8, device=backend.device)
    output = entmax_attention(query, key, value, impl=backend.impl)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), query)


def test_a_penalty_on_the_gradient_is_refused(backend):
    """grad_output needs no gradient here, and still the gradient depends on the query."""
    query, key, value = leaves(1, 1, 20, 8, device=backend.device)
    output = entmax_attention(query, key, value, impl=backend.impl)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError):
        (output.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("impl", ["own", "reference"])
def test_autocast_casts_nothing_inside(backend, impl):
    impl = backend.impl if impl == "own" else impl
    tensors = leaves(1, 1, 40, 16, device=backend.device)
    plain = entmax_attention(*tensors, impl=impl)
    with torch.autocast(backend.device, torch.bfloat16):
        output = entmax_attention(*tensors, impl=impl)
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert torch.equal(output, plain)
    assert all(torch.equal(*pair) for pair in zip(gradients, torch.autograd.grad(plain.sum(), tensors), strict=True))


def test_saved_memory_is_linear_in_the_length(backend):
    """What the backward keeps: the inputs, value_mean, two numbers a row and one bit a tile, never the scores."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    length, dim = backend.sizes(192, 1024, 4096), 16
    tensors = [t.requires_grad_() for t in topic_inputs(1, 1, length, dim, 4, device=backend.device)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entmax_attention(*tensors, impl=backend.impl)
    bits = length * length / 8
    assert sum(kept) <= 4 * length * (4 * dim + 2) + bits / 32
