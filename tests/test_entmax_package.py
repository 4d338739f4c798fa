"""What the package entmax has: every public name has its equivalent, with the same values and gradients in float64."""

import inspect
import re
from functools import partial
from pathlib import Path

import entmax as peer
import pytest
import torch

import flash_entmax
from flash_entmax import (
    budget_sparsemax,
    entmax,
    entmax15,
    entmax15_loss,
    entmax_loss,
    nn,
    normmax,
    normmax_loss,
    sparsemax,
    sparsemax_loss,
)

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "adoption.md"
STEPS = 200  # of their bisections: all digits
MANY_ALPHAS = torch.tensor([0.05, 0.2, 0.75, 0.999, 1.001, 1.3, 2.55], dtype=torch.float64).unsqueeze(-1)
ALPHAS = [0.05, 0.5, 0.99, 1.005, 1.3, 2.25, 2.55]
losses = partial(partial, reduction="none")

# Their name -> (ours, theirs) of scores (7, 9), for each way to call it
MAPS = {
    "sparsemax": [(sparsemax, peer.sparsemax)],
    "Sparsemax": [(nn.Entmax(2.0, 0), peer.Sparsemax(0))],
    "sparsemax_bisect": [(sparsemax, partial(peer.sparsemax_bisect, n_iter=STEPS))],
    "SparsemaxBisect": [(nn.Entmax(2.0), peer.SparsemaxBisect(n_iter=STEPS))],
    "entmax15": [(entmax15, peer.entmax15)],
    "Entmax15": [(nn.Entmax(1.5, 0), peer.Entmax15(0))],
    "entmax_bisect": [
        (partial(entmax, alpha=alpha), partial(peer.entmax_bisect, alpha=alpha, n_iter=STEPS))
        for alpha in (*ALPHAS, MANY_ALPHAS)
    ],
    "EntmaxBisect": [(nn.Entmax(alpha, 0), peer.EntmaxBisect(alpha, 0, STEPS)) for alpha in (0.5, 1.7, 2.25)],
    "normmax_bisect": [
        (partial(normmax, alpha=alpha), partial(peer.normmax_bisect, alpha=alpha, n_iter=STEPS))
        for alpha in (1.05, 2.0, 5.0, 1.0 + MANY_ALPHAS)
    ],
    "NormmaxBisect": [(nn.Normmax(1.5, 0), peer.NormmaxBisect(1.5, 0, STEPS))],
    "budget_bisect": [
        (partial(budget_sparsemax, budget=budget), partial(peer.budget_bisect, budget=budget, n_iter=STEPS))
        for budget in (0.3, 1.0, 2.5, 8.9, 3.0 * MANY_ALPHAS)
    ],
    "BudgetBisect": [(nn.BudgetSparsemax(2.5, 0), peer.BudgetBisect(2.5, 0, STEPS))],
}
# Their name -> (ours, theirs) of scores and classes
LOSSES = {
    "sparsemax_loss": [(losses(sparsemax_loss), peer.sparsemax_loss)],
    "sparsemax_bisect_loss": [(losses(sparsemax_loss), partial(peer.sparsemax_bisect_loss, n_iter=STEPS))],
    "SparsemaxLoss": [(nn.EntmaxLoss(2.0), peer.SparsemaxLoss())],
    "SparsemaxBisectLoss": [(nn.EntmaxLoss(2.0), peer.SparsemaxBisectLoss(STEPS))],
    "entmax15_loss": [(losses(entmax15_loss), peer.entmax15_loss)],
    "Entmax15Loss": [(nn.EntmaxLoss(1.5, ignore_index=3), peer.Entmax15Loss(ignore_index=3))],
    "entmax_bisect_loss": [
        (losses(entmax_loss, alpha=alpha), partial(peer.entmax_bisect_loss, alpha=alpha, n_iter=STEPS))
        for alpha in ALPHAS
    ],
    "EntmaxBisectLoss": [(nn.EntmaxLoss(1.3, reduction="sum"), peer.EntmaxBisectLoss(1.3, STEPS, reduction="sum"))],
    "normmax_bisect_loss": [
        (losses(normmax_loss, alpha=alpha), partial(peer.normmax_bisect_loss, alpha=alpha, n_iter=STEPS))
        for alpha in (1.2, 2.0, 5.0)
    ],
    "NormmaxBisectLoss": [(nn.NormmaxLoss(2.0), peer.NormmaxBisectLoss(2.0, STEPS))],
}
MODULES = {"activations", "losses", "root_finding"}


def scores(seed=0, spread=1.0):
    return spread * torch.randn(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(function, x):
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, scores(1)[: len(value)] if value.dim() == 2 else value)[0]


def public_names():
    return {name for name in dir(peer) if not name.startswith("_")}


def test_every_public_name_is_compared():
    """A name that a later version brings fails here, until it has an equivalent."""
    assert public_names() == set(MAPS) | set(LOSSES) | MODULES
    assert all(inspect.ismodule(getattr(peer, name)) for name in MODULES)


def test_the_guide_has_every_public_name():
    """Each in the first column of a row, and what the second column names is there."""
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", GUIDE.read_text(), flags=re.MULTILINE)
    table = {name: ours for theirs, ours in rows for name in re.findall(r"`(\w+)", theirs)}
    assert public_names() <= set(table), f"not in {GUIDE.name}: {sorted(public_names() - set(table))}"
    for name in public_names() - MODULES:
        for ours in re.findall(r"`(nn\.)?(\w+)", table[name])[:1]:
            home = nn if ours[0] else flash_entmax
            assert ours[1] in home.__all__, f"{name}: {ours}"


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_maps(name, spread):
    for ours, theirs in MAPS[name]:
        actual, expected = (value_and_gradient(function, scores(spread=spread)) for function in (ours, theirs))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    target = torch.randint(9, (7,), generator=torch.Generator().manual_seed(2))
    for ours, theirs in LOSSES[name]:
        actual, expected = (
            value_and_gradient(lambda x: function(x, target), scores(spread=2.0))  # noqa: B023
            for function in (ours, theirs)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_alpha():
    x = scores()

    def of(function):
        alpha = MANY_ALPHAS.clone().requires_grad_()
        return torch.autograd.grad(function(x, alpha), alpha, scores(1))[0]

    theirs = of(partial(peer.entmax_bisect, n_iter=STEPS))
    torch.testing.assert_close(of(entmax), theirs, rtol=1e-8, atol=1e-8)  # 1 / (alpha - 1)^2 takes their digits
