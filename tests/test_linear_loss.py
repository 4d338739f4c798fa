"""The loss of a linear layer, chunk by chunk: the same numbers as of all logits at once, in less memory."""

import pytest
import torch
from torch.nn.functional import linear

from flash_entmax import entmax_loss, linear_entmax_loss
from flash_entmax.operators import linear_loss

SIZE, CLASSES = 8, 50


def problem(backend, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = backend.sizes(11, 37, 37)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(backend.device, dtype).requires_grad_()
        for shape in ((tokens, SIZE), (CLASSES, SIZE), (CLASSES,))
    )
    target = torch.randint(CLASSES, (tokens,), generator=generator).to(backend.device)
    target[5] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.2, "alpha": 2.0}])
@pytest.mark.parametrize("chunk", [1, 5 * CLASSES, 10**9])
def test_as_of_all_logits(backend, monkeypatch, chunk, options):
    """Chunks of a token, of some that do not divide all, and of all."""
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", chunk)
    for dtype in backend.dtypes[:1] if backend.is_interpreted else backend.dtypes:
        hidden, weight, bias, target = problem(backend, dtype)
        for leaves in ((hidden, weight), (hidden, weight, bias)):
            offset = bias if len(leaves) == 3 else None
            ours = linear_entmax_loss(hidden, weight, target, bias=offset, impl=backend.impl, **options)
            theirs = entmax_loss(linear(hidden, weight, offset), target, impl=backend.impl, **options)
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(ours, theirs, **tolerance)
            for one, other in zip(
                torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * theirs, leaves), strict=True
            ):
                torch.testing.assert_close(one, other, **tolerance)


def test_only_some_logits_at_a_time(backend, monkeypatch):
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", 8 * CLASSES)
    seen = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: seen.append(len(args[0])) or plain(*args))
    hidden, weight, _, target = problem(backend)
    linear_entmax_loss(hidden, weight, target, impl=backend.impl).backward()
    assert max(seen) <= 8
    assert sum(seen) == len(hidden), "each token's logits are made once"


def test_what_needs_no_gradient_gets_none(backend):
    hidden, weight, _, target = problem(backend)
    frozen = weight.detach()
    linear_entmax_loss(hidden, frozen, target, impl=backend.impl).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        loss = linear_entmax_loss(hidden, frozen, target, impl=backend.impl)
    torch.testing.assert_close(loss, entmax_loss(linear(hidden, frozen), target, impl=backend.impl).detach())


def test_further_dimensions(backend):
    hidden, weight, _, target = problem(backend)
    loss = linear_entmax_loss(hidden[:10].view(2, 5, SIZE), weight, target[:10].view(2, 5), impl=backend.impl)
    torch.testing.assert_close(loss, linear_entmax_loss(hidden[:10], weight, target[:10], impl=backend.impl))


@pytest.mark.parametrize("scale", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [0, 11])
def test_where_no_token_counts_every_gradient_is_zero(backend, reduction, scale, tokens):
    """A batch without answers spoils no accumulated gradient, whatever the loss is scaled by."""
    hidden, weight, bias, _ = problem(backend)
    hidden = hidden.detach()[:tokens].requires_grad_()
    target = torch.full((tokens,), -100, device=backend.device)
    loss = linear_entmax_loss(hidden, weight, target, bias=bias, reduction=reduction, impl=backend.impl)
    assert loss.isnan() if reduction == "mean" else loss == 0
    leaves = hidden, weight, bias
    for leaf, gradient in zip(leaves, torch.autograd.grad(scale * loss, leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_ignored_token_counts_for_nothing(backend, bad):
    """Whatever its hidden state holds, and whatever gradient comes in, its own gradient is 0."""
    hidden, weight, bias, target = problem(backend)
    leaves = hidden, weight, bias
    clean = linear_entmax_loss(hidden, weight, target, bias=bias, impl=backend.impl)
    expected = torch.autograd.grad(clean, leaves)
    with torch.no_grad():
        hidden[5] = bad
    loss = linear_entmax_loss(hidden, weight, target, bias=bias, impl=backend.impl)
    assert loss == clean
    for one, other in zip(torch.autograd.grad(loss, leaves, retain_graph=True), expected, strict=True):
        assert torch.equal(one, other)
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(bad * loss, leaves)
    assert (grad_hidden[5] == 0).all()
    assert not grad_hidden[0].isfinite().all(), "what counts is scaled"
    assert not grad_weight.isfinite().all()
    assert not grad_bias.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scaled_losses_in_16_bits(backend, reduction):
    """A mean over many tokens, times the scale that keeps float16 gradients from vanishing: as from float64."""
    if backend.is_interpreted:
        pytest.skip("many rows")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 16, generator=generator), 0.02 * torch.randn(300, 16, generator=generator)
    target = torch.randint(300, (4096,), generator=generator).to(backend.device)
    leaves = [tensor.to(backend.device, torch.float16).requires_grad_() for tensor in (hidden, weight)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scale = 65536.0 if reduction == "mean" else 0.25
    ours = scale * linear_entmax_loss(*leaves, target, reduction=reduction, impl=backend.impl)
    truth = scale * entmax_loss(linear(*exact), target, reduction=reduction)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, exact), strict=True):
        assert (one.double() - other).abs().max() <= 2e-3 * other.abs().max()


def test_without_gradient_none_is_computed(backend, monkeypatch):
    hidden, weight, _, target = problem(backend)
    monkeypatch.setattr(linear_loss.row_ops, "loss_backward", lambda *_: pytest.fail("a gradient was computed"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            linear_entmax_loss(hidden, weight, target, impl=backend.impl)


def test_backward_passes(backend):
    """As often as the graph is kept; a second derivative is refused."""
    hidden, weight, _, target = problem(backend)
    loss = linear_entmax_loss(hidden, weight, target, impl=backend.impl)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_loss has no second derivative"):
        gradient.square().sum().backward()


H, W, Y = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], W, Y), {}, TypeError, "hidden must be a torch.Tensor, got list"),
        ((H, W[:, :2], Y), {}, ValueError, r"hidden and weight must have shapes .*, got \(2, 3\) and \(5, 2\)"),
        ((H, W, Y[:1]), {}, ValueError, r"target must have shape \(2,\), got \(1,\)"),
        ((H, W, Y.float()), {}, TypeError, "target must be int64 classes, got torch.float32"),
        ((H, W, Y + 9), {}, ValueError, "target must hold classes from 0 to 4, or ignore_index -100, got 9"),
        ((H, W, Y), {"bias": W[0]}, ValueError, r"bias must have shape \(5,\), got \(3,\)"),
        ((H, W, Y), {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ((H, W, Y, 1.0), {}, ValueError, "alpha must not be 1"),
        ((H, W.double(), Y), {}, TypeError, "hidden and weight must have one dtype, got torch.float32, torch.float64"),
    ],
)
def test_wrong_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_entmax_loss(*arguments, **options)


def test_a_bias_gradient_in_float16_does_not_overflow():
    """140,000 rows add up to more than float16 holds before the mean divides."""
    bias = torch.zeros(2).half().requires_grad_()
    hidden, weight, target = torch.zeros(140_000, 1).half(), torch.zeros(2, 1).half(), torch.zeros(140_000).long()
    loss = linear_entmax_loss(hidden, weight, target, bias=bias)
    torch.testing.assert_close(torch.autograd.grad(loss, bias)[0], torch.tensor([-0.5, 0.5]).half())
