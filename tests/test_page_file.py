"""The page as a file, without a browser: its data, its progress, and what it refuses."""

import base64
import os
import zlib

import pytest
import torch
from test_page import CODE, record

from flash_entmax import inspection
from flash_entmax.show import page


def test_the_data_is_exact_to_16_bits():
    """Decoded as the format says: the keys exactly, probabilities to 2e-5, and the smallest not 0."""
    query = torch.ones(1, 1, 3, 16)
    key = torch.linspace(-40, 0, 60).view(1, 1, 60, 1).expand(1, 1, 60, 16).contiguous()
    rows = inspection.attention_rows(
        query, key, alpha=1.02, scale=1 / 16, is_causal=True, query_positions=torch.tensor([-1, 59, 50])
    )
    content = zlib.decompress(base64.b64decode(page.encoded(rows)))
    numbers = torch.frombuffer(bytearray(content), dtype=torch.uint16).long()
    counts, steps, codes = numbers.split([3, rows.values().numel(), rows.values().numel()])
    assert torch.equal(counts, rows.crow_indices().diff())
    assert counts[0] == 0
    keys = torch.cat([part.cumsum(0) - 1 for part in steps.split(counts.tolist())])
    assert torch.equal(keys, rows.col_indices())
    assert ((codes.double() / page.CODES) ** 2 - rows.values()).abs().max() < CODE
    assert codes.min() == 1


def test_progress_goes_through_the_calls(tmp_path):
    calls, seen = record(20, 3, 1), []
    page.save_page(f"{tmp_path}/page.html", ["a"] * 20, calls, title="", progress=lambda given: map(count(seen), given))
    assert seen == calls


def count(seen: list):
    return lambda call: (seen.append(call), call)[1]


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    path, calls = tmp_path / "page.html", record(20, 1, 1)
    for tokens, given, message in (
        (["a"] * 19, calls, r"of 19 tokens to themselves, but 'call 0' has 20 queries and 20 keys"),
        ([], calls, "needs tokens and calls"),
        (["a"] * 20, [], "needs tokens and calls"),
        (["a"] * (page.MOST_TOKENS + 1), calls, "up to 8,192 tokens, got 8,193"),
    ):
        with pytest.raises(ValueError, match=message):
            page.save_page(path, tokens, given, title="")
    with pytest.raises(ValueError, match="batch must be from 0 to 0, got 1"):
        page.save_page(path, ["a"] * 20, calls, title="", batch=1)
    for start, message in (((1, 0), r"a layer of \[0\], got \(1, 0\)"), ((0, 1), r"a head from 0 to 0, got \(0, 1\)")):
        with pytest.raises(ValueError, match=message):
            page.save_page(path, ["a"] * 20, calls, title="", start=start)
    monkeypatch.setattr(page, "MOST_PROBABILITIES", 30)
    with pytest.raises(ValueError, match=r"up to 30 positive probabilities, and these 1 layers have \d+: choose fewer"):
        page.save_page(path, ["a"] * 20, calls, title="")
    assert not os.path.exists(path)


def test_tokens_are_strings(tmp_path):
    with pytest.raises(TypeError, match="tokens must be strings, the text of each one, got int 0"):
        page.save_page(tmp_path / "page.html", range(20), record(20, 1, 1), title="")
