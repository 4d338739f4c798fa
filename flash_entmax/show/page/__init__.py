"""One HTML file in which a person sees which tokens each token attends to. It needs no network and no other file."""

import base64
import html
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ...core.checks import typed
from ...inspection import Recorded

MOST_TOKENS = 8192
MOST_PROBABILITIES = 20_000_000
CODES = 65_535  # the page holds sqrt(p) in 16 bits, off by less than 2e-5 and never 0


def save_page(
    path: str | Path,
    tokens: Sequence[str],
    calls: Sequence[Recorded],
    *,
    title: str,
    note: str = "",
    batch: int = 0,
    start: tuple[int, int] | None = None,
    progress: Callable[[Sequence[Recorded]], Iterable[Recorded]] = iter,
) -> Path:
    """Write the page to ``path`` and return it; makes its folder.

    The page shows the text as tokens, beside a grid of support sizes by layer and head to choose from. It opens with
    the last token. Pointing at a token shades exactly the tokens that it attends to, and lists their probabilities. A
    click pins it, and the address then restores this state (``#layer=3&head=5&token=12``). Keyboard and touch work as
    well.

    Args:
        path: the file, which ends in .html.
        tokens: the piece of text of every token, in order, with any characters.
        calls: recorded self-attention of these tokens, or state-space layers, one call for each layer. What a row of a
            state-space layer leaves out is listed as "other".
        title: which model and text this is.
        note: a line under the title, with what else a reader should know.
        batch: the batch row of the calls that is shown.
        start: (number of the call, head) to open with if the address names none; the first by default.
        progress: passes the calls on while they are written, as ``tqdm.tqdm`` does.

    Raises:
        TypeError: a token that is no string, or calls that are no list.
        ValueError: a start that is not among the calls; tokens and calls that do not fit together; more than
            MOST_TOKENS tokens or MOST_PROBABILITIES positive probabilities (5 to 6 bytes each).
    """
    if not isinstance(calls, Iterable):
        raise TypeError(f"calls must be a list of recorded calls, got {typed(calls)}")
    tokens, calls = list(tokens), list(calls)
    check_calls(tokens, calls, batch)
    facts = {
        "tokens": tokens,
        "start": place_of(start, calls),
        "layers": [
            {
                "number": call.number,
                "name": call.name,
                "sizes": [round(size, 4) for size in call.keys_per_query.tolist()],
                "visible": [call.visibility(batch, head).sizes().tolist() for head in range(call.mask_heads)],
                "covered": call.covered,
                "other": others(call, batch),
            }
            for call in calls
        ],
    }
    data = [
        f'<script type="text/plain" id="attention-{layer}-{head}">{encoded(call.rows(batch, head))}</script>'
        for layer, call in enumerate(progress(calls))
        for head in range(call.problem.heads)
    ]
    parts = {
        "title": html.escape(title),
        "note": html.escape(note),
        "style": asset("style.css"),
        "script": asset("data.js") + asset("script.js"),
        "facts": inside_script(facts),
        "data": "\n".join(data),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("template.html")), encoding="utf-8")
    return path


def check_calls(tokens: list[str], calls: list[Recorded], batch: int) -> None:
    if not tokens or not calls:
        raise ValueError(f"the page needs tokens and calls, got {len(tokens)} and {len(calls)}")
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(f"tokens must be strings, the text of each one, got {typed(token)}")
    if len(tokens) > MOST_TOKENS:
        raise ValueError(f"the page holds up to {MOST_TOKENS:,} tokens, got {len(tokens):,}")
    for call in calls:
        problem = call.problem
        if (problem.query_length, problem.key_length) != (len(tokens), len(tokens)):
            raise ValueError(
                f"the page shows the attention of {len(tokens)} tokens to themselves, but {call.name!r} has "
                f"{problem.query_length} queries and {problem.key_length} keys"
            )
        if not 0 <= batch < problem.batch:
            raise ValueError(f"batch must be from 0 to {problem.batch - 1}, got {batch}")
    count = sum(int(call.size[batch].sum()) for call in calls)
    if count > MOST_PROBABILITIES:
        raise ValueError(
            f"the page holds up to {MOST_PROBABILITIES:,} positive probabilities, and these {len(calls)} layers have "
            f"{count:,}: choose fewer layers or tokens"
        )


def place_of(start: tuple[int, int] | None, calls: list[Recorded]) -> tuple[int, int]:
    """(index of the call, head)."""
    heads = {call.number: call.problem.heads for call in calls}
    number, head = (calls[0].number, 0) if start is None else start
    if number not in heads:
        raise ValueError(f"start must be (layer, head) with a layer of {list(heads)}, got {start}")
    if not 0 <= head < heads[number]:
        raise ValueError(f"start must be (layer, head) with a head from 0 to {heads[number] - 1}, got {start}")
    return list(heads).index(number), head


def others(call: Recorded, batch: int) -> list[list[float]] | None:
    """By head and token, what the entries of a row leave out of the sum 1; None for attention, which leaves out 0."""
    if call.covered == 1:
        return None
    heads = [call.rows(batch, head) for head in range(call.problem.heads)]
    sums = [torch.segment_reduce(rows.values().double(), "sum", offsets=rows.crow_indices()) for rows in heads]
    return [[round(max(0.0, 1 - total), 5) for total in row.tolist()] for row in sums]


def encoded(rows: Tensor) -> str:
    """A CSR matrix as base64 of compressed 16-bit numbers: the sizes of the rows, then the steps, then the codes.

    A step leads from the previous key of the row, at first from -1, to the next key. A code is sqrt(p) * CODES, at
    least 1.
    """
    sizes, key, p = rows.crow_indices().diff(), rows.col_indices(), rows.values()
    previous = torch.cat((key.new_full((1,), -1), key[:-1]))
    first = rows.crow_indices()[:-1][sizes > 0]
    previous[first] = -1
    codes = (p.double().sqrt() * CODES).round().clamp(1, CODES)
    numbers = torch.cat((sizes, key - previous, codes.long())).to("cpu", torch.int32)
    # The lower two bytes of every number, the low byte first, on any machine.
    content = torch.stack((numbers & 255, numbers >> 8), -1).to(torch.uint8).flatten()
    buffer = bytearray(content.numel())
    if buffer:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(content)
    return base64.b64encode(zlib.compress(bytes(buffer), 6)).decode()


def inside_script(facts: object) -> str:
    """JSON in which nothing can end the <script> element around it."""
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate is half a character, which UTF-8 cannot hold.
    text = text.encode("utf-8", "replace").decode()
    return re.sub("[<>&\u2028\u2029]", lambda match: escapes[match[0]], text)


def asset(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
