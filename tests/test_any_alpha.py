"""Entmax of rows for every alpha above 0, normmax, and sparsemax with a budget: plain PyTorch on the CPU."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from flash_entmax import budget_sparsemax, entmax, entmax_loss, normmax, normmax_loss
from flash_entmax.nn import BudgetSparsemax, Entmax, EntmaxLoss, Normmax, NormmaxLoss

DENSE, SPARSE = [0.05, 0.7, 0.999], [1.001, 2.3, 4.0]
BY_ROW = torch.tensor([[0.3], [1.0], [1.5], [2.5]], dtype=torch.float64)
MAPS = {
    **{f"entmax {alpha}": partial(entmax, alpha=alpha) for alpha in (*DENSE, *SPARSE)},
    "entmax by row": lambda x: entmax(x, BY_ROW.to(x.dtype)),
    **{f"normmax {alpha}": partial(normmax, alpha=alpha) for alpha in (1.05, 2.0, 10.0)},
    **{f"budget {budget}": partial(budget_sparsemax, budget=budget) for budget in (0.5, 1.0, 2.0)},
}


def total(name):
    return float(name.split()[1]) if name.startswith("budget") else 1.0


def scores(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_hostile_rows(name, dtype):
    """Masked entries, equal entries, huge and tiny scores: rows have their sum, and gradients are finite."""
    x = scores(4, 300).to(dtype)
    x[0] *= 1e4
    x[1] = 1.0
    x[2] = scores(300, spread=1e-3).to(dtype)
    x[3, ::2] = -torch.inf
    leaf = x.clone().requires_grad_()
    p = MAPS[name](leaf)
    assert p.dtype == dtype
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(p.double().sum(-1), torch.full((4,), total(name)).double(), rtol=bound, atol=bound)
    assert (p[3, ::2] == 0).all()
    assert p[1].max() == p[1].min()
    (grad,) = torch.autograd.grad(p.double().square().sum(), leaf)
    assert grad.isfinite().all()
    assert (grad[3, ::2] == 0).all()


@pytest.mark.parametrize("name", MAPS)
def test_rows_without_numbers(name):
    """A row of -inf alone is 0; NaN and +inf make their own row NaN; the others are what they are without."""
    x = scores(4, 9)
    expected = MAPS[name](x)
    x[0], x[1, 3], x[3, 3] = -torch.inf, torch.nan, torch.inf
    leaf = x.requires_grad_()
    p = MAPS[name](leaf)
    assert (p[0] == 0).all()
    assert p[[1, 3]].isnan().all()
    torch.testing.assert_close(p[2], expected[2])
    (grad,) = torch.autograd.grad(p[[0, 2]].square().sum(), leaf)
    assert grad[[0, 2]].isfinite().all()
    assert MAPS[name](scores(4, 9)[:, :0] if "budget" not in name else scores(0, 9)).numel() == 0


def test_many_alphas_at_once():
    """Rows of more alphas than are solved one by one are what they are alone."""
    x = scores(4, 6, 20)
    alpha = torch.linspace(0.2, 2.6, 24, dtype=torch.float64).view(4, 1, 6)
    p = entmax(x.transpose(1, 2), alpha, 1)
    for row, number, own in zip(x.flatten(0, 1), alpha.flatten(), p.transpose(1, 2).flatten(0, 1), strict=True):
        torch.testing.assert_close(own, entmax(row, number.item()), rtol=1e-10, atol=1e-12)


def test_both_sides_of_alpha_1_meet():
    """Value, gradient and the gradient to alpha, in every precision that a double has."""
    x = scores(3, 30).requires_grad_()
    for near in (1e-12, 1e-7, 1e-3):
        results = []
        for alpha in (1.0 - near, 1.0, 1.0 + near):
            alpha = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
            p = entmax(x, alpha)
            results.append((p, *torch.autograd.grad(p.square().sum(), (x, alpha))))
        for outside in (results[0], results[2]):
            torch.testing.assert_close(outside, results[1], rtol=30 * near + 1e-10, atol=30 * near + 1e-12)
    torch.testing.assert_close(results[1][0], x.softmax(-1), rtol=1e-12, atol=1e-15)


def test_derivatives_by_finite_differences():
    x = scores(3, 6).requires_grad_()
    target = torch.tensor([1, -100, 5])
    alpha = torch.tensor([[0.4], [1.0], [2.3]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(entmax, (x, alpha))
    for alpha in (0.3, 2.4):
        assert gradcheck(partial(entmax_loss, target=target, alpha=alpha, label_smoothing=0.1), (x,))
    for function, number in ((normmax, [1.4, 2.0, 3.5]), (budget_sparsemax, [0.7, 2.2, 4.4])):
        number = torch.tensor(number, dtype=torch.float64).unsqueeze(-1).requires_grad_()
        assert gradcheck(function, (x, number))
        assert gradgradcheck(function, (x, number), fast_mode=True)
    loss = partial(normmax_loss, target=target, alpha=1.7, label_smoothing=0.1)
    assert gradcheck(loss, (x,))
    assert gradgradcheck(loss, (x,), fast_mode=True)
    assert gradcheck(loss, (x,), check_forward_ad=True, check_backward_ad=False)


def test_losses_next_to_alpha_1_are_divergences():
    """From probabilities to softmax, KL(q || p): no digits of their entropy cancel, in float32 either."""
    x, q = scores(4, 9).float(), scores(4, 9, spread=2.0).float().softmax(-1)
    divergence = (q * (q.log() - x.log_softmax(-1))).sum(-1)
    mixed = 0.8 * torch.eye(9)[:4] + 0.2 / 9
    smoothed = (mixed * (mixed.log() - x.log_softmax(-1))).sum(-1)
    for alpha in (1 - 1e-7, 1 + 1e-12, 1 + 1e-7):
        value = entmax_loss(x, q, alpha, reduction="none", impl="torch")
        torch.testing.assert_close(value, divergence, rtol=1e-5, atol=1e-5)
        value = entmax_loss(x, torch.arange(4), alpha, label_smoothing=0.2, reduction="none", impl="torch")
        torch.testing.assert_close(value, smoothed, rtol=1e-5, atol=1e-5)


def test_targets_of_the_normmax_loss():
    """Of its own prediction it is 0; shapes are those of cross_entropy; what is ignored counts for nothing."""
    x = scores(4, 7, 3)
    assert normmax_loss(x, normmax(x, 3.0, 1), 3.0).abs() < 1e-12
    target = torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(1))
    each = normmax_loss(x, target, reduction="none")
    hot = torch.nn.functional.one_hot(target, 7).movedim(-1, 1).double()
    torch.testing.assert_close(each, normmax_loss(x, hot, reduction="none"))
    target[0, 0] = 9
    x[0, :, 0] = torch.nan
    leaf = x.clone().requires_grad_()
    loss = normmax_loss(leaf, target, ignore_index=9)
    torch.testing.assert_close(loss, each.flatten()[1:].mean())
    assert (torch.autograd.grad(loss, leaf)[0][0, :, 0] == 0).all()


def test_a_budget_that_is_not_to_be_had():
    """With fewer entries than the budget, each is 1; a budget of 1 is sparsemax."""
    x = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    assert budget_sparsemax(x, 3.0).tolist() == [[1.0, 0.0, 1.0, 0.0]]
    torch.testing.assert_close(budget_sparsemax(scores(5, 9), 1.0), entmax(scores(5, 9), 2.0))


def test_an_entry_far_above_the_others_takes_no_digits_from_a_budget():
    x = torch.tensor([[1e8, 0.5, 0.25, 0.0], [0.5, 3e38, -3e38, 0.0]], requires_grad=True)
    p = budget_sparsemax(x, torch.tensor([[2.0], [3.0]]))
    torch.testing.assert_close(p, torch.tensor([[1.0, 7 / 12, 4 / 12, 1 / 12], [1.0, 1.0, 0.0, 1.0]]))
    assert budget_sparsemax(x, torch.tensor(torch.nan)).isnan().all()
    (grad,) = torch.autograd.grad(p[0, 1], x)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 2 / 3, -1 / 3, -1 / 3], [0.0] * 4]))


@pytest.mark.parametrize("f", [lambda x: normmax(x, 2.0), lambda x: budget_sparsemax(x, 1.0), lambda x: entmax(x, 1.5)])
def test_a_row_of_nan_has_a_gradient_of_nan(f):
    """And the others have their own, masked entries among them."""
    x = torch.tensor([[torch.nan, 0.0, 1.0], [-torch.inf, 1.0, 1.2]], requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 2.0])
    (gradient,) = torch.autograd.grad((f(x) * weights).sum(), x)
    assert gradient[0].isnan().all()
    (alone,) = torch.autograd.grad((f(x[1:]) * weights).sum(), x)
    assert torch.equal(gradient[1], alone[1])


def test_support_sizes():
    x = scores(3, 8, 5, spread=2.0)
    for function in (partial(entmax, alpha=1.7), partial(normmax, alpha=1.5), partial(budget_sparsemax, budget=2)):
        p, size = function(x, dim=1, return_support_size=True)
        assert torch.equal(size, (p > 0).sum(1, keepdim=True))
        assert torch.equal(p, function(x, dim=1))
    assert entmax(x, 0.5, 1, return_support_size=True)[1].unique().tolist() == [8]


def test_modules():
    x, target = scores(4, 7), torch.tensor([0, 3, 6, 2])
    assert torch.equal(Entmax(0.5)(x), entmax(x, 0.5))
    assert torch.equal(EntmaxLoss(2.5)(x, target), entmax_loss(x, target, 2.5))
    assert torch.equal(Normmax(3.0, 0)(x), normmax(x, 3.0, 0))
    assert torch.equal(Normmax()(x, alpha=1.5), normmax(x, 1.5))
    assert torch.equal(BudgetSparsemax(1.5)(x), budget_sparsemax(x, 1.5))
    assert torch.equal(BudgetSparsemax()(x, budget=3.0), budget_sparsemax(x, 3.0))
    options = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
    assert torch.equal(NormmaxLoss(1.5, **options)(x, target), normmax_loss(x, target, 1.5, **options))
    module = Entmax()
    module.alpha = 0.5
    assert module.alpha == 0.5


@pytest.mark.parametrize("function", [partial(normmax, alpha=1.7), budget_sparsemax])
def test_samples_side_by_side_and_compiled(function):
    x = scores(4, 3, 6)
    torch.testing.assert_close(torch.vmap(function)(x), function(x))
    compiled = torch.compile(lambda x: function(x).square().sum(), backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, torch.func.grad(lambda x: function(x).square().sum())(x))
    assert function(x.to("meta")).shape == x.shape


X, CLASSES = torch.zeros(2, 5), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: normmax(X, 1.0), ValueError, "alpha of normmax must be finite and above 1, got 1.0"),
        (lambda: normmax(X, torch.tensor([[2.0], [0.5]])), ValueError, "alpha of normmax must be .* above 1, got 0.5"),
        (lambda: normmax(X, "2"), TypeError, "alpha must be a number or a tensor, got str"),
        (lambda: normmax(X, torch.ones(5) + 1), ValueError, r"alpha must broadcast to \(2, 1\), .* got \(5,\)"),
        (lambda: normmax(X, 2.0, 2), ValueError, "dim must be from -2 to 1"),
        (lambda: normmax(X.long()), TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        (lambda: normmax_loss(X, CLASSES + 4), ValueError, "target must hold classes from 0 to 4, .*, got 5"),
        (lambda: normmax_loss(X, CLASSES, torch.ones(())), TypeError, "alpha must be a number, got Tensor"),
        (lambda: normmax_loss(X, CLASSES, reduction="no"), ValueError, "reduction must be one of .* got 'no'"),
        (lambda: budget_sparsemax(X, 5.5), ValueError, "budget must be from 0 to 5, the entries of a row, got 5.5"),
        (lambda: budget_sparsemax(X, torch.tensor(-1.0)), ValueError, "budget must be from 0 to 5, .* got -1"),
        (lambda: budget_sparsemax(X, None), TypeError, "budget must be a number or a tensor, got NoneType"),
        (lambda: BudgetSparsemax(-1.0), ValueError, "budget must be 0 or more, got -1.0"),
        (lambda: Normmax(2.0, 1.5), TypeError, "dim must be an integer, got 1.5"),
        (lambda: Entmax(0.0), ValueError, "alpha must be finite and above 0, got 0.0"),
        (lambda: Entmax(0.5, learn_alpha=True), ValueError, "a learned alpha must start between 1.01 and 2.0, got 0.5"),
        (lambda: entmax(X, 0.5, impl="triton"), ValueError, "impl='triton'.*"),
    ],
)
def test_wrong_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_large_order_of_normmax_loses_nothing():
    loss = normmax_loss(torch.zeros(1, 1000), torch.tensor([3]), 200.0)
    torch.testing.assert_close(loss, torch.tensor(1 - 1000 ** (1 / 200 - 1)))
