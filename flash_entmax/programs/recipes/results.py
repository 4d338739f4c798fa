"""The file of a recipe's results: under which conditions they hold, and what an earlier run left."""

import json
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch

from flash_entmax import __version__

from ..errors import CommandError
from .recipe import Size
from .settings import RecipeSettings
from .workers import cores

PACKAGE = Path(__file__).parents[2]


def conditions(name: str, settings: RecipeSettings, size: Size | None = None) -> dict:
    """``code`` is a hash of every line of the package, so that models of two versions are not mixed."""
    code = sha256(b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))
    return {
        "recipe": name,
        "size": settings.size,
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else f"cpu, {cores()} cores",
        "text": str(settings.text) if settings.text else "default",
        "settings": asdict(size) if size else {},
        "flash_entmax": __version__,
        "code": code.hexdigest()[:16],
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def load(path: Path, own: dict) -> dict:
    """The results that an interrupted run of the same conditions left in ``path``; empty ones if there are none."""
    if not path.exists():
        if path.with_suffix("").exists():
            raise CommandError(f"{path.with_suffix('')} has models without their {path.name}: move it away")
        return {"conditions": own, "runs": {}, "measures": {}}
    try:
        results = json.loads(path.read_text())
        found = dict(results["conditions"])
        own = json.loads(json.dumps(own))  # JSON turns tuples into lists
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} cannot be read ({error}): move it away to start anew") from error
    for name, value in own.items():
        if name != "date" and found.get(name) != value:
            name, before, now = first_difference(name, found.get(name), value)
            raise CommandError(f"{path} has results of {name} {before!r}, and this is {now!r}: take another --out")
    return results


def first_difference(name: str, before: object, now: object) -> tuple[str, object, object]:
    """(name, before, now) of the first entry that differs, where both are dicts of the same entries."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        return next((key, before[key], now[key]) for key in now if before[key] != now[key])
    return name, before, now
