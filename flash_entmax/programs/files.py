"""How results are written, so that an interruption leaves the old file or the new one."""

import json
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Write a second file and rename it. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
