"""entmax, sparsemax and entmax15 along a dimension: values, gradients, masks, and what is refused."""

import entmax as peer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_entmax import entmax, entmax15, entmax_loss, sparsemax
from flash_entmax.backends.reference import entmax_rows
from flash_entmax.testing import DISTRIBUTIONS, assert_within_budget, score_rows

ALPHAS = [1.5, 2.0, 1.3, 1.05]


def exact(x, alpha, dim=-1):
    """The definition in float64, differentiable in x and alpha."""
    moved = x.movedim(dim, -1)
    return entmax_rows((alpha - 1.0) * moved, alpha)[0].movedim(-1, dim)


def scores(backend, *shape, dtype=torch.float32, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator)).to(backend.device, dtype)


def gradients(function, x, grad, *others):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *others)]
    return torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_and_gradients(backend, alpha):
    """In every dtype, within twice the error of the dense definition in that dtype; rows of one entry and of many."""
    for dtype in backend.dtypes:
        for shape in ((3, 1), (2, 3, 7), (4, 100), (2, backend.sizes(9000, 20_000, 131_072))):
            x, grad = scores(backend, *shape, dtype=dtype), scores(backend, *shape, dtype=dtype, seed=1)
            p = entmax(x, alpha, impl=backend.impl)
            assert p.dtype == dtype
            assert p.shape == x.shape
            truth = exact(x.double(), alpha)
            assert_within_budget(p, truth, truth.to(dtype), name=f"probability of {shape}")
            (grad_x,) = gradients(lambda x: entmax(x, alpha, impl=backend.impl), x, grad)
            (true_grad_x,) = gradients(lambda x: exact(x, alpha), x.double(), grad.double())
            dense = exact(x.double(), alpha).to(dtype)
            (rounded,) = dense_gradient(dense, grad, alpha)
            assert_within_budget(grad_x, true_grad_x, rounded, name=f"gradient of {shape}")


def dense_gradient(p, grad, alpha):
    """What plain PyTorch in the dtype makes of probabilities rounded to it."""
    weight = torch.where(p > 0, p.clamp_min(torch.finfo(p.dtype).tiny) ** (2.0 - alpha), 0.0)
    return (weight * (grad - (weight * grad).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)),)


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_sum_to_one_and_zeros_are_zeros(backend, distribution, alpha):
    """Within 1e-5 on every distribution; the support is that of float64 but for entries within a rounding of tau."""
    z = score_rows(distribution, backend.sizes(1000, 16_384, 131_072), 2, device=backend.device)
    x = (z / (alpha - 1.0)).float()
    p = entmax(x, alpha, impl=backend.impl)
    assert (p >= 0).all()
    assert (p.double().sum(-1) - 1).abs().max() <= 1e-5
    _, maximum, offset = entmax_rows((alpha - 1.0) * x.double(), alpha)
    distance = (alpha - 1.0) * x.double() - (maximum - offset).unsqueeze(-1)
    doubt = 2.0**-22 * (1 + x.double().abs() * (alpha - 1.0))
    assert ((p > 0) | (distance <= doubt) | (distance.clamp_min(0) ** (1 / (alpha - 1)) < 1e-37)).all()
    assert ((p == 0) | (distance >= -doubt)).all()


@pytest.mark.parametrize("alpha", ALPHAS[:3])
def test_like_the_package_entmax(backend, alpha):
    theirs = {1.5: peer.entmax15, 2.0: peer.sparsemax}.get(alpha, lambda x, dim: peer.entmax_bisect(x, alpha, dim, 60))
    shape = backend.sizes((3, 9, 4), (3, 50, 40), (3, 500, 40))
    x, grad = scores(backend, *shape), scores(backend, *shape, seed=1)
    for dim in (0, 1, -1):
        ours = entmax(x, alpha, dim, impl=backend.impl)
        torch.testing.assert_close(ours, theirs(x, dim), rtol=1e-5, atol=1e-6)
        (of_ours,) = gradients(lambda x: entmax(x, alpha, dim, impl=backend.impl), x, grad)  # noqa: B023
        (of_theirs,) = gradients(lambda x: theirs(x, dim), x, grad)  # noqa: B023
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-5)


