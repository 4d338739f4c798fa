"""Do mixtures whose points belong to few components find clusters better than EM (arXiv 2502.10295)?

The same starts are fitted by EM (alpha 1) and by Fenchel-Young EM (alpha 1.5 and 2). Measured is how well the largest
responsibilities agree with the labels, without outliers: adjusted mutual information, 1 for the same clusters and 0 for
chance. scikit-learn's own EM with its defaults, which ends early, stands beside them.

- the paper's blobs: four Gaussians, 1,000 points, and 100 outliers, uniform in a square. All starts near the centre.
- other blobs of that kind: each seed draws its own points and outliers. Starts are k-means.
- digits: those of scikit-learn, 1,797 images of 8 x 8, by 16 principal components. Clean data: no gain is expected.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flash_entmax.variational import GaussianMixture

from ..files import write_json
from .report import over_seeds
from .results import conditions
from .settings import RecipeSettings

SEEDS = {"toy": 2, "small": 5, "full": 20}
ITERATIONS = {"toy": 10, "small": 200, "full": 200}
ALPHAS = {"EM": 1.0, "alpha 1.5": 1.5, "alpha 2": 2.0}
PEER = "EM of scikit-learn"
CENTRES = [[0, 0], [1, 1], [1, -1], [-1, -1]]
DEVIATIONS = [0.5, 0.7, 0.9, 0.11]
OUTLIER = -1  # the label of an outlier


class Data(NamedTuple):
    """How many components; seed -> (points, labels) on the CPU; seed -> the start's options of GaussianMixture."""

    components: int
    points: Callable[[int], tuple[Tensor, Tensor]]
    start: Callable[[int], dict]


def blobs(seed: int, outlier_seed: int) -> tuple[Tensor, Tensor]:
    """1,000 points of four Gaussians, and 100 outliers."""
    from sklearn.datasets import make_blobs

    points, labels = make_blobs(n_samples=1000, centers=CENTRES, cluster_std=DEVIATIONS, random_state=seed)
    outliers = uniform(torch.Generator().manual_seed(outlier_seed), 100, 2) * 6 - 3
    labels = torch.cat([torch.from_numpy(labels).long(), torch.full((100,), OUTLIER)])
    return torch.cat([torch.from_numpy(points), outliers]), labels


def paper_blobs(seed: int) -> tuple[Tensor, Tensor]:
    """The same for each seed."""
    return blobs(0, 40)


def paper_start(seed: int) -> dict:
    """Means near the origin, and covariances near the identity."""
    draw = torch.Generator().manual_seed(seed)
    means, roots = uniform(draw, 4, 2) * 0.1, uniform(draw, 4, 2, 2) * 0.1
    return {"means_init": means, "covariances_init": roots @ roots.mT + torch.eye(2, dtype=torch.float64)}


def digits(seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(PCA(16, random_state=0).fit_transform(images)), torch.from_numpy(labels).long()


def uniform(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draw, dtype=torch.float64)


DATA = {
    "the paper's blobs": Data(4, paper_blobs, paper_start),
    "other blobs": Data(4, lambda seed: blobs(seed, seed), lambda seed: {}),
    "digits": Data(10, digits, lambda seed: {}),
}


def run(settings: RecipeSettings) -> None:
    console, start = Console(highlight=False, markup=False), perf_counter()
    path = settings.out / f"mixture-{settings.size}.json"
    found = {name: measure(data, settings) for name, data in DATA.items()}
    results = {"conditions": conditions("mixture", settings), "seconds": perf_counter() - start, "found": found}
    write_json(path, results)
    for column in (agreement_table(found), support_table(found)):
        console.print(column)
    rise = max(max(arm["rises"]) for arms in found.values() for arm in arms.values() if "rises" in arm)
    console.print(f"the free energy of a point rose by at most {max(rise, 0.0):.1e} nats in an iteration")
    console.print(f"{draw(settings, path.with_suffix('.png'))}\n{path}", soft_wrap=True)


def measure(data: Data, settings: RecipeSettings) -> dict[str, dict[str, list[float]]]:
    """{arm: {measure: one number per seed}}."""
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in (*ALPHAS, PEER)}

    def note(arm: str, **numbers: float) -> None:
        for name, number in numbers.items():
            found[arm].setdefault(name, []).append(number)

    for seed in range(SEEDS[settings.size]):
        points, labels = data.points(seed)
        for arm, alpha in ALPHAS.items():
            fitted = fit(data, alpha, seed, points.to(settings.device), ITERATIONS[settings.size])
            note(
                arm,
                agreement=agreement(labels, fitted.responsibilities_.argmax(-1).cpu()),
                support=fitted.support_.sum(-1).double().mean().item(),
                free_energy=fitted.free_energies_[-1].item(),
                rises=max(fitted.free_energies_.diff().tolist(), default=0.0),
            )
        note(PEER, agreement=agreement(labels, torch.from_numpy(clusters_of_peer(data, points, seed))))
    return found


