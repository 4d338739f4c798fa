"""`flash-entmax bench --inputs`: queries, keys and values out of a file."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_bench import CPU, bench, read

from flash_entmax import entmax_attention
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
    source |= {"copies": 1, "side_by_side": False}
    assert first["captured"] == source
    places = [(r["batch"], r["heads"], r["key_heads"], r["length"], r["head_size"]) for r in (first, last)]
    assert places == [(1, 4, 2, 100, 16), (2, 2, 2, 100, 16)]
    for result in content["results"]:
        assert 0 <= result["block_sparsity"] < 1
        assert 0 < result["key_density"] <= 1 - result["block_sparsity"] + 1e-9
        assert result["roofline"]["step_ms"] > 0
        for name in ("flash-entmax", "sdpa", "dense-entmax"):
            assert result["competitors"][name]["step_ms"] > 0
            assert set(result["competitors"][name]["errors"]) == set(gate.QUANTITIES)
    printed = capsys.readouterr().out
    assert "a toy model on zeros" in printed
    assert "layer10, 100 x 4/2 x 16, live tiles" in printed
    assert "wide, 2 x 100 x 2 x 16, live tiles" in printed
    densities = f"{1 - last['block_sparsity']:.2f}, keys reached {last['key_density']:.3f}"
    assert f"wide, 2 x 100 x 2 x 16, live tiles {densities}: " in printed
    assert "grouped heads: softmax takes them by enable_gqa" in printed


def test_captured_tensors_are_those_of_the_file(tmp_path):
    path = write_captured(tmp_path / "toy.safetensors", layer0=shapes_of(4, 2))
    settings = settings_for(**CPU, inputs=[Path(path)])
    stored = load_file(path)
    for role, tensor in zip(("query", "key", "value"), speed.inputs_of(settings.cases[0], settings), strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.requires_grad
        assert torch.equal(tensor, stored[f"layer0.{role}"].float())


def probabilities(query, key, value):
    """(batch, heads, length, length), by the reference in float64."""
    query, key = query.double(), key.double()
    value = torch.eye(key.shape[2], dtype=torch.float64).expand(*key.shape[:3], -1)
    return entmax_attention(query, key, value, is_causal=True, impl="reference")


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2)])
def test_copies_of_captured_heads(heads, key_heads, tmp_path):
    """Each head attends as before, as often as it was copied."""
    path = write_captured(tmp_path / "toy.safetensors", layer0=shapes_of(heads, key_heads))
    once, thrice = (settings_for(**CPU, inputs=[Path(path)], copies=copies) for copies in (None, 3))
    (case,) = thrice.cases
    assert (case.heads, case.key_heads, case.head_size) == (3 * heads, 3 * key_heads, 16)
    assert case.inputs == "layer0 x 3"
    assert str(case.captured).endswith("(3 copies of each head)")
    inputs = [tensor.detach() for tensor in speed.inputs_of(case, thrice)]
    assert all(tensor.is_contiguous() for tensor in inputs)
    one = probabilities(*(tensor.detach() for tensor in speed.inputs_of(once.cases[0], once)))
    expected = one.unflatten(1, (key_heads, -1)).repeat_interleave(3, 1).flatten(1, 2)
    torch.testing.assert_close(probabilities(*inputs), expected)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_two_captured_heads_side_by_side(heads, key_heads, tmp_path):
    """At the default scale a score of the pair is the mean of the two heads' scores, for each query head of a key."""
    path = write_captured(tmp_path / "toy.safetensors", layer0=shapes_of(heads, key_heads))
    single, paired = (settings_for(**CPU, inputs=[Path(path)], side_by_side=pairs) for pairs in (False, True))
    (case,) = paired.cases
    assert (case.heads, case.key_heads, case.head_size) == (heads // 2, key_heads // 2, 32)
    query, key, value = (tensor.detach() for tensor in speed.inputs_of(single.cases[0], single))
    group = heads // key_heads
    scores = 16**-0.5 * query @ key.repeat_interleave(group, 1).mT
    first, second = scores.unflatten(1, (-1, 2, group)).unbind(2)
    query, key, joined = (tensor.detach() for tensor in speed.inputs_of(case, paired))
    pairs = 32**-0.5 * query @ key.repeat_interleave(group, 1).mT
    torch.testing.assert_close(pairs, ((first + second) / 2).flatten(1, 2))
    assert torch.equal(joined, torch.cat((value[:, ::2], value[:, 1::2]), -1))


def test_a_head_beside_itself_keeps_its_support(tmp_path):
    path = write_captured(tmp_path / "toy.safetensors", layer0=shapes_of(6, 3))
    once, twice = (
        settings_for(**CPU, inputs=[Path(path)], copies=copies, side_by_side=copies > 1) for copies in (1, 2)
    )
    one, two = (probabilities(*(t.detach() for t in speed.inputs_of(s.cases[0], s))) for s in (once, twice))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_a_run_on_copies_side_by_side(tmp_path, capsys):
    path = write_captured(tmp_path / "toy.safetensors", "a toy model", layer0=shapes_of(3, 1))
    out = tmp_path / "out"
    options = "--copies", "2", "--side-by-side", "--out", str(out), "--only", "flash-entmax", "sdpa"
    assert bench("--inputs", path, *options) == 0
    (result,) = read(out / "speed.json")["results"]
    assert (result["heads"], result["key_heads"], result["head_size"]) == (3, 1, 32)
    assert result["competitors"]["flash-entmax"]["step_ms"] > 0
    printed = capsys.readouterr().out
    assert "a toy model (2 copies of each head) (two heads side by side" in printed
    assert "layer0 x 2 side by side" in printed


@pytest.mark.parametrize(
    ("shapes", "got"), [(shapes_of(3, 3), "3 of 16"), (shapes_of(2, 2, length=4, dim=300), "2 of")]
)
def test_heads_that_do_not_go_side_by_side(shapes, got, tmp_path):
    path = write_captured(tmp_path / "toy.safetensors", x=shapes)
    with pytest.raises(CommandError, match=f"--side-by-side needs an even number of key heads.*got {got}"):
        settings_for(**CPU, inputs=[Path(path)], side_by_side=True)


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
    with pytest.raises(CommandError, match=r"needs safetensors: pip install '\.\[bench\]', from a clone"):
        settings_for(**CPU, inputs=[torn])
