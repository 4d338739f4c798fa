"""Prose and code as tokens, to train on and held out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_entmax.programs.demo.text import HOLD_OUT

from ...errors import CommandError
from ..documents import english_documents, python_sources
from ..settings import RecipeSettings
from .settings import AdaptSize

AT_ONCE = 256  # texts that are tokenized at a time


@dataclass(frozen=True)
class Text:
    """Tokens (length,) int32 to train on and held out; of what, in words."""

    training: Tensor
    held_out: Tensor
    found: str


def texts(settings: RecipeSettings, size: AdaptSize, tokenizer) -> dict[str, Text]:
    """ "prose": documents of --text, or English ones that are on the machine. "code": Python sources."""
    whose = f"documents of {settings.text}" if settings.text else "English documents of this machine"
    return {
        "prose": tokenized("prose", english_documents(size.characters, settings.text), whose, tokenizer, size),
        "code": tokenized("code", python_sources(size.characters), "Python sources", tokenizer, size),
    }


def tokenized(name: str, documents: list[str], whose: str, tokenizer, size: AdaptSize) -> Text:
    """Every tenth document is held out; of fewer than ten, the last tenth of each."""
    if len(documents) >= HOLD_OUT:
        held_out = documents[HOLD_OUT - 1 :: HOLD_OUT]
        training = [text for number, text in enumerate(documents) if number % HOLD_OUT != HOLD_OUT - 1]
    else:
        cuts = [len(text) - len(text) // HOLD_OUT for text in documents]
        training, held_out = ([text[part(cut)] for text, cut in zip(documents, cuts, strict=True)] for part in PARTS)
    ids = [joined(texts, tokenizer) for texts in (training, held_out)]
    longest = max(*size.lengths, size.prompt, size.passage)
    for part, tokens, fewest in (("training", ids[0], 2 * size.length), ("held out", ids[1], longest)):
        if len(tokens) < fewest:
            raise CommandError(
                f"too little {name}: {len(tokens):,} tokens {part} of {len(documents):,} {whose}, and {fewest:,} are "
                "needed (--text, --lengths)"
            )
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    counts = f"{len(ids[0]):,} tokens to train, {len(ids[1]):,} held out"
    return Text(*ids, f"{name}: {len(documents):,} {whose}, {megabytes:.1f} MB: {counts}")


PARTS = (lambda cut: slice(cut)), (lambda cut: slice(cut, None))


def joined(documents: list[str], tokenizer) -> Tensor:
    """One sequence of tokens (length,) int32, with the end token behind each document if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for first in range(0, len(documents), AT_ONCE):
        batch = tokenizer(documents[first : first + AT_ONCE], add_special_tokens=False, verbose=False)["input_ids"]
        parts += [torch.tensor([*ids, *end], dtype=torch.int32) for ids in batch]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)


def batch_of(texts: dict[str, Text], step: int, seed: int, size: AdaptSize, device: str) -> Tensor:
    """(batch, length) int64: random windows of the training text, half prose, half code; the same for every arm."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = [
        window(text.training, start, size.length)
        for text in texts.values()
        for start in torch.randint(len(text.training) - size.length + 1, (size.batch // 2,), generator=draw).tolist()
    ]
    return torch.stack(rows).to(device)


def held_out_windows(text: Text, size: AdaptSize, length: int, device: str) -> list[Tensor]:
    """Tensors (1, length) int64: the same held-out tokens at every length, evenly spaced in windows of the longest."""
    longest = max(size.lengths)
    count = max(1, min(size.held_out, len(text.held_out)) // longest)
    starts = torch.linspace(0, len(text.held_out) - longest, count, dtype=torch.float64).long().tolist()
    whole = torch.stack([window(text.held_out, start, longest) for start in starts])
    return list(whole.view(-1, 1, length).to(device))


def window(tokens: Tensor, start: int, length: int) -> Tensor:
    return tokens[start : start + length].long()
