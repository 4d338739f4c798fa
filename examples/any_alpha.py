"""From dense to sparse: one family of maps, what each is for, and an alpha that leaves the usual range.

python examples/any_alpha.py
"""

import torch

from flash_entmax import budget_sparsemax, entmax, normmax, normmax_loss

torch.manual_seed(0)
scores = torch.tensor([2.0, 1.6, 1.5, 0.2, -1.0], dtype=torch.float64)


def row(name: str, p: torch.Tensor) -> None:
    print(f"{name:22}", "  ".join(f"{number:.3f}" for number in p.tolist()))


for alpha in (0.5, 1.0, 1.5, 2.0, 3.0):
    row(f"entmax, alpha {alpha}", entmax(scores, alpha))
row("normmax, alpha 2", normmax(scores, 2.0))
row("normmax, alpha 10", normmax(scores, 10.0))
row("a budget of 2", budget_sparsemax(scores, 2.0))
row("a budget of 2.5", budget_sparsemax(scores, 2.5))

# Rows may have an alpha each, on both sides of softmax, with a gradient. Here each row learns its own.
x = torch.randn(4, 50, dtype=torch.float64)
target = entmax(x, torch.tensor([[0.6], [1.0], [1.5], [2.2]], dtype=torch.float64))
log_alphas = torch.full((4, 1), 0.2, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([log_alphas], lr=0.03)
for _ in range(120):
    optimizer.zero_grad()
    (entmax(x, log_alphas.exp()) - target).square().sum().backward()
    optimizer.step()
_, size = entmax(x, log_alphas.exp(), return_support_size=True)
print("\nlearned alphas", "  ".join(f"{number:.2f}" for number in log_alphas.exp().flatten().tolist()))
print("support sizes ", "  ".join(f"{number}" for number in size.flatten().tolist()), "of 50")

# A soft choice of 3 of 8 items that is differentiable: only items that are neither in nor out have a gradient.
items = torch.randn(8, dtype=torch.float64, requires_grad=True)
chosen = budget_sparsemax(items, 3.0)
(gradient,) = torch.autograd.grad(chosen.square().sum(), items)
print(f"\n{(chosen == 1).sum()} items are in, {(chosen == 0).sum()} are out, {(gradient != 0).sum()} are in between")

loss = normmax_loss(torch.randn(16, 5), torch.randint(5, (16,)), alpha=2.0)
print(f"normmax loss of random scores: {loss:.3f}")