def test_named_functions(backend):
    x = scores(backend, 5, 30)
    assert torch.equal(sparsemax(x, 0, impl=backend.impl), entmax(x, 2.0, 0, impl=backend.impl))
    assert torch.equal(entmax15(x, impl=backend.impl), entmax(x, 1.5, impl=backend.impl))
    assert torch.equal(entmax(x, 1, impl=backend.impl), x.softmax(-1))


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (2, 3, 5, 1)])
def test_a_learned_alpha(backend, shape):
    """Scalar, by head and by row: value and gradient those of the definition, row by row."""
    x, grad = scores(backend, 2, 3, 5, 40), scores(backend, 2, 3, 5, 40, seed=1)
    generator = torch.Generator().manual_seed(2)
    alpha = (1.1 + 0.9 * torch.rand(shape, generator=generator)).to(backend.device)
    grad_x, grad_alpha = gradients(lambda x, alpha: entmax(x, alpha, impl=backend.impl), x, grad, alpha)

    def by_row(x, alpha):
        alphas = alpha.expand(2, 3, 5, 1).reshape(-1)
        rows = [exact(row, a) for row, a in zip(x.reshape(-1, 40), alphas, strict=True)]
        return torch.stack(rows).view(x.shape)

    true_grad_x, true_grad_alpha = gradients(by_row, x.double(), grad.double(), alpha.double())
    assert grad_alpha.shape == alpha.shape
    torch.testing.assert_close(grad_x.double(), true_grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_alpha.double(), true_grad_alpha, rtol=1e-4, atol=2e-4)


def test_alpha_range_clamps(backend):
    """The value at the limit, and no gradient from outside; on a limit there is one."""
    x = scores(backend, 2, 20)
    for beyond, limit in ((0.5, 1.01), (7.0, 2.0)):
        alpha = torch.tensor(beyond, device=backend.device, requires_grad=True)
        p = entmax(x, alpha, alpha_range=(1.01, 2.0), impl=backend.impl)
        torch.testing.assert_close(p, entmax(x, limit, impl=backend.impl), rtol=1e-4, atol=1e-6)
        assert torch.autograd.grad(p.square().sum(), alpha)[0] == 0
        assert torch.equal(
            entmax(x, beyond, alpha_range=(1.01, 2.0), impl=backend.impl), entmax(x, limit, impl=backend.impl)
        )
        on_it = torch.tensor(limit, device=backend.device, requires_grad=True)
        assert torch.autograd.grad(entmax(x, on_it, impl=backend.impl).square().sum(), on_it)[0] != 0


