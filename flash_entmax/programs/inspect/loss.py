"""The model's loss on the text, with the attention shown and with softmax."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy

from ... import inspection
from ...inspection import Recorded, RecordedCall
from ...integrations import state_space
from .progress import Progress
from .subject import Subject

MOST_LOGITS = 2**28  # that are held at a time: 1 GiB in float32
ROWS = 256  # how many tokens' losses are computed at a time


@torch.no_grad()
def read(subject: Subject, progress: Progress) -> tuple[list[Recorded], float | None]:
    """The recorded calls, and the mean loss of the next token in nats; None if the model does not predict it.

    Calls are those of attention and of state-space layers.
    """
    passes = losses(subject)

    def seen(name: str) -> bool:
        progress(f"reading the text: {name}")
        return True

    with inspection.record(subject.model, only=seen, layers=state_space.recorder()) as calls:
        first = next(passes)
    return calls, None if first is None else (first + sum(passes)) / (len(subject.tokens) - 1)


@torch.no_grad()
def softmax_loss(subject: Subject, progress: Progress) -> float | None:
    """The mean loss of the next token with softmax attention, which the subject then keeps; None without attention."""
    if subject.why_no_loss or not subject.has_attention:
        return None
    progress("reading the text once more, with softmax")
    for implementation in ("sdpa", "eager"):
        try:
            subject.take_softmax(implementation)
            with inspection.record(subject.model, keep_inputs=False) as calls:
                total = sum(losses(subject))
        except ValueError:
            if implementation == "eager":
                raise
            continue
        if calls:
            raise ValueError(f"{calls[0].name} cannot be switched to softmax")
        return total / (len(subject.tokens) - 1)
    return None


def losses(subject: Subject) -> Iterator[float | None]:
    """Read the text for some tokens after others, and yield the sum of their losses; None if there is no loss."""
    if subject.why_no_loss:
        subject.run()
        yield None
        return
    count = len(subject.tokens) - 1
    step = max(1, MOST_LOGITS // subject.vocabulary)
    for first in range(0, count, step):
        stop = min(first + step, count)
        logits, targets = subject.logits(first, stop), subject.ids[0, first + 1 : stop + 1]
        rows = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        yield sum(cross_entropy(part.float(), target, reduction="sum").item() for part, target in rows)


def loss_line(subject: Subject, alpha: str, loss: float | None, softmax: float | None) -> str:
    """What is printed: both losses; one, if no layer has entmax attention; or why there is none."""
    if loss is None:
        return f"no loss is shown: {subject.why_no_loss}"
    if softmax is None or not alpha:
        return f"loss in nats per {subject.unit}: {loss:.3f}"
    return f"loss in nats per {subject.unit}: {loss:.3f} with {alpha}, {softmax:.3f} with softmax"


def alpha_of(calls: Sequence[Recorded]) -> str:
    """The alpha of all calls of attention, or the smallest and the largest one, in words; empty without such calls."""
    alphas = [torch.as_tensor(call.alpha) for call in calls if isinstance(call, RecordedCall)]
    numbers = [number for alpha in alphas for number in alpha.flatten().tolist()]
    if not numbers:
        return ""
    low, high = (f"{number:.4g}" for number in (min(numbers), max(numbers)))
    return f"alpha {low}" if low == high else f"alpha {low} to {high}"
