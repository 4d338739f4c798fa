"""benchmarks/generation.py at its smallest sizes: every case is timed, and its supports are those asked for."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("triton")
pytest.importorskip("safetensors")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def generation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("generation", BENCHMARKS / "generation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "REPEATS", 3)
    return module


def test_every_case_is_timed(generation, tmp_path, capsys):
    rows = generation.main(["--smallest", "--caches", "128", "--out", str(tmp_path)])
    cases = [(row.cache, row.batch, row.attention) for row in rows]
    assert cases == [(128, batch, attention) for batch in (1, 2) for attention in ("entmax15", "sdpa")]
    for row in rows:
        assert row.called_ms > 0
        assert row.called_tokens == 1e3 * row.batch / row.called_ms
        if row.attention == "sdpa":
            assert row.support is None
        else:
            assert all(6 < size < 24 for size in row.support), "about the 12 keys that were asked for"
    content = json.loads((tmp_path / "generation.json").read_text())
    assert len(content["rows"]) == 4
    assert content["conditions"]["layers"] == 2
    table = (tmp_path / "generation.md").read_text().splitlines()[-6:]
    assert {line.count("|") for line in table} == {9}
    assert set(table[2:]) <= set(capsys.readouterr().out.splitlines())


def test_a_cache_must_have_room(generation, capsys):
    with pytest.raises(SystemExit):
        generation.main(["--smallest", "--caches", "40"])
    assert "--caches must be at least 64 tokens, got 40" in capsys.readouterr().err
