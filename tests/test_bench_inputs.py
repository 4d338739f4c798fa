"""`flash-entmax bench --inputs`: queries, keys and values out of a file."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_bench import CPU, bench, read

from flash_entmax.programs.benchmarks import gate, speed
from flash_entmax.programs.benchmarks.settings import settings_for
from flash_entmax.programs.errors import CommandError

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file


def write_captured(path: Path, source: str = "", **shapes: tuple[tuple[int, ...], ...]) -> str:
    """A file of random queries, keys and values, with the shapes of those that it shall hold."""
    tensors = {
        f"{name}.{role}": torch.randn(shape).bfloat16()
        for name, given in shapes.items()
        for role, shape in zip(("query", "key", "value"), given, strict=False)
    }
    save_file(tensors, path, metadata={"source": source} if source else None)
    return str(path)


def shapes_of(heads: int, key_heads: int, *, batch: int = 1, length: int = 100, dim: int = 16):
    return (batch, heads, length, dim), *[(batch, key_heads, length, dim)] * 2


def test_captured_inputs(tmp_path, capsys):
    """Every name of the file is a case, in the order of their numbers, and none of the grid's is."""
    path = write_captured(
        tmp_path / "toy.safetensors",
        "a toy model on zeros",
        layer10=shapes_of(4, 2),
        layer2=shapes_of(4, 2),
        wide=shapes_of(2, 2, batch=2),
    )
    out = tmp_path / "out"
    assert bench("--inputs", path, "--out", str(out), "--only", "flash-entmax", "sdpa", "dense-entmax") == 0
    assert {file.name for file in out.iterdir()} == {"speed.json", "speed.png"}
    content = read(out / "speed.json")
    assert content["conditions"]["inputs"] == f"{path}: a toy model on zeros"
    assert [result["inputs"] for result in content["results"]] == ["layer2", "layer10", "wide"]
    first, _, last = content["results"]
    source = {"file": path, "name": "layer2", "label": "layer2", "source": "a toy model on zeros"}
    assert first["captured"] == source
    places = [(r["batch"], r["heads"], r["key_heads"], r["length"], r["head_size"]) for r in (first, last)]
    assert places == [(1, 4, 2, 100, 16), (2, 2, 2, 100, 16)]
    for result in content["results"]:
        assert 0 <= result["block_sparsity"] < 1
        assert result["roofline"]["step_ms"] > 0
        for name in ("flash-entmax", "sdpa", "dense-entmax"):
            assert result["competitors"][name]["step_ms"] > 0
            assert set(result["competitors"][name]["errors"]) == set(gate.QUANTITIES)
    printed = capsys.readouterr().out
    assert "a toy model on zeros" in printed
    assert "layer10, 100 x 4/2 x 16, block sparsity" in printed
    assert "wide, 2 x 100 x 2 x 16, block sparsity" in printed


def test_captured_tensors_are_those_of_the_file(tmp_path):
    path = write_captured(tmp_path / "toy.safetensors", layer0=shapes_of(4, 2))
    settings = settings_for(**CPU, inputs=[Path(path)])
    stored = load_file(path)
    for role, tensor in zip(("query", "key", "value"), speed.inputs_of(settings.cases[0], settings), strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.requires_grad
        assert torch.equal(tensor, stored[f"layer0.{role}"].float())


def test_captured_beside_topics(tmp_path, capsys):
    """Several files name their cases by file; a flag of the grid brings its cases back."""
    files = [write_captured(tmp_path / f"{name}.safetensors", layer0=shapes_of(2, 2)) for name in "ab"]
    out = tmp_path / "out"
    arguments = "--topics", "1", "4", "--parts", "speed", "--only", "sdpa", "--out", str(out)
    assert bench("--inputs", *files, *arguments) == 0
    content = read(out / "speed.json")
    assert [result["inputs"] for result in content["results"]] == ["1 topics", "4 topics", "a: layer0", "b: layer0"]
    assert content["conditions"]["inputs"] == "; ".join(["testing.topic_inputs, seed 0", *files])
    assert (out / "speed.png").exists()
    printed = capsys.readouterr().out
    assert "a: layer0 " in printed
    assert "4 topics " in printed


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"x": ()}, "has no tensors NAME.query, NAME.key and NAME.value"),
        ({"x": shapes_of(4, 2)[:2], "y": shapes_of(4, 2)}, "has no x.value"),
        ({"x": [(4, 100, 16)] * 3}, "x: query must be (batch, heads, length, dim)"),
        ({"x": [(1, 4, 100, 16), (1, 4, 90, 16), (1, 4, 90, 16)]}, "got (1, 4, 100, 16), (1, 4, 90, 16) and (1, 4, 90"),
        ({"x": [(1, 4, 100, 16), (1, 4, 100, 16), (1, 4, 100, 8)]}, "(1, 4, 100, 16) and (1, 4, 100, 8)"),
        ({"x": shapes_of(4, 2, length=0)}, "got (1, 4, 0, 16)"),
        ({"x": shapes_of(4, 3)}, "x: the heads of key must divide those of query, got 3 and 4"),
        ({"x": shapes_of(1, 1, length=4, dim=600)}, "x: dim must be at most 512, got 600"),
    ],
)
def test_captured_inputs_that_do_not_fit(shapes, said, tmp_path, capsys):
    path = write_captured(tmp_path / "toy.safetensors", **shapes)
    out = tmp_path / "out"
    assert bench("--inputs", path, "--out", str(out)) == 1
    error = capsys.readouterr().err
    assert path in error
    assert said in error
    assert not out.exists()


def test_captured_integers_are_refused(tmp_path):
    path = tmp_path / "toy.safetensors"
    tensors = {f"x.{role}": torch.zeros(1, 2, 4, 8, dtype=torch.int64) for role in ("query", "key", "value")}
    save_file(tensors, path)
    with pytest.raises(CommandError, match=r"x must have float dtypes, got I64"):
        settings_for(**CPU, inputs=[path])


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    torn = tmp_path / "torn.safetensors"
    torn.write_text("hello")
    for path in (tmp_path / "missing.safetensors", torn):
        with pytest.raises(CommandError, match=re.escape(f"--inputs {path}: ")):
            settings_for(**CPU, inputs=[path])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CommandError, match=r"needs safetensors: pip install 'flash-entmax\[bench\]'"):
        settings_for(**CPU, inputs=[torn])
