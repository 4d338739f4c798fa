"""The corpus: the Python sources of the installed PyTorch, or a file or folder of the user."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_entmax.show.plot import LINE_LENGTH

from ..errors import CommandError

LONG_FILE = 20_000  # bytes
MOST_BYTES = 2**26
FEWEST_CONTEXTS = 4
HOLD_OUT = 10  # one part in ten is for validation
WORD = rb"[A-Za-z]{4,}"
FEWEST_LINES = 4


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on, (length,) uint8 each, and where they come from."""

    training: Tensor
    validation: Tensor
    origin: str


def read_corpus(path: Path | None, context: int) -> Corpus:
    """Read the files of ``path``, or PyTorch's long sources, in the order of their names.

    Of ten files or more, every tenth is held out. Of fewer files, the last tenth of the text is held out. Both parts
    must hold FEWEST_CONTEXTS contexts.
    """
    if path is None:
        folder = Path(torch.__file__).parent
        files = [file for file in sorted(folder.rglob("*.py")) if file.stat().st_size >= LONG_FILE]
        name = f"the Python sources of PyTorch {torch.__version__}"
    else:
        files, name = files_of(path), str(path)
    texts = readable(files)
    if not any(texts):
        raise CommandError(f"--text {name}: no text to read (UTF-8 files that are not empty)")

    training, validation = split(texts)
    for part, data in (("training", training), ("validation", validation)):
        if len(data) < FEWEST_CONTEXTS * (context + 1):
            raise CommandError(
                f"{name} is too short: {len(data)} bytes are left for {part}, "
                f"and {FEWEST_CONTEXTS} contexts of {context} bytes are needed"
            )
    amount = f"the first {MOST_BYTES / 1e6:.0f} MB" if sum(map(len, texts)) == MOST_BYTES else f"{len(texts)} files"
    origin = f"{name}: {amount}, {len(training) / 1e6:.2f} MB to train, {len(validation) / 1e6:.2f} MB held out"
    return Corpus(as_tensor(training), as_tensor(validation), origin)


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files of a folder that are not hidden, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CommandError(f"--text {path}: no such file or folder")
    inside = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts))


def readable(files: list[Path]) -> list[bytes]:
    """The contents of the files that are UTF-8, up to MOST_BYTES in all."""
    texts, total = [], 0
    for file in files:
        try:
            with file.open("rb") as stream:
                text = stream.read(MOST_BYTES - total)
        except OSError as error:
            raise CommandError(f"cannot read {file}: {error.strerror}") from error
        if is_utf8(text):
            texts.append(text)
            total += len(text)
        if total == MOST_BYTES:
            break
    return texts


def is_utf8(text: bytes) -> bool:
    """True for UTF-8, even if its last character is cut off."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def split(texts: list[bytes]) -> tuple[bytes, bytes]:
    """The text to train on, and the text to validate on."""
    if len(texts) >= HOLD_OUT:
        validation = texts[HOLD_OUT - 1 :: HOLD_OUT]
        training = [text for index, text in enumerate(texts) if index % HOLD_OUT != HOLD_OUT - 1]
        return b"\n".join(training), b"\n".join(validation)
    whole = b"\n".join(texts)
    cut = len(whole) - len(whole) // HOLD_OUT
    return whole[:cut], whole[cut:]


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """data (bytes,) uint8 and starts (n,) -> (n, length) int64."""
    return data[starts.unsqueeze(-1) + torch.arange(length)].long()


def even_windows(data: Tensor, count: int, length: int) -> Tensor:
    """(n, length) int64: up to ``count`` windows that do not overlap, evenly spaced over all of the data."""
    count = min(count, len(data) // length)
    return windows(data, torch.linspace(0, len(data) - length, count, dtype=torch.float64).long(), length)


@dataclass(frozen=True)
class Passage:
    """A short passage, and the position of the byte whose attention is shown."""

    data: bytes
    position: int


def telling_passage(data: Tensor, length: int, most_candidates: int = 20_000) -> Passage:
    """The passage of a few lines in which most words repeat, so that earlier text says what comes next."""
    text = data.numpy().tobytes()
    starts = [0, *(match.end() for match in re.finditer(rb"\n(?=\S)", text))]
    starts = [start for start in starts if start + length <= len(text)]
    candidates = starts[:: -(-len(starts) // most_candidates)]
    best = max(candidates, key=lambda start: telling(text[start : start + length]))
    passage = text[best : best + length]
    return Passage(passage, byte_to_read(passage))


def telling(passage: bytes) -> tuple[bool, int]:
    """Whether the passage has a few lines that fit the page; then, how many letters its repeated words have."""
    counts = Counter(re.findall(WORD, passage))
    lines = [line for line in passage.split(b"\n") if line.strip()]
    fits = len(lines) >= FEWEST_LINES and max(map(len, lines)) < LINE_LENGTH
    return fits, sum(len(word) for word, count in counts.items() if count > 1)


def byte_to_read(passage: bytes) -> int:
    """The second byte of the last repeated word: the model can copy what follows from the earlier occurrence."""
    seen, position = set(), len(passage) - 1
    for match in re.finditer(WORD, passage):
        if match.group() in seen:
            position = match.start() + 1
        seen.add(match.group())
    return position
