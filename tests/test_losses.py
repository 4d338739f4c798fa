"""Fenchel-Young losses: values, gradients, targets, reductions, memory, and what is refused."""

import entmax as peer
import pytest
import torch
from torch.nn.functional import cross_entropy

from flash_entmax import entmax, entmax15_loss, entmax_loss, normmax_loss, sparsemax_loss
from flash_entmax.backends.reference import entmax_rows
from flash_entmax.core.loss import smoothed_entropy
from flash_entmax.nn import EntmaxLoss
from flash_entmax.testing import assert_within_budget, poisoned

ALPHAS = [1.5, 2.0, 1.3]


def scores(backend, *shape, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator)).to(backend.device, dtype)


def classes(backend, count, *shape, seed=0):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed)).to(backend.device)


def tsallis(p, alpha):
    """Omega: the entropy's negative."""
    return (p.clamp_min(0).pow(alpha).sum(-1) - 1) / (alpha * (alpha - 1))


def definition(x, q, alpha):
    """Omega*(x) + Omega(q) - q . x in float64, with Omega* by its maximiser; differentiable by Danskin's theorem."""
    with torch.no_grad():
        p = entmax_rows((alpha - 1) * x, alpha)[0]
    dot = torch.where(p - q == 0, 0.0, (p - q) * x).sum(-1)
    return dot - tsallis(p, alpha) + tsallis(q, alpha)


def one_hot(target, count, smoothing=0.0):
    q = torch.nn.functional.one_hot(target, count).double()
    return (1 - smoothing) * q + smoothing / count


