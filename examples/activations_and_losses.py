"""Entmax in place of softmax: exact zeros, a learned alpha, and a loss that a class can win.

python examples/activations_and_losses.py
"""

import torch

from flash_entmax import entmax, entmax15, sparsemax
from flash_entmax.nn import Entmax, EntmaxLoss

torch.manual_seed(0)
torch.set_printoptions(precision=3, sci_mode=False)

scores = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
print("scores     ", scores)
print("softmax    ", scores.softmax(-1))
print("entmax 1.5 ", entmax15(scores))
print("sparsemax  ", sparsemax(scores))

# Any shape, any dimension; -inf masks.
grid = torch.randn(2, 4, 6).masked_fill(torch.rand(2, 4, 6) < 0.3, -torch.inf)
p = entmax(grid, alpha=1.7, dim=1)
print(
    f"\nalong dimension 1, columns sum to {p.sum(1).min():.3f} to {p.sum(1).max():.3f}, {(p == 0).sum()} of 48 are zero"
)

# Alpha has an exact gradient, so the best sparsity can be learned. Here the target has the sparsity of alpha 1.8.
wide = torch.randn(64, 30)
target = entmax(wide, 1.8)
learned = Entmax(1.2, learn_alpha=True)
optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
for _ in range(200):
    optimizer.zero_grad()
    (learned(wide) - target).square().sum().backward()
    optimizer.step()
print(f"\na target made with alpha 1.8: learned, from 1.2, alpha {learned.alpha.item():.3f}")

# A classifier: once the right class is ahead by 2, loss and gradient are exactly 0, and training leaves it alone.
points = torch.randn(256, 2)
classes = (points[:, 0] > 0).long() + 2 * (points[:, 1] > 0).long()
for name, criterion in (("entmax loss", EntmaxLoss(1.5)), ("cross entropy", torch.nn.CrossEntropyLoss())):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        criterion(model(points), classes).backward()
        optimizer.step()
    logits = model(points)
    (gradient,) = torch.autograd.grad(criterion(logits, classes), logits)
    done, right = (gradient == 0).all(-1).float().mean(), (logits.argmax(-1) == classes).float().mean()
    print(f"{name:14} {100 * right:.0f} % right, gradient exactly 0 for {100 * done:.0f} % of the points")
