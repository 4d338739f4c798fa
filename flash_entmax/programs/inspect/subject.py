"""What is looked at: a model, and a text as it reads it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from .settings import InspectSettings

NO_INTERFACE = "this model does not use Transformers' attention interface, so there is nothing to inspect"


class Subject(ABC):
    """A model that can run with entmax attention, and with softmax.

    Attributes:
        model: whose calls are recorded.
        ids: (1, length), the text.
        tokens: what each of them stands for.
        origin: of the alpha that it runs with, in words.
        unit: what the model reads, "token" or "byte".
        vocabulary: how many of them there are.
        why_no_loss: in words; empty where the model predicts the next token.
        read, read_briefly: which part of the text that is, in words.
        layers: how many the model has, where that is known before it runs; else 0.
        softmax_layers: the numbers of those with alpha 1, whose calls are not recorded.
    """

    unit = "token"
    why_no_loss = ""
    layers = 0
    softmax_layers: frozenset[int] = frozenset()

    def __init__(
        self, settings: InspectSettings, model: nn.Module, ids: Tensor, tokens: list[str], origin: str
    ) -> None:
        self.model, self.ids, self.tokens, self.origin = model, ids, tokens, origin
        count = f"{len(tokens):,} {self.unit if len(tokens) == 1 else f'{self.unit}s'}"
        start = f" from {self.unit} {settings.offset:,} on" if settings.offset else ""
        self.read = f"{count} of {settings.text}{start}" if start else f"the first {count} of {settings.text}"
        self.read_briefly = f"{count} of {settings.text.name}{start}"
        if len(tokens) == 1:
            self.why_no_loss = f"there is no next {self.unit} after a single one"

    @property
    @abstractmethod
    def vocabulary(self) -> int: ...

    @abstractmethod
    def run(self) -> None:
        """Read the text, and predict nothing."""

    @abstractmethod
    def logits(self, first: int, stop: int) -> Tensor:
        """(stop - first, vocabulary): read the text, and predict what follows each of these tokens."""

    def in_words(self, error: Exception) -> str:
        """What went wrong while the model ran, for the person who typed the command."""
        return str(error)

    @abstractmethod
    def take_softmax(self, implementation: str) -> None:
        """Run with softmax from here on: PyTorch's "sdpa", or "eager". ValueError where the model does not have it."""
