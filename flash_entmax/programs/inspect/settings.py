"""What the command line said after `flash-entmax inspect`, and its checks before any heavy work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.call import NUMBER_ALPHAS
from ...show import page
from ..errors import CommandError, device_for, make_folder, require

MOST_BYTES = 2**22
ATTENTION = {"entmax15": 1.5, "sparsemax": 2.0, "entmax": None}


@dataclass(frozen=True)
class InspectSettings:
    """``attention`` and ``alpha`` None: those that the model was trained with; entmax15 for a softmax model.

    ``layers`` and ``heads`` are words as typed, such as "3-5" and "23:8". Without any, all layers and one typical head.
    """

    model: str
    text: Path
    out: Path
    attention: str | None = None
    alpha: float | None = None
    tokens: int = 1024
    offset: int = 0
    layers: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    device: str = "auto"


def check(settings: InspectSettings) -> None:
    """Refuse what no model could do, and make the folder of the results."""
    require("plot", "matplotlib")
    if not 1 <= settings.tokens <= page.MOST_TOKENS:
        raise CommandError(f"--tokens must be from 1 to {page.MOST_TOKENS}, got {settings.tokens}")
    if settings.offset < 0:
        raise CommandError(f"--offset must be at least 0, got {settings.offset}")
    lowest, highest = NUMBER_ALPHAS
    if settings.alpha is not None and not lowest <= settings.alpha <= highest:
        raise CommandError(
            f"--alpha must be from {lowest} (1 is softmax, nothing sparse to see) to {highest:g}, got {settings.alpha}"
        )
    if settings.alpha is not None and settings.attention not in (None, "entmax"):
        raise CommandError(f"--attention {settings.attention} has its own alpha: leave --alpha away, or take entmax")
    device_for(settings.device)
    check_against(settings, None, None)
    make_folder(settings.out)


def check_against(settings: InspectSettings, layers: int | None, heads: int | None) -> None:
    """Refuse layers and heads that the model does not have. A number that is not known yet is None."""
    numbers_of(settings.layers, layers)
    for layer, head in heads_of(settings):
        if layers is not None and layer is not None and layer >= layers:
            raise CommandError(f"--head {layer}:{head}: the model has the layers 0 to {layers - 1}")
        if heads is not None and head >= heads:
            raise CommandError(f"--head {head}: the model has the heads 0 to {heads - 1}")
        if layer is not None and settings.layers and layer not in numbers_of(settings.layers, layers):
            raise CommandError(f"--head {layer}:{head}: --layers {' '.join(settings.layers)} leaves layer {layer} out")


def numbers_of(layers: Sequence[str], count: int | None) -> set[int]:
    """Numbers and ranges such as 3-5, as a set; all ``count`` layers if none is given. A count may be unknown: None."""
    numbers: set[int] = set()
    for part in layers:
        first, _, last = part.partition("-")
        if not (is_number(first) and (is_number(last) or part == first)):
            raise CommandError(f"--layers takes numbers and ranges, such as 0 3-5, got {part!r}")
        if count is not None and int(last or first) >= count:
            raise CommandError(f"--layers {part}: the model has the layers 0 to {count - 1}")
        if int(first) > int(last or first):
            raise CommandError(f"--layers {part}: no layer is in there")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers or set(range(count or 0))


def heads_of(settings: InspectSettings) -> list[tuple[int | None, int]]:
    """(layer, head) for every --head; the layer is None if only a head was named."""
    found = []
    for part in settings.heads:
        layer, colon, head = part.rpartition(":")
        if not (is_number(head) and (is_number(layer) or not colon)):
            raise CommandError(f"--head takes a head, such as 8, or layer and head, such as 23:8, got {part!r}")
        found.append((int(layer) if colon else None, int(head)))
    return found


def is_number(text: str) -> bool:
    """Whether the text has one to nine digits, 0 to 9, and nothing else."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def read_text(path: Path) -> bytes:
    """The first MOST_BYTES of the file."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES)
    except OSError as error:
        raise CommandError(f"--text {path}: {error.strerror}") from error
    if not text.strip():
        raise CommandError(f"--text {path}: no text to read")
    return text


def check_offset(settings: InspectSettings, count: int, unit: str, text: bytes) -> None:
    """Refuse an offset past the text, which has ``count`` tokens or bytes."""
    if settings.offset >= count:
        part = f"the first {MOST_BYTES:,} bytes of {settings.text}" if len(text) == MOST_BYTES else f"{settings.text}"
        raise CommandError(f"--offset {settings.offset}: there are {count:,} {unit}s in {part}")
