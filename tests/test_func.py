"""torch.func: gradients, samples side by side, ensembles of parameters; each against single calls of plain autograd."""

from functools import partial

import pytest
import torch
from cases import boundaries
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from flash_entmax import entmax, entmax_attention, entmax_attention_varlen, entmax_loss, linear_entmax_loss
from flash_entmax.nn import EntmaxAttention

# No operator may fall back on PyTorch's slow rule, which says so.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")

SAMPLES = 2
MASK = torch.arange(12) % 3 > 0
ALPHAS = torch.tensor([1.2, 1.9])


def attention(**options):
    def function(backend, query, key, value, *learned):
        given = {
            name: tensor.to(backend.device) for name, tensor in options.items() if isinstance(tensor, torch.Tensor)
        }
        numbers = dict(zip(("alpha", "scale", "alibi_slopes"), learned, strict=False))
        return entmax_attention(query, key, value, impl=backend.impl, **options | given | numbers)

    return function


def packed(backend, query, key, value):
    cu_seq = boundaries((7, 0, 12), backend.device)
    return entmax_attention_varlen(query, key, value, cu_seq, None, 12, 12, is_causal=True, impl=backend.impl)


def classes_of(backend, count, among):
    return (torch.arange(count) % among).index_fill(0, torch.tensor([1]), -100).to(backend.device)


def loss(backend, scores):
    return entmax_loss(scores, classes_of(backend, 6, 9), label_smoothing=0.1, impl=backend.impl)


def linear_loss(backend, hidden, weight, bias):
    return linear_entmax_loss(hidden, weight, classes_of(backend, 6, 9), bias=bias, impl=backend.impl)


QKV = (1, 2, 12, 8), (1, 1, 12, 8), (1, 1, 12, 5)
HEADS = (2,), (2,), (2,)
CALLS = {  # a function of tensors, and the tensors' shapes
    "attention": (attention(is_causal=True), QKV),
    "attention, masked": (attention(key_mask=MASK[None], window_size=(9, 2)), QKV),
    "attention, learned": (attention(softcap=3.0), QKV + HEADS),
    "softmax": (attention(alpha=1.0), QKV),
    "packed": (packed, ((20, 2, 8), (20, 1, 8), (20, 1, 5))),
    "entmax": (lambda backend, x: entmax(x, 1.3, dim=1, impl=backend.impl), ((2, 9, 4),)),
    "entmax, learned": (
        lambda backend, x, alpha: entmax(x, 1.5 + 0.3 * alpha.tanh(), impl=backend.impl),
        ((4, 9), (4, 1)),
    ),
    "loss": (loss, ((6, 9),)),
    "linear loss": (linear_loss, ((6, 5), (9, 5), (9,))),
}
CASES = pytest.mark.parametrize("name", CALLS)


def samples_of(backend, name, samples=SAMPLES):
    """The function, as a scalar, and its tensors with one more dimension in front."""
    function, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(samples, *shape, generator=generator).to(backend.device) for shape in shapes)
    if len(tensors) == 6:
        alpha, scale, slopes = ALPHAS.to(backend.device), *tensors[4:]
        tensors = *tensors[:3], alpha.expand(samples, 2) * 1.0, scale.abs() + 0.1, slopes.abs()
    return (lambda *inputs: function(backend, *inputs).sin().sum()), tensors


