"""alpha and scale as tensors: exact gradients, their ranges, and nothing else that differs from the numbers."""

import pytest
import torch
from cases import attend, make_case, run
from checks import check_attention
from conftest import HAS_CUDA
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import entmax_attention
from flash_entmax.core.tensors import clamped
from flash_entmax.testing import iid_inputs

ALPHAS = {
    "scalar": 1.5,
    "scalar 2": 2.0,
    "near softmax": 1.05,
    "by head": (1.2, 1.8),
    "limits": (1.01, 2.0),
    "exact cases": (1.5, 2.0),
}


def learned(backend, *values, dtype=torch.float32):
    return torch.tensor(values if len(values) > 1 else values[0], device=backend.device, dtype=dtype)


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_learned_alpha(backend, name, is_causal):
    alpha = torch.tensor(ALPHAS[name], device=backend.device)
    for dtype in backend.dtypes:
        case = make_case(backend, length=90, key_heads=1, dtype=dtype, alpha=alpha, is_causal=is_causal)
        check_attention(case, backend.impl)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize("scale", [0.3, (0.05, 1.0)], ids=str)
def test_learned_scale(backend, alpha, scale):
    """With a number for alpha."""
    case = make_case(backend, length=90, alpha=alpha, scale=torch.tensor(scale, device=backend.device), batch=2)
    check_attention(case, backend.impl)