def value_and_gradient(loss, x):
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_against_the_definition(backend, alpha, smoothing):
    for dtype in backend.dtypes:
        for count in (1, 5, 100, backend.sizes(9000, 20_000, 131_072)):
            x, target = scores(backend, 4, count, dtype=dtype), classes(backend, count, 4)
            options = {"reduction": "none", "label_smoothing": smoothing, "impl": backend.impl}
            value, grad_x = value_and_gradient(lambda x: entmax_loss(x, target, alpha, **options), x)  # noqa: B023
            q = one_hot(target, count, smoothing)
            truth, true_grad_x = value_and_gradient(lambda x: definition(x, q, alpha), x.double())  # noqa: B023
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=4e-6)
            assert_within_budget(grad_x, true_grad_x, true_grad_x.to(dtype), name=f"gradient of {count}", magnitude=1.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_like_the_package_entmax(backend, alpha):
    theirs = {1.5: peer.entmax15_loss, 2.0: peer.sparsemax_loss}.get(
        alpha, lambda x, y: peer.entmax_bisect_loss(x, y, alpha, 60)
    )
    x, target = scores(backend, 6, 300), classes(backend, 300, 6)
    ours = value_and_gradient(
        lambda x: entmax_loss(x, target, alpha, reduction="none", impl=backend.impl), x
    )  # fmt: skip
    expected = value_and_gradient(lambda x: theirs(x, target), x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_named_losses_and_module(backend):
    x, target = scores(backend, 6, 30), classes(backend, 30, 6)
    named = {1.5: entmax15_loss, 2.0: sparsemax_loss}
    for alpha, function in named.items():
        options = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2, "impl": backend.impl}
        expected = entmax_loss(x, target, alpha, **options)
        assert torch.equal(function(x, target, **options), expected)
        assert torch.equal(EntmaxLoss(alpha, **options)(x, target), expected)


def test_zero_exactly_where_the_class_is_far_ahead(backend):
    """From a lead of 1 / (alpha - 1) on, the loss and its gradient are exactly zero; before, they are not."""
    target = torch.zeros(1, dtype=torch.int64, device=backend.device)
    for lead, is_zero in ((2.5, True), (1.5, False)):
        x = torch.zeros(1, 40, device=backend.device)
        x[0, 0] = lead
        value, grad_x = value_and_gradient(lambda x: entmax_loss(x, target, impl=backend.impl), x)
        assert (value == 0) == is_zero
        assert (grad_x == 0).all() == is_zero


def test_ignored_rows_and_reductions(backend):
    x, target = scores(backend, 5, 30), classes(backend, 30, 5)
    target[[1, 4]] = -100
    each, of_each = value_and_gradient(lambda x: entmax_loss(x, target, reduction="none", impl=backend.impl), x)
    assert (each[[1, 4]] == 0).all()
    assert (of_each[[1, 4]] == 0).all()
    assert (of_each[[0, 2, 3]] != 0).any(-1).all()
    torch.testing.assert_close(entmax_loss(x, target, reduction="sum", impl=backend.impl), each.sum())
    mean, of_mean = value_and_gradient(lambda x: entmax_loss(x, target, impl=backend.impl), x)
    torch.testing.assert_close(mean, each.sum() / 3)
    torch.testing.assert_close(of_mean, of_each / 3)
    x[1] = torch.nan
    assert entmax_loss(x, target, impl=backend.impl) == mean, "what is ignored is not looked at"
    all_ignored = torch.full_like(target, 7)
    assert entmax_loss(x, all_ignored, ignore_index=7, impl=backend.impl).isnan(), "as for cross_entropy"
    assert cross_entropy(x, all_ignored, ignore_index=7).isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_an_ignored_row_is_selected(backend, bad, smoothing):
    """It is 0 whatever comes in, also where no row is left to divide by."""
    x, target = scores(backend, 5, 30).requires_grad_(), classes(backend, 30, 5)
    target[[1, 4]] = -100
    options = {"label_smoothing": smoothing, "impl": backend.impl}
    loss = bad * entmax_loss(x, target, **options)
    assert (torch.autograd.grad(loss, x)[0][[1, 4]] == 0).all()
    for reduction in ("mean", "sum"):
        loss = entmax_loss(x, torch.full_like(target, -100), reduction=reduction, **options)
        assert loss.isnan() if reduction == "mean" else loss == 0, "as for cross_entropy"
        for scale in (1.0, bad):
            assert (torch.autograd.grad(scale * loss, x, retain_graph=True)[0] == 0).all()


@pytest.mark.parametrize("of_classes", [True, False])
def test_no_rows(backend, of_classes):
    """The mean over none is NaN, the sum 0, as for cross_entropy; the gradient is empty."""
    x = scores(backend, 0, 7).requires_grad_()
    target = classes(backend, 7, 0) if of_classes else x.detach()
    for reduction in ("mean", "sum", "none"):
        ours = entmax_loss(x, target, reduction=reduction, impl=backend.impl)
        theirs = cross_entropy(x, target, reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert torch.autograd.grad(ours.sum(), x)[0].shape == (0, 7)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 7, 3), (2, 7, 2, 2)])
def test_shapes_are_those_of_cross_entropy(backend, shape):
    x = scores(backend, *shape)
    of_class = 0 if len(shape) == 1 else 1
    target = classes(backend, 7, *shape[:of_class], *shape[of_class + 1 :])
    value, grad_x = value_and_gradient(lambda x: entmax_loss(x, target, reduction="none", impl=backend.impl), x)
    assert value.shape == cross_entropy(x, target, reduction="none").shape
    p = entmax(x, dim=of_class, impl=backend.impl)
    q = torch.nn.functional.one_hot(target, 7).movedim(-1, of_class)
    torch.testing.assert_close(grad_x, p - q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_targets_that_are_probabilities(backend, alpha, smoothing):
    x = scores(backend, 4, 50)
    q = entmax(scores(backend, 4, 50, seed=1), 1.5)
    options = {"reduction": "none", "label_smoothing": smoothing, "impl": backend.impl}
    value, grad_x = value_and_gradient(lambda x: entmax_loss(x, q, alpha, **options), x)
    mixed = (1 - smoothing) * q.double() + smoothing / 50
    truth, true_grad_x = value_and_gradient(lambda x: definition(x, mixed, alpha), x.double())
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x.double(), true_grad_x, rtol=1e-5, atol=1e-5)


