"""The prompts as a file, for models that are asked elsewhere."""

import json
from pathlib import Path

from ...errors import CommandError, make_folder
from .haystack import Haystack
from .settings import RulerSize
from .tasks import TASKS, generate


def write_prompts(path: Path, tokenizer, size: RulerSize, lengths: tuple[int, ...], haystack: Haystack) -> int:
    """Write one JSON object a line, and return how many there are.

    "task", "length" and "seed" are the arguments of ``generate``, "prompt" and "answers" what it returns. "room" is how
    many tokens the answer gets. A score is the share of the answers that occur in it, whatever their case.
    """
    places = [(task, length, seed) for length in lengths for task in size.tasks for seed in range(size.samples)]
    make_folder(path.parent, "--write")
    if path.is_dir():
        raise CommandError(f"--write {path}: is a folder")
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for task, length, seed in places:
            prompt, answers = generate(task, tokenizer, length, seed, haystack)
            row = {"task": task, "length": length, "seed": seed, "prompt": prompt, "answers": answers}
            file.write(json.dumps(row | {"room": TASKS[task].room}, ensure_ascii=False) + "\n")
    part.replace(path)
    return len(places)