def test_everything_is_learned(backend):
    alpha, scale, slopes = (learned(backend, *pair) for pair in ((1.4, 1.9), (0.2, 0.5), (0.1, -0.05)))
    case = make_case(backend, length=70, key_length=100, alpha=alpha, scale=scale, alibi_slopes=slopes, softcap=4.0)
    check_attention(case, backend.impl)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_by_finite_differences(impl):
    """In float64, by every tensor at once, each head with its own numbers."""
    tensors = iid_inputs(1, 2, 3, 2, key_length=5, key_heads=1, dtype=torch.float64, seed=4)
    numbers = (torch.tensor(pair, dtype=torch.float64) for pair in ((1.3, 1.6), (0.8, 1.2), (0.3, -0.1)))
    leaves = tuple(tensor.requires_grad_() for tensor in (*tensors, *numbers))

    def attention(query, key, value, alpha, scale, slopes):
        return entmax_attention(
            query, key, value, alpha=alpha, scale=scale, alibi_slopes=slopes, softcap=3.0, is_causal=True, impl=impl
        )

    assert torch.autograd.gradcheck(attention, leaves, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_a_tensor_gives_what_its_number_gives(backend, alpha):
    """To rounding: a number may have a formula of its own."""
    for dtype in backend.dtypes:
        number = make_case(backend, length=100, dtype=dtype, alpha=alpha, scale=0.25)
        tensor = make_case(
            backend, length=100, dtype=dtype, alpha=learned(backend, alpha), scale=learned(backend, 0.25)
        )
        grad_output = number.grad_output()
        expected = run(number, backend.impl, grad_output)
        actual = run(tensor, backend.impl, grad_output)
        bound = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-5)
        for ours, theirs in zip(actual.tensors[:4], expected.tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize(("given", "limit"), [(0.5, 1.01), (torch.inf, 2.0)])
def test_alpha_range_clamps(backend, given, limit):
    """The value at the limit, and no gradient from outside. Without the option, a call refuses what is outside."""
    case = make_case(backend, length=70, alpha=learned(backend, given, 1.5), alpha_range=(1.01, 2.0))
    limited = make_case(backend, length=70, alpha=learned(backend, limit, 1.5))
    grad_output = case.grad_output()
    outside, inside = (run(each, backend.impl, grad_output) for each in (case, limited))
    assert torch.equal(outside.output, inside.output)
    assert outside.gradients[3][0] == 0
    assert outside.gradients[3][1] == inside.gradients[3][1] != 0
    assert inside.gradients[3][0] != 0


@pytest.mark.parametrize("impl", ["own", "reference"])
@pytest.mark.parametrize("given", [0.5, 1.0, 2.5])
def test_an_alpha_outside_is_refused(backend, given, impl):
    """In words on a CPU; on a GPU it is a device-side assertion, which would end the process."""
    if backend.device == "cuda":
        pytest.skip("a device-side assertion ends the process")
    inputs = iid_inputs(1, 2, 5, 16)
    advice = r"alpha_range=\(1\.01, 2\) clamps it"
    words = rf"a tensor alpha must be in \[1\.01, 2\], got {given:g}; {advice}"
    for alpha in (torch.tensor(given), torch.tensor([1.5, given])):
        with pytest.raises(ValueError, match=words):
            entmax_attention(*inputs, alpha=alpha, impl=backend.impl if impl == "own" else impl)
    with pytest.raises(ValueError, match=r"beside a tensor scale must be 1, or in \[1\.01, 2\], got 1\.001"):
        entmax_attention(*inputs, alpha=1.001, scale=torch.tensor(0.2), impl=backend.impl)


@pytest.mark.parametrize(("given", "limit"), [(0.0, 1e-6), (-3.0, 1e-6), (1e8, 1e6)])
def test_scale_is_clamped(backend, given, limit):
    case = make_case(backend, length=70, scale=learned(backend, given, 0.3))
    limited = make_case(backend, length=70, scale=learned(backend, limit, 0.3))
    grad_output = case.grad_output()
    outside, inside = (run(each, backend.impl, grad_output) for each in (case, limited))
    assert torch.equal(outside.output, inside.output)
    assert outside.gradients[3][0] == 0
    assert outside.gradients[3][1] == inside.gradients[3][1] != 0


@pytest.mark.parametrize("limits", [(1.01, 2.0), (1e-6, 1e6)])
def test_a_number_on_a_limit_has_its_gradient(limits):
    """Of one that starts there, as an alpha of 1.01 or 2 does, and in every version of torch."""
    low, high = limits
    numbers = torch.tensor([low / 2, low, (low + high) / 2, high, 2 * high, torch.nan], requires_grad=True)
    result = clamped(numbers, limits)
    assert result[:5].tolist() == [numbers[1], numbers[1], numbers[2], numbers[3], numbers[3]]
    assert result[5].isnan()
    assert torch.autograd.grad(result[:5].sum(), numbers)[0][:5].tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", ["alpha", "scale", "alibi_slopes"])
@pytest.mark.parametrize("impl", ["own", "reference"])
def test_nan_makes_its_head_nan_and_ends(backend, name, impl):
    """No solver loops on it, and the other head is what it is without."""
    impl = backend.impl if impl == "own" else impl
    usual = {"alpha": 1.4, "scale": 0.25, "alibi_slopes": 0.1}[name]
    good, bad = (make_case(backend, length=70, **{name: learned(backend, usual, n)}) for n in (usual, torch.nan))
    grad_output = bad.grad_output()
    expected, actual = (run(case, impl, grad_output) for case in (good, bad))
    assert actual.output[:, 1].isnan().all()
    torch.testing.assert_close(actual.output[:, 0], expected.output[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("scale", [0.3, (0.05, 1.0)], ids=str)
def test_softmax_with_a_learned_scale(impl, scale):
    """alpha = 1, the number: softmax, with the gradient of the scale."""
    query, key, value = iid_inputs(2, 2, 20, 8, key_length=30)
    scale = torch.tensor(scale, requires_grad=True)
    output = entmax_attention(query, key, value, alpha=1.0, scale=scale, impl=impl)
    scaled = query * scale.expand(2).view(2, 1, 1)
    expected = scaled_dot_product_attention(scaled, key, value, scale=1.0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(each.square().sum(), scale)[0] for each in (output, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_parameters_without_gradient_get_none(backend):
    """A tensor alpha beside a scale that needs no gradient, and the other way round."""
    for wanted in ("alpha", "scale"):
        parameters = {"alpha": learned(backend, 1.4), "scale": learned(backend, 0.3)}
        parameters[wanted].requires_grad_()
        case = make_case(backend, length=40, **parameters)
        attend(case, backend.impl).sum().backward()
        for name, tensor in parameters.items():
            assert (tensor.grad is None) == (name != wanted)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_a_learned_alpha_on_the_processor_is_refused_for_a_gpu():
    tensors = iid_inputs(1, 2, 20, 8, device="cuda")
    with pytest.raises(ValueError, match=r"alpha must be on the device of the query, cuda:0, got cpu"):
        entmax_attention(*tensors, alpha=torch.tensor(1.5))