def test_probabilities_far_from_zero(backend):
    """Scores that are all large lose nothing but their own rounding; the target gets no gradient; float16 is scaled."""
    x, q = scores(backend, 4, 50), scores(backend, 4, 50, seed=1).softmax(-1).requires_grad_()
    shifted = (x * 64).round() / 64 + 4096
    near = entmax_loss(shifted - 4096, q, reduction="none", impl=backend.impl)
    far = entmax_loss(shifted.requires_grad_(), q, reduction="none", impl=backend.impl)
    torch.testing.assert_close(far, near, rtol=1e-6, atol=2e-6)
    assert torch.autograd.grad(far.sum(), q, allow_unused=True) == (None,)
    won = torch.tensor([[9.0, 0.0, 0.0]], device=backend.device, dtype=torch.float16, requires_grad=True)
    loss = entmax_loss(won, torch.eye(3, device=backend.device)[:1], reduction="sum", impl=backend.impl)
    (of_won,) = torch.autograd.grad(65536.0 * loss, won)
    assert (of_won == 0).all()


def test_the_loss_of_its_own_prediction_is_zero(backend):
    x = scores(backend, 4, 50)
    for alpha in ALPHAS:
        value, grad_x = value_and_gradient(
            lambda x: entmax_loss(x, entmax(x.detach(), alpha), alpha, reduction="none", impl=backend.impl),  # noqa: B023
            x,
        )
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=2e-6)
        torch.testing.assert_close(grad_x, torch.zeros_like(grad_x), rtol=0, atol=1e-6)


def test_smoothing_is_a_mixed_target(backend):
    """Its loss is that of the mixture; cross_entropy, at the limit alpha = 1, has the mixture's entropy more."""
    x, target = scores(backend, 4, 20, spread=1.0), classes(backend, 20, 4)
    ours = entmax_loss(x.double(), target, 1.0001, label_smoothing=0.2, reduction="none")
    theirs = cross_entropy(x.double(), target, label_smoothing=0.2, reduction="none")
    q = one_hot(target, 20, 0.2)
    entropy = -(q * q.log()).sum(-1)
    torch.testing.assert_close(ours, theirs - entropy, rtol=2e-3, atol=2e-3)
    assert smoothed_entropy(0.2, 20, 1.3) == pytest.approx(tsallis(q, 1.3)[0].item())


