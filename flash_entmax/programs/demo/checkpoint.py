"""The trained model as a file of safetensors, which `flash-entmax inspect` opens. Its metadata say what shapes it."""

import json
from dataclasses import replace
from pathlib import Path

from ..errors import CommandError, require
from .model import Transformer
from .settings import CPU, MODEL_FILE, SMALLEST, DemoSettings, settings_for

SIZES = tuple(CPU)


def save(model: Transformer, settings: DemoSettings) -> Path:
    """Write the weights, and the settings that shape them, into the folder of the results."""
    from safetensors.torch import save_file

    path = settings.out / MODEL_FILE
    sizes = {name: getattr(settings, name) for name in (*SIZES, "alpha")}
    save_file(model.state_dict(), path, {"sizes": json.dumps(sizes)})
    return path


def load(path: Path, device: str) -> tuple[Transformer, DemoSettings]:
    """The model in evaluation mode on "auto", "cpu" or "cuda". CommandError for a file that `save` did not write."""
    require("demo", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            sizes = (file.metadata() or {}).get("sizes")
        if sizes is None:
            raise ValueError("it has no sizes of a model; of a model of Transformers name the folder")
        sizes = json.loads(sizes)
        settings = settings_for(device, path.parent, None, sizes.pop("alpha"), None, smallest=True)
        settings = replace(settings, **sizes)
        model = Transformer(settings.layers, settings.width, settings.heads, alpha=settings.alpha)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(f"{path} is not a model that the demo wrote: {error}") from error
    return model.to(settings.device).eval(), settings


def load_trained(settings: DemoSettings) -> tuple[Transformer, DemoSettings] | None:
    """The model in the folder of the results, and the settings with its sizes; None if there is none.

    CommandError for a model with another alpha than the one asked for, or with larger sizes than --smallest.
    """
    path = settings.out / MODEL_FILE
    if not path.exists():
        return None
    model, trained = load(path, settings.device.type)
    asked = {"alpha": settings.alpha}
    if settings.context == SMALLEST["context"]:
        asked |= {name: getattr(settings, name) for name in ("context", "layers", "width")}
    for name, value in asked.items():
        if getattr(trained, name) != value:
            raise CommandError(
                f"{path} was trained with {name} {getattr(trained, name)}, and {value} is asked for: choose another "
                "--out to train a new model"
            )
    return model, replace(trained, text=settings.text, seed=settings.seed, generate=True)
