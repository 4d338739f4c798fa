"""The operators as PyTorch sees them: schemas, shapes for tracing, compilation, checkpointing."""

import pytest
import torch
from cases import Case, make_case
from checks import operator_arguments
from torch.utils.checkpoint import checkpoint

from flash_entmax import entmax_attention, summarise_keys
from flash_entmax.operators import attention as ops
from flash_entmax.testing import iid_inputs, topic_inputs

each_mask = pytest.mark.parametrize("is_causal", [False, True])


def leaves(*sizes, **options):
    return tuple(tensor.requires_grad_() for tensor in iid_inputs(*sizes, **options))


def every_option(backend, length, key_length) -> dict:
    """One option for each argument of the operators."""
    device = backend.device
    alpha, scale, slopes = (torch.tensor(pair, device=device) for pair in ((1.4, 1.8), (0.2, 0.3), (0.1, 0.0)))
    return {
        "alpha": alpha, "scale": scale, "alibi_slopes": slopes, "softcap": 5.0, "window_size": (30, 20),
        "key_mask": torch.arange(key_length, device=device)[None] % 5 > 0,
    }  # fmt: skip


def shapes(backend):
    length = backend.sizes(40, 150, 300)
    yield {"length": length, "key_length": length}
    yield {"length": 3, "key_length": length, "key_heads": 1}
    yield {"length": length, "key_length": 65, "value_dim": 5}


def arguments_of(case: Case, backend) -> list:
    """Those of the operator, as leaves."""
    found = operator_arguments(case.with_tensors(**case.leaves()), backend.impl)
    return [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in found]


def calls(arguments) -> tuple[tuple, tuple]:
    """Arguments of the backward and of the support, by a forward pass."""
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    output, *saved = ops.attention(*arguments)
    inputs, options = arguments[:3], arguments[4:]
    tensors, numbers = options[: ops.TENSORS], options[ops.TENSORS :]
    backward = torch.randn_like(output), *inputs, *saved, tensors[0] is not None, *tensors, *numbers
    return backward, (*inputs, *tensors, *saved[1:], *numbers)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_opcheck_attention(backend, alpha):
    for shape in shapes(backend):
        case = make_case(backend, **shape, alpha=alpha, is_causal=True)
        torch.library.opcheck(ops.attention, arguments_of(case, backend))


def test_opcheck_with_every_argument(backend):
    length, key_length = backend.sizes((20, 40), (70, 130), (150, 300))
    case = make_case(backend, length=length, key_length=key_length, **every_option(backend, length, key_length))
    case.options["key_summary"] = summarise_keys(case.key, impl=backend.impl)
    arguments = arguments_of(case, backend)
    missing = [index for index, argument in enumerate(arguments) if argument is None]
    assert len(missing) == ops.ROUNDED, "all but KeySummaries, which are for calls without gradients"
    torch.library.opcheck(ops.attention, arguments)
    backward, support = calls(arguments)
    torch.library.opcheck(ops.attention_backward, backward)
    torch.library.opcheck(ops.attention_support, support)


def test_opcheck_of_strided_inputs(backend):
    tensors = (t.transpose(1, 2) for t in iid_inputs(1, 70, 2, 16, device=backend.device))
    torch.library.opcheck(ops.attention, arguments_of(Case(*tensors, is_causal=True), backend))


def test_opcheck_backward_and_support(backend):
    for shape in shapes(backend):
        backward, support = calls(arguments_of(make_case(backend, **shape, is_causal=True), backend))
        torch.library.opcheck(ops.attention_backward, backward)
        torch.library.opcheck(ops.attention_support, support)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(backend, dtype):
    if dtype not in backend.dtypes:
        tensors = iid_inputs(1, 1, 3, 4, dtype=dtype, device=backend.device)
        with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
            entmax_attention(*tensors, impl=backend.impl)
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    def everything(arguments):
        backward, support = calls(arguments)
        return *ops.attention(*arguments), *ops.attention_backward(*backward), *ops.attention_support(*support)

    for shape in shapes(backend):
        case = make_case(backend, dtype=dtype, **shape, **every_option(backend, shape["length"], shape["key_length"]))
        case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments_of(case, backend)]
        real = everything(arguments)
        with FakeTensorMode() as mode:
            fake = everything([mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
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
    """dynamic=True: new lengths from 2 on, and batch sizes, do not compile again, however many tiles they make."""
    torch._dynamo.reset()
    layer = Layer(backend, True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    step(compiled, tokens(backend, backend.sizes(34, 130, 130), batch=2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch in backend.sizes(
            ((2, 2), (40, 3)), ((2, 2), (64, 3), (65, 3), (2100, 2)), ((2, 2), (65, 3), (2100, 3))
        ):
            x = tokens(backend, length, batch)
            assert_same(step(compiled, x), step(layer, x), rtol=1e-4, atol=1e-5)


def test_support_in_a_compiled_graph(backend):
    torch._dynamo.reset()
    tensors = iid_inputs(1, 2, 70, 16, device=backend.device)

    def attend(*tensors):
        output, support = entmax_attention(*tensors, impl=backend.impl, return_support=True)
        return output, support.tau, support.size, support.tiles, support.keys

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_the_inputs_and_nothing_inside(backend, impl, dtype):
    """As scaled_dot_product_attention: the inputs in autocast's dtype, float64 as it is; then the same bits as without
    autocast, and gradients in the dtype of the leaves."""
    impl = backend.impl if impl == "own" else impl
    if dtype not in backend.dtypes and impl == "triton":
        dtype = torch.float16
    narrow = torch.float16
    tensors = leaves(1, 1, 40, 16, dtype=dtype, device=backend.device)
    plain = entmax_attention(*(t if dtype == torch.float64 else t.to(narrow) for t in tensors), impl=impl)
    expected = torch.autograd.grad(plain.sum(), tensors)
    with torch.autocast(backend.device, narrow):
        output = entmax_attention(*tensors, impl=impl)
        gradients = torch.autograd.grad(output.sum(), tensors)
    assert output.dtype == plain.dtype == (torch.float64 if dtype == torch.float64 else narrow)
    assert torch.equal(output, plain)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, other)


def test_saved_memory_is_linear_in_the_length(backend):
    """What the backward keeps beside the inputs: at most 512 bytes for each query of a head, never the scores."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    length, dim = backend.sizes(192, 1024, 4096), 16
    tensors = [t.requires_grad_() for t in topic_inputs(1, 1, length, dim, 4, device=backend.device)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entmax_attention(*tensors, impl=backend.impl)
    assert sum(kept) <= 4 * length * 3 * dim + 512 * length
