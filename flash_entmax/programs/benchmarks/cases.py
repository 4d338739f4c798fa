"""One case of the benchmark: the shape of a call, and where its inputs come from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Captured:
    """Where the inputs of a case are stored, and how its heads come from them.

    Attributes:
        source: which model they were captured from.
        copies: how often each head comes.
        side_by_side: two heads next to each other are one head of twice the size.
    """

    file: str
    name: str
    label: str
    source: str
    copies: int = 1
    side_by_side: bool = False

    def __str__(self) -> str:
        place = f"{self.file}: {self.source}" if self.source else self.file
        copied = f" ({self.copies} copies of each head)" if self.copies > 1 else ""
        joined = " (two heads side by side, their queries times 2^-1/2, so that a score is the mean of two)"
        return place + copied + (joined if self.side_by_side else "")


@dataclass(frozen=True)
class BenchCase:
    """One causal call, on captured inputs or on topics.

    With topics the block sparsity is about 1 - 1 / topics (testing.topic_inputs).
    """

    length: int
    head_size: int
    heads: int
    key_heads: int
    topics: int | None = None
    wide_blocks: bool = False
    batch: int = 1
    captured: Captured | None = None

    @property
    def inputs(self) -> str:
        return self.captured.label if self.captured else f"{self.topics} topics"

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.key_heads

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(batch, length, head size, heads, key heads). Cases of one shape share what competitors compile."""
        return self.batch, self.length, self.head_size, self.heads, self.key_heads

    @property
    def heads_by_size(self) -> str:
        heads = str(self.heads) if self.group == 1 else f"{self.heads}/{self.key_heads}"
        return f"{heads} x {self.head_size}"

    def __str__(self) -> str:
        wide = ", wide blocks" if self.wide_blocks else ""
        return f"{self.length:,} tokens, heads {self.heads_by_size}, {self.inputs}{wide}"
