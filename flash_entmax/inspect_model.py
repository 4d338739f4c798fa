"""What `flash-entmax inspect` does: run a model on a text, and show what its attention looks at.

Needs matplotlib, and, for a model that is not the demo's, transformers: pip install "flash-entmax[plot,transformers]".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import inspection, page, plot
from .command import CommandError, device_for, require
from .inspection import Call

MOST_BYTES = 2**22
ATTENTION = {"entmax15": 1.5, "sparsemax": 2.0, "entmax": None}


@dataclass(frozen=True)
class Wanted:
    """What was typed. `attention` and `alpha` are None for what the model was trained with, or else entmax15."""

    model: str
    text: Path
    out: Path
    attention: str | None = None
    alpha: float | None = None
    tokens: int = 1024
    layers: tuple[str, ...] = ()
    device: str = "auto"


@dataclass(frozen=True)
class Subject:
    """A model, a text as token ids (1, length) with what each token stands for, and the attention in words."""

    model: nn.Module
    ids: Tensor
    tokens: list[str]
    attention: str


def run(wanted: Wanted) -> None:
    """Print a table, write the pictures and the page. Raises a CommandError."""
    check(wanted)
    subject = open_demo(wanted) if demo_checkpoint(wanted.model) else open_transformers(wanted)
    length = len(subject.tokens)
    with torch.no_grad(), inspection.record(subject.model) as calls:
        subject.model(subject.ids)
    if not calls:
        raise CommandError(f"{wanted.model} made no call of entmax attention (alpha 1 is softmax, and is not recorded)")
    chosen = [call for call in calls if call.number in numbers_of(wanted.layers, len(calls))]
    print(f"{wanted.model}: {subject.attention}; the first {length:,} tokens of {wanted.text}\n")
    for line in table(chosen):
        print(line)
    name = f"{Path(wanted.model).name}, {length:,} tokens of {wanted.text.name}"
    try:
        paths = write(chosen, subject, wanted.out, name)
    except OSError as error:
        raise CommandError(f"--out {wanted.out}: {error.strerror}") from error
    print("\npictures:", *paths[:-1], f"\npage, to be opened in a browser: {paths[-1]}")


def check(wanted: Wanted) -> None:
    """Refuse before any work, rather than after the model has run."""
    require("plot", "matplotlib")
    if not 1 <= wanted.tokens <= page.MOST_TOKENS:
        raise CommandError(f"--tokens must be from 1 to {page.MOST_TOKENS}, got {wanted.tokens}")
    if wanted.alpha is not None and not 1.0 < wanted.alpha <= 2.0:
        raise CommandError(
            f"--alpha must be above 1 (softmax, nothing sparse to see) and at most 2, got {wanted.alpha}"
        )
    if wanted.alpha is not None and wanted.attention not in (None, "entmax"):
        raise CommandError(f"--attention {wanted.attention} has its own alpha: leave --alpha away, or take entmax")
    device_for(wanted.device)
    numbers_of(wanted.layers, None)


def numbers_of(layers: Sequence[str], count: int | None) -> set[int]:
    """Numbers and ranges such as 3-5 as a set; all `count` layers where none is given. No count: no upper end."""
    numbers: set[int] = set()
    for part in layers:
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or part == first)):
            raise CommandError(f"--layers takes numbers and ranges, such as 0 3-5, got {part!r}")
        if count is not None and int(last or first) >= count:
            raise CommandError(f"--layers {part}: the model has the layers 0 to {count - 1}")
        numbers.update(range(int(first), int(last or first) + 1))
    if layers and not numbers:
        raise CommandError(f"--layers {' '.join(layers)}: no layer is in there")
    return numbers or set(range(count or 0))


def read_text(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES)
    except OSError as error:
        raise CommandError(f"--text {path}: {error.strerror}") from error
    if not text.strip():
        raise CommandError(f"--text {path}: no text to read")
    return text


# Models


def demo_checkpoint(model: str) -> Path | None:
    """The file that the demo wrote, where `model` is it or its folder."""
    path = Path(model)
    if path.suffix == ".pt":
        return path
    inside = path / "model.pt"
    return inside if inside.is_file() and not (path / "config.json").exists() else None


def open_demo(wanted: Wanted) -> Subject:
    from .demo import checkpoint

    model, settings = checkpoint.load(demo_checkpoint(wanted.model), wanted.device)
    alpha = wanted.alpha or (ATTENTION[wanted.attention] if wanted.attention else None) or settings.alpha
    for block in model.blocks:
        block.attention.alpha = alpha
    text = read_text(wanted.text)[: min(wanted.tokens, settings.context)]
    trained = "as trained" if alpha == settings.alpha else f"trained with {settings.alpha:g}"
    ids = torch.tensor([list(text)], device=settings.device)
    return Subject(model, ids, [letter(byte) for byte in text], f"alpha {alpha:g}, {trained}")


def letter(byte: int) -> str:
    """A byte as a letter; in angles, by its number, where it is none by itself."""
    return chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else f"⟨{byte:02x}⟩"


def open_transformers(wanted: Wanted) -> Subject:
    path = Path(wanted.model)
    if path.exists() and not (path / "config.json").is_file():
        raise CommandError(f"{path} holds neither a model of Transformers (config.json) nor the demo's (model.pt)")
    if not path.exists() and wanted.model.startswith((".", "/", "~")):
        raise CommandError(f"{path}: no such folder")
    require("transformers", "transformers")
    text = read_text(wanted.text).decode("utf-8", "replace")
    try:
        model, tokenizer, alpha = load_transformers(wanted)
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(f"{wanted.model}: {error}") from error
    limit = min(wanted.tokens, getattr(model.config, "max_position_embeddings", None) or wanted.tokens)
    encoding = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=tokenizer.is_fast)
    ids = encoding["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    tokens = pieces(text, encoding["offset_mapping"], names) if tokenizer.is_fast else names
    if not tokens:
        raise CommandError(f"--text {wanted.text}: the tokenizer finds no token in it")
    ids = torch.tensor([ids], device=model.device)
    return Subject(model, ids, tokens, f"entmax attention, alpha {alpha:g}, in place of the model's own")


def load_transformers(wanted: Wanted) -> tuple[nn.Module, object, float]:
    """Model, tokenizer and alpha; the model without a head, which attends to nothing."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    from .integrations.transformers import register

    register()
    config = AutoConfig.from_pretrained(wanted.model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("a model of an encoder and a decoder: the page shows a text that attends to itself")
    attention = wanted.attention or ("entmax" if wanted.alpha or hasattr(config, "entmax_alpha") else "entmax15")
    if wanted.alpha is not None:
        config.entmax_alpha = wanted.alpha
    alpha = ATTENTION[attention] or getattr(config, "entmax_alpha", None)
    if alpha is None:
        raise ValueError("--attention entmax needs --alpha: the model's config has no entmax_alpha")
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the head's weights are not missed
    logging.disable_progress_bar()
    try:
        device = torch.device(device_for(wanted.device))
        dtype = "auto" if device.type == "cuda" else torch.float32
        model = AutoModel.from_pretrained(wanted.model, config=config, attn_implementation=attention, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(wanted.model)
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer, alpha


def pieces(text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]) -> list[str]:
    """The text between the end of one token and that of the next; the token's name where there is none.

    So spaces that a tokenizer drops stay, a character of several tokens shows once, and special tokens by their names.
    """
    found, end = [], 0
    for (_, stop), name in zip(offsets, names, strict=True):
        found.append(text[end:stop] if stop > end else name)
        end = max(end, stop)
    return found


# Results


def table(calls: Sequence[Call]) -> list[str]:
    """Lines: a title, then a row for each layer."""
    tile = calls[0].support.tile_shape[0]
    heads = "sparsest to densest head"
    rows = [("layer", "module", "keys per query", heads, "visible", f"empty {tile} x {tile} tiles")]
    for call in calls:
        size, empty = call.keys_per_query, f"{100 * call.block_sparsity.mean():.0f} %"
        numbers = f"{size.mean():.1f}", f"{size.min():.1f} to {size.max():.1f}", f"{call.visible_per_query:.1f}"
        rows.append((str(call.number), call.name, *numbers, empty))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = (str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
    return ["  ".join(place(*cell) for place, *cell in zip(aligned, row, widths, strict=True)) for row in rows]


def write(calls: Sequence[Call], subject: Subject, out: Path, name: str) -> list[Path]:
    """The pictures, then the page."""
    call, head = typical_head(calls)
    figures = {
        "support.png": plot.support_figure(calls, f"Support size: {name}"),
        "sparsity.png": plot.sparsity_figure(calls, f"Block sparsity: {name}"),
        f"map-{call.number}-{head}.png": plot.map_figure(call, f"Layer {call.number}, head {head}: {name}", head=head),
    }
    paths = [plot.save_figure(figure, out / file) for file, figure in figures.items()]
    try:
        web = page.save_page(out / "attention.html", subject.tokens, calls, title=name, note=subject.attention)
    except ValueError as error:
        raise CommandError(f"{error} (--layers, --tokens)") from error
    return [*paths, web]


def typical_head(calls: Sequence[Call]) -> tuple[Call, int]:
    """The head whose mean support size is the median of all."""
    sizes = [call.keys_per_query.tolist() for call in calls]
    heads = [(size, index, head) for index, row in enumerate(sizes) for head, size in enumerate(row)]
    _, index, head = sorted(heads)[len(heads) // 2]
    return calls[index], head
