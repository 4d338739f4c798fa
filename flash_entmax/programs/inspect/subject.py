"""What is inspected: a model, and a text as the model reads it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from .settings import InspectSettings

NO_INTERFACE = "this model does not use Transformers' attention interface, so there is nothing to inspect"
NO_ATTENTION = "this model has no attention, and none of its layers is a state-space layer that can be shown"


class Subject(ABC):
    """A model that can run with entmax attention, and with softmax.

    Attributes:
        model: the module whose calls are recorded.
        ids: (1, length) int64, the text.
        tokens: the piece of text of each id.
        origin: in words, where the alpha of the model comes from.
        unit: what the model reads, "token" or "byte".
        vocabulary: how many different tokens or bytes there are.
        why_no_loss: in words; empty if the model predicts the next token.
        read, read_briefly: in words, which part of the text the model reads.
        layers: how many layers the model has; 0 if that is not known before it runs.
        softmax_layers: the numbers of the layers with alpha 1, whose calls are not recorded.
        has_attention: False for a model of state-space layers alone.
    """

    unit = "token"
    why_no_loss = ""
    layers = 0
    softmax_layers: frozenset[int] = frozenset()
    has_attention = True

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
    def vocabulary(self) -> int:
        """How many different tokens or bytes there are."""

    @abstractmethod
    def run(self) -> None:
        """Read the text without predicting anything."""

    @abstractmethod
    def logits(self, first: int, stop: int) -> Tensor:
        """Read the text, and predict what follows tokens first to stop - 1: (stop - first, vocabulary)."""

    def in_words(self, error: Exception) -> str:
        """What went wrong while the model ran, for the person who typed the command."""
        return str(error)

    @abstractmethod
    def take_softmax(self, implementation: str) -> None:
        """Use softmax from here on, by PyTorch's "sdpa" or by "eager". ValueError if the model does not have it."""