def fit(data: Data, alpha: float, seed: int, points: Tensor, iterations: int) -> GaussianMixture:
    """All iterations, as in the paper: the free energy may hardly fall for a while, and then go on."""
    options = {"max_iter": iterations, "tol": 0, "random_state": seed} | data.start(seed)
    return GaussianMixture(data.components, alpha, **options).fit(points)


def clusters_of_peer(data: Data, points: Tensor, seed: int):
    from sklearn.mixture import GaussianMixture as Peer

    return Peer(data.components, random_state=seed).fit_predict(points.numpy())


def agreement(labels: Tensor, clusters: Tensor) -> float:
    """Adjusted mutual information in %, without the outliers."""
    from sklearn.metrics import adjusted_mutual_info_score

    inside = labels != OUTLIER
    return 100.0 * adjusted_mutual_info_score(labels[inside].numpy(), clusters[inside].numpy())


def agreement_table(found: dict) -> Table:
    return table(found, "agreement with the labels, % (higher is better)", "agreement", "{:.1f}".format)


def support_table(found: dict) -> Table:
    return table(found, "components that a point belongs to, mean", "support", "{:.2f}".format)


def table(found: dict, title: str, measure: str, shown: Callable[[float], str]) -> Table:
    seeds = len(next(iter(found.values()))["EM"]["agreement"])
    result = Table(title=f"{title}: mean and standard deviation of {seeds} seeds", title_justify="left")
    result.add_column("fitted by")
    for name in found:
        result.add_column(name, justify="right")
    for arm in (*ALPHAS, PEER):
        cells = [arms[arm].get(measure) for arms in found.values()]
        if all(cells):
            result.add_row(arm, *(over_seeds(values, shown) for values in cells))
    return result


def draw(settings: RecipeSettings, path: Path) -> Path:
    """The paper's blobs, seed 0: clusters above, with each component's ellipse of two deviations; below, who belongs
    where, white where a responsibility is exactly 0."""
    from matplotlib.figure import Figure

    data = DATA["the paper's blobs"]
    points, labels = data.points(0)
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    above, below = figure.subplots(2, len(ALPHAS), height_ratios=(3, 1))
    for (arm, alpha), clusters, members in zip(ALPHAS.items(), above, below, strict=True):
        fitted = fit(data, alpha, 0, points, ITERATIONS[settings.size])
        draw_clusters(clusters, fitted, points, labels)
        shares = draw_members(members, fitted)
        score = agreement(labels, fitted.responsibilities_.argmax(-1))
        clusters.set_title(f"{arm}: agreement {score:.0f} %", loc="left")
        members.set_xlabel(f"points; {fitted.support_.sum(-1).double().mean():.2f} components each")
    below[0].set_ylabel("component")
    figure.colorbar(shares, ax=list(below), label="responsibility", pad=0.01)
    figure.savefig(path, dpi=120, facecolor="white")
    return path


def draw_clusters(axes, fitted: GaussianMixture, points: Tensor, labels: Tensor) -> None:
    from matplotlib import colormaps

    colours, owner = colormaps["tab10"], fitted.responsibilities_.argmax(-1)
    inside = labels != OUTLIER
    axes.scatter(*points[~inside].mT, marker="x", s=14, linewidths=0.8, c="0.6", label="outlier")
    axes.scatter(*points[inside].mT, s=6, c=owner[inside], cmap=colours, vmin=0, vmax=9, linewidths=0)
    turn = torch.linspace(0, 2 * torch.pi, 80, dtype=torch.float64)
    circle = 2 * torch.stack([turn.cos(), turn.sin()])
    for k, (mean, covariance) in enumerate(zip(fitted.means_, fitted.covariances_, strict=True)):
        axes.plot(*(mean[:, None] + torch.linalg.cholesky(covariance) @ circle), color=colours(k), linewidth=1.5)
    axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
    axes.legend(frameon=False, loc="upper left", fontsize=8, handletextpad=0.2)


def draw_members(axes, fitted: GaussianMixture):
    """Points in order of their component and of its responsibility, left to right."""
    from matplotlib.colors import LogNorm

    q = fitted.responsibilities_
    order = (q.argmax(-1) - q.amax(-1) / 2).argsort()
    shown = torch.where(q == 0, torch.nan, q.clamp_min(1e-4))[order].mT
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=LogNorm(1e-4, 1.0))
    axes.set_yticks(range(len(shown)))
    return image
