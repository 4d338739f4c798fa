"""A variational autoencoder whose pixels can be exactly 0 or 1, on 8 x 8 digits: FYVAE (arXiv 2502.10295).

Half of the pixels of a digit are exactly black. A Bernoulli observation model, whose loss is cross entropy, gives each
of them a little grey. With entmax in place of the sigmoid, and its Fenchel-Young loss in place of cross entropy, the
decoder can say black and mean it: a pixel with logit t is entmax([t, 0])[0], and its loss is L([t, 0]; [x, 1 - x]).

    python examples/variational_autoencoder.py [EPOCHS]

Needs scikit-learn for the digits, and matplotlib. Writes variational_autoencoder.png.
"""

import math
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from flash_entmax import entmax, entmax_loss

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
ALPHAS = (1.0, 1.5, 2.0)
LATENT, WIDTH, BATCH = 8, 128, 100


class Autoencoder(nn.Module):
    """Images (batch, 64) in [0, 1]; latents (batch, LATENT), Gaussian given an image."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 64))

    def free_energy(self, images: Tensor, alpha: float) -> Tensor:
        """The mean over images of the pixels' losses, and KL(posterior || standard normal).

        At any alpha a pixel of which nothing is known costs ln 2, so that pixels weigh as much beside the divergence.
        """
        unit = math.log(2) / pixel_losses(torch.zeros(1), torch.ones(1), alpha)
        mean, log_variance = self.encoder(images).chunk(2, -1)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        return (unit * pixel_losses(self.decoder(latents), images, alpha).sum(-1) + divergence).mean()


def pixel_losses(logits: Tensor, pixels: Tensor, alpha: float) -> Tensor:
    """L([t, 0]; [x, 1 - x]) of each pixel; cross entropy less the pixel's own entropy at alpha 1."""
    if alpha == 1:
        own = torch.special.entr(pixels) + torch.special.entr(1 - pixels)
        return binary_cross_entropy_with_logits(logits, pixels, reduction="none") - own
    pairs, targets = pad(logits.reshape(-1, 1), (0, 1)), torch.stack([pixels, 1 - pixels], -1).reshape(-1, 2)
    return entmax_loss(pairs, targets, alpha, reduction="none").view(pixels.shape)


def pixels_of(logits: Tensor, alpha: float) -> Tensor:
    return entmax(pad(logits.unsqueeze(-1), (0, 1)), alpha)[..., 0]


images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
training, held_out = images[:1500], images[1500:]
print(f"digits: {100 * (held_out == 0).float().mean():.0f} % of the pixels are exactly 0")

rows = [held_out[:12]]
for alpha in ALPHAS:
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in training[torch.randperm(len(training))].split(BATCH):
            optimizer.zero_grad()
            model.free_energy(batch, alpha).backward()
            optimizer.step()
    with torch.no_grad():
        means, _ = model.encoder(held_out).chunk(2, -1)
        restored = pixels_of(model.decoder(means), alpha)
        samples = pixels_of(model.decoder(torch.randn(1000, LATENT)), alpha)
    rows += [restored[:12], samples[:12]]
    error, black = (restored - held_out).abs().mean(), (samples == 0).float().mean()
    print(f"alpha {alpha:g}: error of a restored pixel {error:.3f}, exactly 0 in samples {100 * black:2.0f} %")

figure = Figure(figsize=(7, 5.4), layout="constrained")
titles = ["digits", *(f"{what}, alpha {alpha:g}" for alpha in ALPHAS for what in ("restored", "samples"))]
for axes, title, row in zip(figure.subplots(len(rows), 1), titles, rows, strict=True):
    shown = pad(row.view(-1, 8, 8), (0, 2), value=torch.nan)  # a gap between images
    axes.imshow(shown.transpose(0, 1).reshape(8, -1), cmap="magma", vmin=0, vmax=1)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_axis_off()
figure.savefig("variational_autoencoder.png", dpi=120)
print("variational_autoencoder.png")
