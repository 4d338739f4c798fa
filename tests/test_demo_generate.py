"""flash-entmax demo --generate: a held-out text goes on, and what was read is counted."""

import io
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from inspect_command import write_demo
from rich.console import Console

from flash_entmax.programs import cli
from flash_entmax.programs.demo import checkpoint, generate
from flash_entmax.programs.demo.model import Transformer

WORDS = "def keep(words):\n    return [word for word in words if word]\n\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(WORDS * 400)
    return path


def demo(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["demo", "--device", "cpu", "--generate", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_cache_changes_no_byte(tmp_path):
    """The logits of each step are those of one pass over the whole text."""
    torch.manual_seed(0)
    model, data = Transformer(2, 64, 2, alpha=1.7).eval(), torch.randint(256, (2, 40))
    for block in model.blocks:  # branches start at 0
        torch.nn.init.normal_(block.attention.out.weight, std=0.3)
    with torch.no_grad():
        caches, whole = model.new_caches(2, 40), model(data)
        steps = torch.cat([model(part, caches=caches) for part in data.split([30] + [1] * 10, 1)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
    assert (whole.std() > 0.05).item()


def test_command_trains_then_goes_on_without_training(text, tmp_path, capsys):
    """The second call finds the model, and makes the same text again."""
    out = tmp_path / "out"
    code, first, error = demo(capsys, "--smallest", "--steps", 12, "--text", text, "--out", out)
    assert code == 0, error
    assert "step    12 of 12" in first
    code, second, error = demo(capsys, "--text", text, "--out", out)
    assert code == 0, error
    assert "step" not in second
    assert f"the model is {out / 'model.safetensors'}, which was trained before" in second
    made = [re.search(r"goes on:\n(.*)\nbytes made", printed, re.DOTALL)[1] for printed in (first, second)]
    assert made[0] == made[1]
    assert WORDS.splitlines()[1] in made[0]
    for printed in (first, second):
        assert float(re.search(r"bytes made a second +([\d,]+)", printed)[1].replace(",", "")) > 0
        support, visible = re.search(r"by a query +([\d.]+) of (\d+)", printed).groups()
        assert 1 <= float(support) < float(visible) <= 256


def test_reads_are_counted(tmp_path):
    """Of a random model: all keys, and the values of the supports that a call returns."""
    folder, _ = write_demo(tmp_path)
    model, settings = checkpoint.load(folder / "model.safetensors", "cpu")
    made = generate.generate(model, settings, b"a beginning of some bytes", 6)
    assert made.steps == 5
    assert len(made.made) == 6
    reads = generate.reads_of(model, settings, made)
    rows = range(26, 31)  # keys that each step sees
    assert reads.keys == 4 * settings.layers * settings.width * sum(rows) == reads.values_visible
    assert reads.values == round(4 * settings.layers * settings.width * reads.keys_per_query * 5)
    assert reads.visible_per_query == sum(rows) / 5
    assert 1 <= reads.keys_per_query < 28


def test_text_is_shown_as_it_is_made():
    """Each character at once on a terminal, and only whole lines elsewhere; nothing that steers a terminal."""
    for is_terminal in (True, False):
        written = io.StringIO()
        console = Console(file=written, force_terminal=is_terminal, color_system=None, width=20)
        stream, seen = generate.TextStream(console, "bold"), []
        for byte in "[b]é\x1b\n".encode() + b"\xff" + b"x" * 30:
            stream.show(byte)
            seen.append(written.getvalue())
        stream.close()
        assert written.getvalue() == "[b]é\N{REPLACEMENT CHARACTER}\n\N{REPLACEMENT CHARACTER}" + "x" * 30
        assert seen[2] == ("[b]" if is_terminal else "")
        assert seen[6].count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--alpha", "1.7", "--steps", "3"),
            "model.safetensors is not trained again: leave --steps out, or choose",
        ),
        ((), "model.safetensors was trained with alpha 1.7, and 1.5 is asked for: choose another --out"),
    ],
)
def test_what_a_trained_model_cannot_give_is_refused(text, tmp_path, capsys, arguments, message):
    folder, _ = write_demo(tmp_path)
    code, _, error = demo(capsys, "--out", folder, "--text", text, *arguments)
    assert code == 1
    assert message in error


def test_a_larger_model_is_not_the_smallest(tmp_path, capsys, text):
    folder, _ = write_demo(tmp_path)
    model, settings = checkpoint.load(folder / "model.safetensors", "cpu")
    checkpoint.save(model, replace(settings, context=512))
    code, _, error = demo(capsys, "--out", folder, "--text", text, "--alpha", "1.7", "--smallest")
    assert code == 1
    assert "model.safetensors was trained with context 512, and 256 is asked for" in error
