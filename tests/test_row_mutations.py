"""Deliberate faults in the row kernels, in Triton's interpreter: each turns its check red."""

from importlib.util import find_spec

import pytest
import torch
from conftest import HAS_CUDA
from mutants import Mutant, plant
from test_losses import definition, one_hot, value_and_gradient

from flash_entmax import entmax, entmax_loss
from flash_entmax.backends.reference import entmax_rows

if HAS_CUDA or not find_spec("triton"):
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flash_entmax.backends.triton import alpha, row_solve, rows


def check_values() -> None:
    x = 2 * torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    numbers = torch.tensor([[1.5], [1.2], [1.9]], requires_grad=True)
    p = entmax(leaf, numbers, impl="triton")
    rows = zip(x, numbers.detach().double().flatten(), strict=True)
    truth = torch.cat([entmax_rows((a - 1) * row.double()[None], a)[0] for row, a in rows])
    torch.testing.assert_close(p.double(), truth, rtol=1e-5, atol=1e-6)


def check_gradient() -> None:
    x, grad = (2 * torch.randn(3, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (ours,) = torch.autograd.grad(entmax(leaf, impl="triton"), leaf, grad)
    (truth,) = torch.autograd.grad(entmax_rows(0.5 * exact, 1.5)[0], exact, grad.double())
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


def check_crowd() -> None:
    """A rounding of the offset, near 1, is much for each of many small probabilities."""
    x = -2 * torch.linspace(0.95, 0.99, 8)[:, None].repeat(1, 131_072)
    x[:, 0] = 0
    assert (entmax(x, impl="triton").double().sum(-1) - 1).abs().max() <= 2e-6


def check_loss() -> None:
    x = 3 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([3, 199, -100, 70])
    options = {"reduction": "none", "label_smoothing": 0.2, "impl": "triton"}
    ours = value_and_gradient(lambda x: entmax_loss(x, target, **options), x)
    kept = target >= 0
    q = one_hot(target.clamp_min(0), 200, 0.2)
    truth = value_and_gradient(lambda x: definition(x, q, 1.5) * kept, x.double())
    torch.testing.assert_close([t.double() for t in ours], list(truth), rtol=1e-5, atol=1e-5)


FAULTS = {
    "the certificate is too small": (row_solve, "certify_row", "return ...", "return 0.5 * ...", check_values),
    "a segment's maximum is lost": (
        row_solve, "scan_row", "return ...", "tl.store(row.maxima + 1, maximum - 100.0)\nreturn ...", check_values,
    ),
    "steps go too far": (alpha, "newton_step", "return ...", "return 0.9 * ...", check_values),
    "every row takes the first alpha": (row_solve, "exponent_of", "exponent + row", "exponent", check_values),
    "the last step is left out": (row_solve, "final_probability", "d + last_step", "d", check_crowd),
    "u is p in the gradient": (alpha, "weight_of_probability", "return ...", "return p", check_gradient),
    "ignored rows count": (
        rows, "class_of", "return ...", "return tl.maximum(target_class, 0), counts == counts", check_loss,
    ),
    "smoothing takes a wrong mean": (rows, "mean_score", "return ...", "return maximum", check_loss),
}  # fmt: skip


CASES = [(None, check) for check in (check_values, check_gradient, check_crowd, check_loss)]
CASES += [(name, check) for name, (*_, check) in FAULTS.items()]
SPANS = [None, 2]  # segments together: as shipped, where rows this short are held in registers, and so few that none is


def meaningful(fault, check, segments) -> bool:
    """A long row is read in spans as shipped, and a row that is held has no maxima in memory."""
    return segments is None if check is check_crowd else segments == 2 or fault != "a segment's maximum is lost"


@pytest.mark.parametrize(
    ("fault", "check", "segments"), [(*case, few) for case in CASES for few in SPANS if meaningful(*case, few)]
)
def test_row_faults_are_seen(fault, check, segments, monkeypatch, tmp_path):
    if segments is not None:
        monkeypatch.setattr(row_solve, "MOST_SEGMENTS", segments)
    if fault is None:
        check()
        return
    *mutant, _ = FAULTS[fault]
    plant(Mutant(*mutant), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check()
