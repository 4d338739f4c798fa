"""Queries, keys and values of a trained model, from safetensors files.

A file holds NAME.query, NAME.key and NAME.value, each (batch, heads, length, dim), for one or more NAMEs. Its metadata
may say as `source` where they come from. All shapes are checked before anything runs. The tensors of a case are read
when its turn comes. They may have several copies of each head, or two heads side by side as one of twice the size.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flash_entmax.core.call import MAX_HEAD_SIZE

from ..errors import CommandError, require
from .cases import BenchCase, Captured

ROLES = ("query", "key", "value")


def captured_cases(paths: Sequence[Path], copies: int = 1, side_by_side: bool = False) -> Iterator[BenchCase]:
    """In the order of the files, and within a file by name: layer2 comes before layer10."""
    paths = list(dict.fromkeys(paths))
    stems_differ = len({path.stem for path in paths}) == len(paths)
    suffix = (f" x {copies}" if copies > 1 else "") + (" side by side" if side_by_side else "")
    for path in paths:
        prefix = "" if len(paths) == 1 else f"{path.stem if stems_differ else path}: "
        with opened(path) as file:
            source = (file.metadata() or {}).get("source", "")
            for name in names_in(path, file.keys()):
                label = prefix + name + suffix
                yield case_of(file, Captured(str(path), name, label, source, copies, side_by_side))


@contextmanager
def opened(path: Path | str) -> Iterator:
    require("bench", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        if Path(path).exists():
            raise CommandError(f"--inputs {path}: is no safetensors file ({error})") from error
        raise CommandError(f"--inputs {path}: {error}") from error


def names_in(path: Path, tensors: Sequence[str]) -> list[str]:
    """The NAMEs of a file, from the names of its tensors. CommandError if one of NAME's three tensors is missing."""
    found = {name for name, _, role in (tensor.rpartition(".") for tensor in tensors) if name and role in ROLES}
    if not found:
        raise CommandError(f"--inputs {path}: has no tensors NAME.query, NAME.key and NAME.value")
    missing = [f"{name}.{role}" for name in sorted(found) for role in ROLES if f"{name}.{role}" not in tensors]
    if missing:
        raise CommandError(f"--inputs {path}: has no {', '.join(missing)}")
    return sorted(found, key=lambda name: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", name)])


def case_of(file, captured: Captured) -> BenchCase:
    """The case, from the shapes in the file. CommandError for tensors that do not fit together."""
    place = f"--inputs {captured.file}: {captured.name}"
    parts = [file.get_slice(f"{captured.name}.{role}") for role in ROLES]
    dtypes = [part.get_dtype() for part in parts]
    if not all(dtype.startswith(("F", "BF")) for dtype in dtypes):
        raise CommandError(f"{place} must have float dtypes, got {', '.join(dtypes)}")
    query, key, value = (tuple(part.get_shape()) for part in parts)
    fits = len(query) == len(key) == 4 and key == value and (query[0], *query[2:]) == (key[0], *key[2:])
    if not fits or 0 in query + key:
        raise CommandError(
            f"{place}: query must be (batch, heads, length, dim), key and value the same with their own number of "
            f"heads; got {query}, {key} and {value}"
        )
    batch, heads, length, head_size = query
    if heads % key[1]:
        raise CommandError(f"{place}: the heads of key must divide those of query, got {key[1]} and {heads}")
    if head_size > MAX_HEAD_SIZE:
        raise CommandError(f"{place}: dim must be at most {MAX_HEAD_SIZE}, got {head_size}")
    heads, key_heads = captured.copies * heads, captured.copies * key[1]
    if captured.side_by_side:
        if key_heads % 2 or 2 * head_size > MAX_HEAD_SIZE:
            raise CommandError(
                f"{place}: --side-by-side needs an even number of key heads, of dim at most {MAX_HEAD_SIZE // 2}; got "
                f"{key_heads} of {head_size} (--copies 2 puts each head beside itself)"
            )
        heads, key_heads, head_size = heads // 2, key_heads // 2, 2 * head_size
    return BenchCase(length, head_size, heads, key_heads, batch=batch, captured=captured)


def load(captured: Captured, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Query, key and value, each (batch, heads, length, dim), with the copies and pairs that the case asks for."""
    with opened(captured.file) as file:
        tensors = [file.get_tensor(f"{captured.name}.{role}").to(device, dtype) for role in ROLES]
    key_heads = tensors[1].shape[1]
    # (batch, key heads, query heads of each or 1, length, dim)
    query, key, value = (
        tensor.unflatten(1, (key_heads, -1)).repeat_interleave(captured.copies, 1) for tensor in tensors
    )
    if captured.side_by_side:
        query, key, value = (torch.cat((tensor[:, ::2], tensor[:, 1::2]), -1) for tensor in (query, key, value))
        query *= 2**-0.5  # the default scale of the new size is the old one times this: a score is the mean of two
    return tuple(tensor.flatten(1, 2) for tensor in (query, key, value))
