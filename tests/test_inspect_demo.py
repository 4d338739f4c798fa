"""The command flash-entmax inspect on the model of the demo."""

import copy
from dataclasses import replace

import pytest
import torch
from inspect_command import run_command, shown_losses

from flash_entmax import inspection


@pytest.mark.parametrize(
    ("asked", "alpha", "words"),
    [((), 1.7, "alpha 1.7, as trained"), (("--alpha", 1.2), 1.2, "alpha 1.2, trained with 1.7")],
    ids=["as trained", "another alpha"],
)
def test_command_on_the_model_of_the_demo(demo_folder, tmp_path, capsys, asked, alpha, words):
    pytest.importorskip("matplotlib")
    folder, model = demo_folder
    text = tmp_path / "text.txt"
    text.write_text("für <b>" * 100)
    code, printed, complaints = run_command(capsys, folder, "--text", text, "--out", tmp_path, *asked)
    assert (code, complaints) == (0, "")
    assert f"{words}; the first 256 bytes of {text}, all that the model takes at once" in printed
    assert '"f","⟨c3⟩","⟨bc⟩","r"," ","\\u003c","b"' in (tmp_path / "attention.html").read_text()
    for block in model.blocks:
        block.attention.alpha = alpha
    with torch.no_grad(), inspection.record(model) as calls:
        model(torch.tensor([list(text.read_bytes()[:256])]))
    sizes = [f"{call.keys_per_query.mean():.1f}" for call in calls]
    rows = [line.split() for line in printed.splitlines() if "blocks." in line]
    assert [row[2] for row in rows] == sizes


def test_losses_of_the_model_of_the_demo(demo_folder, tmp_path, capsys):
    """In nats per byte: with its alpha, and with alpha 1; of the bytes after the offset."""
    pytest.importorskip("matplotlib")
    from flash_entmax.programs.demo import checkpoint

    folder, model = demo_folder[0], copy.deepcopy(demo_folder[1])
    with torch.no_grad():
        for part in (model.predict.weight, *(block.attention.out.weight for block in model.blocks)):
            part.normal_(std=0.5)
    _, settings = checkpoint.load(folder / "model.safetensors", "cpu")
    checkpoint.save(model, replace(settings, out=tmp_path))
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 3)
    options = "--text", text, "--out", tmp_path / "out", "--offset", 50, "--tokens", 100, "--device", "cpu"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, complaints) == (0, "")
    assert f"; 100 bytes of {text} from byte 50 on\nloss in nats per byte: " in printed
    data, expected = torch.tensor([list(text.read_bytes()[50:150])]), []
    for alpha in (1.7, 1.0):
        for block in model.blocks:
            block.attention.alpha = alpha
        with torch.no_grad():
            expected.append(torch.nn.functional.cross_entropy(model(data)[0, :-1], data[0, 1:]).item())
    assert abs(expected[0] - expected[1]) > 0.01
    assert shown_losses(printed) == pytest.approx(expected, abs=0.0006)