@pytest.mark.parametrize(("given", "got"), [([1.5, 0.5], "0.5"), ([2.5, 1.5], "2.5"), ([torch.inf, 1.5], "inf")])
def test_nothing_is_clamped_in_silence(backend, given, got):
    """The kernels refuse a tensor alpha outside of their range, as far as a CPU can read it, and torch has no range."""
    if backend.device == "cuda":
        pytest.skip("a device-side assertion ends the process")
    alpha = torch.tensor(given).unsqueeze(-1)
    words = {"triton": rf"in \[1.01, 2\], got {got}; impl='torch'", "torch": "finite and above 0, got inf"}
    if backend.impl == "triton" or got == "inf":
        with pytest.raises(ValueError, match=f"a tensor alpha must be .*{words[backend.impl]}"):
            entmax(scores(backend, 2, 20), alpha, impl=backend.impl)
    rounded = torch.tensor([1.01, 2.0], dtype=torch.bfloat16).unsqueeze(-1)
    assert entmax(scores(backend, 2, 20), rounded, impl=backend.impl).sum() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_masked_entries(backend, alpha):
    """-inf gets probability and gradient 0, the others what they get without it; a row of nothing else is all zeros."""
    x, grad = scores(backend, 4, 90), scores(backend, 4, 90, seed=1)
    hidden = torch.arange(90, device=backend.device) % 3 == 1
    masked = x.masked_fill(hidden, -torch.inf)
    masked[3] = -torch.inf
    p = entmax(masked, alpha, impl=backend.impl)
    (grad_x,) = gradients(lambda x: entmax(x, alpha, impl=backend.impl), masked, grad)
    assert (p[3] == 0).all()
    assert (grad_x[3] == 0).all()
    assert (p[:, hidden] == 0).all()
    assert (grad_x[:, hidden] == 0).all()
    without = x[:3][:, ~hidden]
    torch.testing.assert_close(p[:3][:, ~hidden], entmax(without, alpha, impl=backend.impl), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_the_gradient_of_a_masked_entry_is_selected(backend, alpha, bad):
    """It is 0 whatever comes in, here or elsewhere in its row."""
    hidden = torch.arange(90, device=backend.device) % 3 == 1
    masked = scores(backend, 3, 90).masked_fill(hidden, -torch.inf)
    masked[2] = -torch.inf
    grad = torch.ones_like(masked)
    grad[0], grad[1, hidden], grad[2] = bad, bad, bad
    (grad_x,) = gradients(lambda x: entmax(x, alpha, impl=backend.impl), masked, grad)
    assert (grad_x[:, hidden] == 0).all()
    assert (grad_x[2] == 0).all()
    assert not grad_x[0].isfinite().all(), "what counts is scaled"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_scores_spoil_their_row(backend, bad):
    x = scores(backend, 3, 200)
    x[1, 70] = bad
    p = entmax(x, impl=backend.impl)
    assert p[1].isnan().all()
    for alpha in ALPHAS:
        (grad_x,) = gradients(lambda x: entmax(x, alpha, impl=backend.impl), x, torch.ones_like(x))  # noqa: B023
        assert grad_x[1].isnan().all()
        assert grad_x[[0, 2]].isfinite().all()
    assert torch.equal(p[[0, 2]], entmax(x[[0, 2]], impl=backend.impl))


def test_any_strides_and_no_entries(backend):
    x = scores(backend, 6, 12, 8).transpose(0, 2)[::2, 5:]
    torch.testing.assert_close(entmax(x, impl=backend.impl), entmax(x.clone(), impl=backend.impl), rtol=0, atol=0)
    assert entmax(x[:0], impl=backend.impl).shape == (0, 7, 6)
    assert entmax(x[..., :0], impl=backend.impl).shape == (4, 7, 0)


def test_rows_that_do_not_fit_in_registers(backend, monkeypatch):
    """Read in spans, by fewer programs than there are rows, they are what they are when held."""
    if backend.impl != "triton":
        pytest.skip("about kernels")
    from flash_entmax.backends.triton import row_solve as row
    from flash_entmax.backends.triton import rows

    def everything():
        x, grad = scores(backend, 40, 700), scores(backend, 40, 700, seed=1)
        x = x * torch.linspace(0.01, 30, 40, device=x.device)[:, None]
        x[3, 300:], x[4], x[5, 650] = -torch.inf, -torch.inf, torch.nan
        alphas = torch.linspace(1.05, 2.0, 40, device=x.device)[:, None]
        target, ignored = torch.arange(40, device=x.device), torch.arange(40, device=x.device) % 7 - 100
        for alpha in ALPHAS:
            yield entmax(x, alpha)
            yield from gradients(lambda x: entmax(x, alpha), x, grad)  # noqa: B023
            yield from gradients(lambda x: entmax_loss(x, target, alpha, label_smoothing=0.1), x, None)  # noqa: B023
        yield from gradients(entmax, x, grad, alphas)
        yield entmax_loss(x, torch.where(ignored == -100, ignored, target), reduction="none")
        yield entmax_loss(x, entmax(scores(backend, 40, 700, seed=2)), reduction="none")

    held = list(everything())
    monkeypatch.setattr(row, "MOST_SEGMENTS", 2)
    monkeypatch.setattr(row, "WARPS_PER_MULTIPROCESSOR", 8)
    if backend.device == "cuda":
        monkeypatch.setattr(rows, "programs_with_maxima", lambda x, config: (8, x.new_empty(8, 11)))
    for ours, truth in zip(everything(), held, strict=True):
        # Sums in another order: near alpha 1, the gradient to alpha has terms of hundreds that cancel.
        torch.testing.assert_close(
            ours, truth, rtol=1e-4, atol=1e-5 * (1 + truth.nan_to_num().abs().max()), equal_nan=True
        )


@given(data=st.data())
def test_any_row(data):
    """The path in PyTorch, in float64: any finite scores, against bisection."""
    alpha = data.draw(st.sampled_from([1.5, 2.0]) | st.floats(1.05, 2.0))
    row = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
    x = torch.tensor(row, dtype=torch.float64)
    p = entmax(x, alpha)
    assert abs(p.sum().item() - 1) < 1e-9
    torch.testing.assert_close(p, exact(x[None], alpha)[0], rtol=1e-6, atol=1e-9)


def test_gradcheck():
    x = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alpha = torch.tensor([[1.2], [1.5], [1.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax, (x, alpha))


def test_operators(backend):
    for alphas in (None, torch.tensor([1.2, 1.7], device=backend.device)):
        x = scores(backend, 2, 33).requires_grad_()
        torch.library.opcheck(torch.ops.flash_entmax.entmax.default, (x, alphas, 1.5, backend.impl))
    p = entmax(x, impl=backend.impl).detach()
    arguments = torch.ones_like(p), p, alphas, 1.5, True, backend.impl
    torch.library.opcheck(torch.ops.flash_entmax.entmax_backward.default, arguments)


def test_compiled(backend):
    """One graph for every alpha and number of rows."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, alpha: entmax(x, alpha, impl=backend.impl).square().sum(), fullgraph=True, dynamic=True
    )
    alpha = torch.tensor(1.5, device=backend.device, requires_grad=True)
    compiled(scores(backend, 5, 40), alpha).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, value in ((7, 1.3), (9, 1.9)):
            alpha = torch.tensor(value, device=backend.device, requires_grad=True)
            x = scores(backend, rows, 40)
            compiled(x, alpha).backward()
            expected = torch.autograd.grad(entmax(x, alpha, impl=backend.impl).square().sum(), alpha)[0]
            torch.testing.assert_close(alpha.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused(backend):
    x = scores(backend, 2, 9).requires_grad_()
    (grad_x,) = torch.autograd.grad(entmax(x, impl=backend.impl).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"flash_entmax::entmax has no second derivative$"):
        grad_x.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, "x must be a torch.Tensor, got list"),
        ((torch.arange(3),), {}, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        ((torch.tensor(1.0),), {}, ValueError, "x must have at least one dimension, got a scalar"),
        ((torch.ones(2, 3), 1.5, 2), {}, ValueError, r"dim must be from -2 to 1 for shape \(2, 3\), got 2"),
        ((torch.ones(2, 3), 1.5, 1.0), {}, TypeError, "dim must be an integer, got 1.0"),
        ((torch.ones(2, 3), 0.0), {}, ValueError, "alpha must be finite and above 0, got 0.0"),
        ((torch.ones(2, 3), torch.nan), {}, ValueError, "alpha must be finite and above 0, got nan"),
        ((torch.ones(2, 3), 1.5), {"alpha_range": 2}, TypeError, "alpha_range must be a pair of numbers, or None, got"),
        ((torch.ones(2, 3), 1.5), {"alpha_range": (2, 1)}, ValueError, r"alpha_range must be \(lowest, highest\), .*"),
        ((torch.ones(2, 3),), {"return_support_size": 1}, TypeError, "return_support_size must be True or False, got"),
        ((torch.ones(2, 3), "2"), {}, TypeError, "alpha must be a number or a tensor, got str"),
        ((torch.ones(2, 3), torch.ones(3)), {}, ValueError, r"alpha must broadcast to \(2, 1\).*, got \(3,\)"),
        ((torch.ones(2, 3), torch.ones(1, 2, 1)), {}, ValueError, r"alpha must broadcast to \(2, 1\).*\(1, 2, 1\)"),
        ((torch.ones(2, 3), torch.tensor(2)), {}, TypeError, "alpha must be a floating-point tensor, got torch.int64"),
        ((torch.ones(2, 3),), {"impl": "reference"}, ValueError, "impl must be one of .*, got 'reference'"),
        ((torch.ones(2, 3).double(),), {"impl": "triton"}, ValueError, "impl='triton' cannot run here.*got float64"),
    ],
)
def test_wrong_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        entmax(*arguments, **options)
