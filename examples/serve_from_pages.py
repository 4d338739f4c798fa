"""Serve requests of different lengths from one cache in pages, as servers of language models do.

python examples/serve_from_pages.py takes seconds on a CPU. The model is one layer of attention with random weights:
what it writes means nothing, but shows whether every key is where it should be. Each step is one call, in which chunks
of prompts stand beside single tokens of requests that are being answered. A request that is done gives its pages back,
and the next one takes them. At the end each answer is made again from keys in one piece, and must be the same.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_entmax import entmax_attention, entmax_attention_paged

HEADS, KEY_HEADS, DIM = 8, 2, 32
PAGE, PAGES = 16, 24  # keys of a page, pages of the cache
AT_A_TIME, CHUNK, ANSWER = 3, 32, 10  # requests; tokens of a prompt in a step; tokens of an answer
WORDS = 500
PROMPTS = 70, 5, 130, 33, 64  # tokens


class Model:
    """Embedding, one layer of attention, and the words again."""

    def __init__(self) -> None:
        width = HEADS * DIM
        self.words = torch.randn(WORDS, width)
        self.to_heads = torch.randn(width, (HEADS + 2 * KEY_HEADS) * DIM) * width**-0.5

    def heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of some tokens, (tokens, heads, dim)."""
        mixed = (self.words[tokens] @ self.to_heads).unflatten(-1, (-1, DIM))
        return mixed.split((HEADS, KEY_HEADS, KEY_HEADS), 1)

    def next_word(self, attended: Tensor) -> int:
        """The likeliest one behind a token, from its attention (heads, dim)."""
        return int((self.words @ attended.flatten()).argmax())


@dataclass
class Request:
    """Tokens of a prompt, and of what is answered so far; the first `cached` of them have their keys in the pages."""

    tokens: list[int]
    prompt: int
    cached: int = 0
    pages: list[int] = field(default_factory=list)

    def take(self) -> Tensor:
        """The tokens of the next step."""
        return torch.tensor(self.tokens[self.cached : self.cached + CHUNK])


class Cache:
    """Keys and values in pages, and the pages that nobody has."""

    def __init__(self) -> None:
        self.key, self.value = (torch.zeros(PAGES, PAGE, KEY_HEADS, DIM) for _ in range(2))
        self.free = list(range(PAGES))

    def append(self, request: Request, key: Tensor, value: Tensor) -> None:
        """Write behind the keys that the request has, into new pages where its own are full."""
        positions = torch.arange(request.cached, request.cached + len(key))
        while len(request.pages) * PAGE <= positions[-1]:
            request.pages.append(self.free.pop())
        page = torch.tensor(request.pages)[positions // PAGE]
        self.key[page, positions % PAGE], self.value[page, positions % PAGE] = key, value
        request.cached += len(key)

    def table(self, requests: list[Request]) -> Tensor:
        """The page numbers of each request; what is behind its pages is never read."""
        table = torch.zeros(len(requests), max(len(request.pages) for request in requests), dtype=torch.int32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.pages)] = torch.tensor(request.pages)
        return table


def step(model: Model, cache: Cache, requests: list[Request]) -> None:
    """Read a chunk of each prompt that is not read yet, and write a token behind the others, all in one call."""
    taken = [request.take() for request in requests]
    query, key, value = model.heads(torch.cat(taken))
    counts = [len(tokens) for tokens in taken]
    for request, own_key, own_value in zip(requests, key.split(counts), value.split(counts), strict=True):
        cache.append(request, own_key, own_value)
    boundaries = torch.tensor([0, *counts]).cumsum(0).int()
    lengths = torch.tensor([request.cached for request in requests], dtype=torch.int32)
    attended = entmax_attention_paged(
        query, cache.key, cache.value, cache.table(requests), lengths, cu_seq_q=boundaries, max_q=max(counts)
    )
    for request, last in zip(requests, boundaries[1:] - 1, strict=True):
        if request.cached == len(request.tokens):
            request.tokens.append(model.next_word(attended[last]))


def in_one_piece(model: Model, request: Request) -> list[int]:
    """The prompt and the answer, by the keys of all tokens in one tensor."""
    tokens = request.tokens[: request.prompt]
    while len(tokens) < len(request.tokens):
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in model.heads(torch.tensor(tokens)))
        tokens.append(model.next_word(entmax_attention(query[:, :, -1:], key, value)[0, :, 0]))
    return tokens


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, cache = Model(), Cache()
    waiting = [Request(torch.randint(WORDS, (length,)).tolist(), length) for length in PROMPTS]
    running: list[Request] = []
    done: list[Request] = []
    while waiting or running:
        running += [waiting.pop(0) for _ in range(min(len(waiting), AT_A_TIME - len(running)))]
        step(model, cache, running)
        for request in [each for each in running if len(each.tokens) == each.prompt + ANSWER]:
            running.remove(request)
            cache.free += request.pages
            done.append(request)
            print(f"prompt of {request.prompt:>3} tokens, {ANSWER} written, {len(request.pages)} pages given back")
    assert all(in_one_piece(model, request) == request.tokens for request in done)
    print(f"{len(done)} answers, each the same from keys in one piece; {len(cache.free)} of {PAGES} pages are free")


if __name__ == "__main__":
    main()
