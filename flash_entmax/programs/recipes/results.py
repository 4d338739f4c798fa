"""The file of a recipe's results: its conditions, and what came of each model."""

import json
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch

from flash_entmax import __version__

from ..errors import CommandError
from . import TRAINED, Options, module_of
from .workers import cores

PACKAGE = Path(__file__).parents[2]


def conditions(name: str, options: Options) -> dict:
    """``code`` stands for every line of the package: models of two versions are not mixed."""
    code = sha256(b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))
    return {
        "recipe": name,
        "size": options.size,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {cores()} cores",
        "text": str(options.text) if options.text else "default",
        "settings": asdict(module_of(name).SIZES[options.size]) if name in TRAINED else {},
        "flash_entmax": __version__,
        "code": code.hexdigest()[:16],
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def load(path: Path, own: dict) -> dict:
    """What an earlier start of the same recipe left, or a new beginning."""
    if not path.exists():
        if path.with_suffix("").exists():
            raise CommandError(f"{path.with_suffix('')} has models without their {path.name}: move it away")
        return {"conditions": own, "runs": {}, "measures": {}}
    try:
        results = json.loads(path.read_text())
        there = results["conditions"]
        own = json.loads(json.dumps(own))  # tuples become lists there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} cannot be read ({error}): move it away to start anew") from error
    for name, value in own.items():
        if name != "date" and there.get(name) != value:
            raise CommandError(
                f"{path} has results of {name} {there.get(name)!r}, and this is {value!r}: take another --out"
            )
    return results


def save(path: Path, results: dict) -> None:
    """First beside it, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)
