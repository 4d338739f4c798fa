"""A held-out text goes on as the model goes on, byte by byte; then what each byte took to read.

The keys and values of all layers stay in caches. A query reads the key of every byte before it, and the values of those
bytes only to which it attends.
"""

import codecs
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flash_entmax import inspection

from .model import Transformer
from .settings import DemoSettings
from .train import precision

MOST_BYTES = 400
SHOWN_LINES = 8  # of the beginning
TEMPERATURE = 0.7  # of the softmax over the next bytes; lower is more certain


@dataclass(frozen=True)
class Continuation:
    """The bytes of the beginning and those that the model made, and the seconds of all steps of one byte."""

    beginning: bytes
    made: bytes
    seconds: float

    @property
    def steps(self) -> int:
        """The last byte is not read, and the first comes out of the beginning."""
        return len(self.made) - 1


@dataclass(frozen=True)
class Reads:
    """What all steps of one byte read, in bytes of memory, and the mean number of keys that a query attends to."""

    keys: int
    values: int
    values_visible: int
    keys_per_query: float
    visible_per_query: float


def continue_text(console: Console, model: Transformer, settings: DemoSettings, validation: Tensor) -> None:
    """Print a beginning, what the model makes of it as it is made, and what was read."""
    beginning = held_out_beginning(validation, settings.context // 2)
    console.print("\nA text that the training did not see, and how the model goes on:", style="bold")
    shown = b"\n".join(beginning.split(b"\n")[-SHOWN_LINES:])
    stream = TextStream(console, "dim")
    for byte in shown:
        stream.show(byte)
    stream.close()
    stream = TextStream(console, "bold cyan")
    count = min(MOST_BYTES, settings.context - len(beginning))
    continuation = generate(model, settings, beginning, count, stream.show)
    stream.close()
    print_reads(console, continuation, reads_of(model, settings, continuation))


def held_out_beginning(validation: Tensor, length: int) -> bytes:
    """`length` bytes that end with a line, from the middle of the validation text."""
    text = validation.numpy().tobytes()
    middle = max(len(text) // 2, length)
    end = text.find(b"\n", middle) + 1 or middle
    return text[end - length : end]


@torch.no_grad()
def generate(model: Transformer, settings: DemoSettings, beginning: bytes, count: int, show=None) -> Continuation:
    """`count` bytes behind a beginning, drawn by the seed of the settings. `show` gets each of them at once."""
    draw = torch.Generator().manual_seed(settings.seed)
    data, made, start = torch.tensor([list(beginning)], device=settings.device), [], 0.0
    with precision(settings.device):
        caches = model.new_caches(1, len(beginning) + count)
        for step in range(count):
            if step == 1:
                start = time.perf_counter()
            logits = model(data, caches=caches)[0, -1].float().cpu()
            made.append(int(torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=draw)))
            data = torch.tensor([made[-1:]], device=settings.device)
            if show is not None:
                show(made[-1])
    return Continuation(beginning, bytes(made), time.perf_counter() - start if count > 1 else 0.0)


@torch.no_grad()
def reads_of(model: Transformer, settings: DemoSettings, continuation: Continuation) -> Reads:
    """What the steps read, by the supports of the same queries in one pass over the whole text."""
    text = continuation.beginning + continuation.made[:-1]
    data = torch.tensor([list(text)], device=settings.device)
    with precision(settings.device), inspection.record(model) as calls:
        model(data)
    keys = values = values_visible = support = rows = 0
    for call in calls:
        problem, item = call.problem, call.dtype.itemsize
        size = call.support.size[..., len(continuation.beginning) :]
        visible = sum(range(len(continuation.beginning) + 1, len(text) + 1))
        keys += visible * problem.key_heads * problem.head_size * item
        values += int(size.sum()) * problem.value_size * item
        values_visible += visible * problem.heads * problem.value_size * item
        support, rows = support + int(size.sum()), rows + size.numel()
    mean = (len(continuation.beginning) + 1 + len(text)) / 2
    return Reads(keys, values, values_visible, support / max(rows, 1), mean)


def print_reads(console: Console, continuation: Continuation, reads: Reads) -> None:
    table = Table.grid(padding=(0, 2))
    speed = continuation.steps / continuation.seconds if continuation.seconds else 0.0
    table.add_row("bytes made a second", f"{speed:,.0f}", style="bold")
    table.add_row("keys attended to by a query", f"{reads.keys_per_query:.1f} of {reads.visible_per_query:,.0f}")
    table.add_row("keys read", f"{reads.keys / 1e6:,.2f} MB, all that are visible")
    share = 100 * reads.values / max(reads.values_visible, 1)
    table.add_row(
        "values attended to", f"{reads.values / 1e6:,.2f} MB of {reads.values_visible / 1e6:,.2f} MB ({share:.1f} %)"
    )
    console.print()
    console.print(table)


class TextStream:
    """Shows bytes as text: each character at once on a terminal, whole lines elsewhere."""

    def __init__(self, console: Console, style: str) -> None:
        self.console, self.style, self.waiting = console, style, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self, byte: int) -> None:
        for letter in self.decoder.decode(bytes([byte])):
            self.waiting += letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        if self.console.is_terminal or self.waiting.endswith("\n"):
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.console.print(self.waiting, style=self.style, end="", markup=False, emoji=False, soft_wrap=True)
            self.waiting = ""

    def close(self) -> None:
        self.waiting += self.decoder.decode(b"", final=True)
        self.flush()