def test_masked_classes(backend):
    """-inf takes a class out; as the target it costs inf, and its gradient still pulls it up."""
    x, target = scores(backend, 2, 30), torch.tensor([4, 5], device=backend.device)
    hidden = x.masked_fill(torch.arange(30, device=backend.device) % 2 == 1, -torch.inf)
    value, grad_x = value_and_gradient(lambda x: entmax_loss(x, target, reduction="none", impl=backend.impl), hidden)
    without = entmax_loss(x[:1, ::2], target[:1] // 2, reduction="none", impl=backend.impl)
    torch.testing.assert_close(value[:1], without, rtol=1e-5, atol=1e-6)
    assert value[1] == torch.inf
    assert grad_x[1, 5] == -1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("of_classes", [True, False])
def test_the_gradient_of_a_masked_class_is_selected(backend, of_classes, bad):
    """It is 0 whatever comes in, unless the class is the target."""
    masked = torch.arange(30, device=backend.device) % 2 == 1
    x = scores(backend, 2, 30).masked_fill(masked, -torch.inf).requires_grad_()
    target = torch.tensor([4, 5], device=backend.device)
    target = target if of_classes else torch.nn.functional.one_hot(target, 30).float()
    loss = entmax_loss(x, target, reduction="none", impl=backend.impl)
    (grad_x,) = torch.autograd.grad(loss, x, torch.full_like(loss, bad))
    assert (grad_x[0, masked] == 0).all()
    assert not grad_x[0, 4].isfinite(), "what counts is scaled"
    assert not grad_x[1, 5].isfinite()


def test_nothing_of_the_size_of_the_input_is_kept(backend):
    """What autograd saves beside the input and the classes is three numbers for each row."""
    x, target = scores(backend, 6, 500).requires_grad_(), classes(backend, 500, 6)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        entmax_loss(x, target, impl=backend.impl)
    beside = [t for t in saved if t.data_ptr() not in (x.data_ptr(), target.data_ptr())]
    assert sum(t.numel() for t in beside) <= 4 * 6
    saved.clear()
    probabilities = x.detach().softmax(-1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        entmax_loss(x, probabilities, impl=backend.impl)
    beside = [t for t in saved if t.data_ptr() not in (x.data_ptr(), probabilities.data_ptr())]
    assert sum(t.numel() for t in beside) <= 4 * 6


def test_all_of_the_memory_is_written(backend):
    x, target = scores(backend, 5, 100), classes(backend, 100, 5)
    target[2] = -100
    plain = value_and_gradient(lambda x: entmax_loss(x, target, reduction="none", impl=backend.impl), x)
    p = entmax(x, impl=backend.impl)
    with poisoned():
        again = value_and_gradient(lambda x: entmax_loss(x, target, reduction="none", impl=backend.impl), x)
        assert torch.equal(entmax(x, impl=backend.impl), p)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_operators(backend):
    x = scores(backend, 3, 33)
    for target in (x.softmax(-1), classes(backend, 33, 3)):
        arguments = x.clone().requires_grad_(), target, -100, 0.0, 1.5, backend.impl
        torch.library.opcheck(torch.ops.flash_entmax.loss.default, arguments)
    _, state = torch.ops.flash_entmax.loss(x, target, -100, 0.1, 1.5, backend.impl)
    arguments = torch.ones(3, device=backend.device), x, target, state, -100, 0.1, 1.5, backend.impl
    torch.library.opcheck(torch.ops.flash_entmax.loss_backward.default, arguments)


def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: entmax_loss(x, y, label_smoothing=0.1, impl=backend.impl), fullgraph=True, dynamic=True
    )
    for rows in (4, 7, 11):
        x, target = scores(backend, rows, 40), classes(backend, 40, rows)
        ours = value_and_gradient(lambda x: compiled(x, target), x)  # noqa: B023
        eager = value_and_gradient(
            lambda x: entmax_loss(x, target, label_smoothing=0.1, impl=backend.impl), x  # noqa: B023
        )  # fmt: skip
        torch.testing.assert_close(ours, eager)


X, Y = torch.ones(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], Y), {}, TypeError, "input must be a torch.Tensor, got list"),
        ((X.long(), Y), {}, TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int64"),
        ((X, [0, 1]), {}, TypeError, "target must be a torch.Tensor, got list"),
        ((X, Y.int()), {}, TypeError, "target must be int64 classes or floating-point probabilities, got torch.int32"),
        ((X, Y[:1]), {}, ValueError, r"target of classes must have shape \(2,\) for input \(2, 5\), got \(1,\)"),
        ((X, X[:1]), {}, ValueError, r"must have the shape of the input, \(2, 5\), got \(1, 5\)"),
        ((X, Y + 5), {}, ValueError, "target must hold classes from 0 to 4, or ignore_index -100, got 5"),
        ((X, Y - 1), {}, ValueError, "target must hold classes from 0 to 4, or ignore_index -100, got -1"),
        ((X[:, :0], Y), {}, ValueError, r"input must have at least one class, got shape \(2, 0\)"),
        ((X, Y, 1.0), {}, ValueError, "alpha must not be 1: that loss is .*cross_entropy"),
        ((X, Y, -1.0), {}, ValueError, "alpha must be finite and above 0, got -1.0"),
        ((X, Y, torch.tensor(1.5)), {}, TypeError, "alpha must be a number, got Tensor"),
        ((X, Y), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ((X, Y), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ((X, Y), {"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ((X, Y), {"impl": "fast"}, ValueError, "impl must be one of 'auto', 'triton', 'torch', got 'fast'"),
    ],
)
def test_wrong_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        entmax_loss(*arguments, **options)


@pytest.mark.parametrize("loss", [entmax_loss, normmax_loss])
def test_an_ignored_index_beside_probabilities_is_refused(loss):
    with pytest.raises(ValueError, match="ignore_index is for a target of classes, got 3 beside probabilities"):
        loss(torch.randn(4, 7), torch.full((4, 7), 1 / 7), ignore_index=3)