def plain_gradients(function, tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@CASES
def test_gradients(backend, name):
    function, tensors = samples_of(backend, name, samples=1)
    tensors = tuple(tensor[0] for tensor in tensors)
    everything = tuple(range(len(tensors)))
    expected = plain_gradients(function, tensors)
    assert_same(grad(function, argnums=everything)(*tensors), expected)
    value, pull_back = vjp(function, *tensors)
    assert_same(pull_back(torch.ones_like(value)), expected)


@CASES
def test_samples_side_by_side(backend, name):
    """vmap of the call and of its gradient: each sample as if it were alone; also where samples share all but one."""
    function, tensors = samples_of(backend, name)
    alone = [tuple(tensor[sample] for tensor in tensors) for sample in range(SAMPLES)]
    assert_same([vmap(function)(*tensors)], [torch.stack([function(*inputs) for inputs in alone])])
    everything = tuple(range(len(tensors)))
    for last in {1, len(tensors)}:
        in_dims = tuple(0 if index < last else None for index in everything)
        given = tuple(tensor if index < last else tensor[0] for index, tensor in enumerate(tensors))
        ours = vmap(grad(function, argnums=everything), in_dims)(*given)
        one_by_one = [plain_gradients(function, (*inputs[:last], *alone[0][last:])) for inputs in alone]
        assert_same(ours, map(torch.stack, zip(*one_by_one, strict=True)))


def test_the_gradient_of_samples_side_by_side(backend):
    """grad of vmap: what the samples share gets the sum of their gradients."""
    function, (query, key, value) = samples_of(backend, "attention")
    both = grad(lambda key: vmap(function, (0, None, None))(query, key, value[0]).sum())(key[0])
    expected = sum(plain_gradients(function, (query[n], key[0], value[0]))[1] for n in range(SAMPLES))
    assert_same([both], [expected])


JACOBIANS = {"attention": ((1, 1, 2, 3), (1, 1, 2, 3), (1, 1, 2, 3)), "entmax": ((2, 9, 1),), "loss": ((6, 9),)}


@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobians_in_both_modes(backend, name):
    """Tangents side by side, and gradients side by side, are one matrix."""
    function, _ = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(backend.device) for shape in JACOBIANS[name]]

    def call(*inputs):
        return function(backend, *inputs).sin()

    assert_same([jacfwd(call)(*tensors)], [jacrev(call)(*tensors)])


def test_an_ensemble_of_layers(backend):
    """functional_call with stacked parameters, a learned alpha among them, and gradients of each member."""
    layers = []
    for seed in range(2):
        torch.manual_seed(seed)
        layers.append(EntmaxAttention(16, 2, learn_alpha=True, position="nape", device=backend.device))
    x = torch.randn(1, 10, 16, device=backend.device)
    stacked = {
        name: torch.stack([dict(layer.named_parameters())[name].detach() for layer in layers])
        for name, _ in layers[0].named_parameters()
    }

    def loss_of(parameters):
        return functional_call(layers[0], parameters, (x,), {"impl": backend.impl}).square().sum()

    ours = vmap(grad(loss_of))(stacked)
    for index, layer in enumerate(layers):
        layer(x, impl=backend.impl).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_same([ours[name][index]], [parameter.grad])


def twice(first, second):
    """A derivative of a derivative, each in reverse or in forward mode."""

    def derivative(mode, function):
        if mode == "reverse":
            return lambda *inputs: grad(function)(*inputs).square().sum()
        return lambda *inputs: jvp(function, inputs, inputs)[1].square().sum()

    return lambda function, tensors: derivative(first, derivative(second, function))(*tensors)


@pytest.mark.parametrize("second", ["reverse", "forward"])
@pytest.mark.parametrize("first", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["attention", "entmax", "loss", "linear loss"])
def test_second_derivatives_are_refused(backend, name, first, second):
    function, tensors = samples_of(backend, name, samples=1)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        twice(first, second)(function, tuple(tensor[0] for tensor in tensors))


@pytest.mark.parametrize("alpha", [1.5, 1.3, 2.0, torch.tensor([1.6, 1.2], dtype=torch.float64)])
def test_the_reference_has_second_derivatives(alpha):
    """Along a direction, against differences of the first."""
    query, key, value, way = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(4))

    def slope(query):
        call = partial(entmax_attention, key=key, value=value, alpha=alpha, is_causal=True, impl="reference")
        return (grad(lambda query: call(query).sin().sum())(query) * way).sum()

    expected = (slope(query + 1e-5 * way) - slope(query - 1e-5 * way)) / 2e-5
    torch.testing.assert_close((grad(slope)(query) * way).sum(), expected, rtol=1e-5, atol=1e-7)


def test_no_samples_at_all_are_refused():
    with pytest.raises(ValueError, match=r"torch\.vmap must have at least one sample"):
        vmap(entmax_attention)(*(torch.randn(0, 1, 1, 4, 8),) * 3)


@pytest.mark.parametrize(
    "name",
    [
        "budget_offset",
        "known_classes",
        "normmax_losses",
        "linear_loss_tangent",
        "attention",
        "attention_support",
        "summarise",
    ],
)
def test_operators_have_a_rule_of_their_own_for_vmap(name):
    """PyTorch's slow rule warns where Python does not see it."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_entmax::{name}", "FuncTorchBatched")
