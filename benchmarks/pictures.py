"""Draws the pictures of the README from result files: python benchmarks/pictures.py.

docs/speed.png: the time of a training step of attention. docs/head.png: to what one head of a trained model attends.
"""

import json
from pathlib import Path
from statistics import mean

from flash_entmax.show.plot.shared import INVISIBLE, save_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYERS = RESULTS / "2026-11-29-h200-trained-layers.json"
CAPTURED = RESULTS / "2026-11-29-h200-keys.json"
HEAD = RESULTS / "2026-11-30-h200-adapt-head.json"
OURS, SOFTMAX = "#d7301f", "#969696"


def main() -> None:
    print(speed())
    print(head())


def speed() -> Path:
    import matplotlib.pyplot as plt

    bars = bars_of(json.loads(LAYERS.read_text())["layers"], json.loads(CAPTURED.read_text())["rows"])
    figure, axes = plt.subplots(figsize=(8, 2.3), layout="constrained")
    axes.barh(range(len(bars)), list(bars.values()), color=OURS, height=0.6)
    axes.axvline(1, color=SOFTMAX, linewidth=2)
    axes.text(0.99, len(bars) - 0.45, "softmax by cuDNN", color=SOFTMAX, va="center", ha="right")
    for place, ratio in enumerate(bars.values()):
        axes.text(ratio - 0.01, place, f"{ratio:.2f}", color="white", va="center", ha="right", weight="bold")
    axes.set(yticks=range(len(bars)), yticklabels=list(bars), xlim=(0, 1.02), ylim=(-0.5, len(bars) - 0.2))
    axes.set_xlabel("step of attention, time relative to cuDNN")
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, ROOT / "docs" / "speed.png")


def head() -> Path:
    """Queries from top to bottom, keys from left to right. Darker is more probable, white exactly 0, grey not seen."""
    import matplotlib.pyplot as plt

    found = json.loads(HEAD.read_text())
    words = [token.strip() or "newline" for token in found["tokens"]]
    rows = [[row.get(str(key), float("nan")) for key in range(len(words))] for row in found["probabilities"]]
    figure, axes = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    for number in range(len(words)):
        axes.axhspan(number - 0.5, number + 0.5, xmin=(number + 1) / len(words), color=INVISIBLE, linewidth=0, zorder=0)
    axes.imshow(rows, cmap="Reds", vmin=-0.25, vmax=1, zorder=1)
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    axes.set_yticks(range(len(words)), words, fontsize=8)
    axes.set(xlabel="key", ylabel="query")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return save_figure(figure, ROOT / "docs" / "head.png")


def bars_of(layers: dict, captured: dict) -> dict[str, float]:
    """The time over cuDNN's, as a CUDA graph, by what was measured; the slowest first, so that it stands lowest."""
    (smollm2,) = (row for name, row in captured.items() if "smollm2" in name)
    bars = {
        f"small language model, {tokens:,} tokens": mean(
            each["ratio"]["graph"] for each in layers[f"{tokens}"].values()
        )
        for tokens in (8_192, 32_768)
    }
    bars["SmolLM2-135M, layer 20, 8,192 tokens"] = smollm2["ratio"]["graph"]
    return dict(sorted(bars.items(), key=lambda bar: -bar[1]))


if __name__ == "__main__":
    main()
