"""The layers in what flash-entmax inspect shows: their numbers, and those that are left out."""

import pytest
import torch
from inspect_command import entmax_llama, run_command, saved_beside

from flash_entmax import entmax_attention, inspection
from flash_entmax.testing import iid_inputs


@pytest.fixture(scope="module")
def partly_softmax(llama_folder, tmp_path_factory):
    """Layers 0 and 2 of three are softmax."""
    pytest.importorskip("matplotlib")
    return saved_beside(llama_folder, tmp_path_factory.mktemp("partly"), entmax_llama({0: 1, 1: 1.5, 2: 1}, layers=3))


def test_layers_are_numbered_as_in_the_model(llama_folder, partly_softmax, tmp_path, capsys):
    """Softmax layers count, and are named; in the table, on the page, and in what is asked for."""
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path
    code, printed, complaints = run_command(capsys, partly_softmax, *options, "--head", "1:3")
    assert (code, complaints) == (0, "")
    rows = [line.split()[:2] for line in printed.splitlines() if "self_attn" in line]
    assert rows == [["1", "layers.1.self_attn"]]
    words = "layers 0 2 are softmax (alpha 1) and are not shown"
    assert f"\n{words}\n" in printed
    content = (tmp_path / "attention.html").read_text()
    assert words in content
    assert '"start":[0,3]' in content  # the first that is shown
    assert '"number":1,"name":"layers.1.self_attn"' in content
    assert (tmp_path / "map-1-3.png").exists()
    code, printed, _ = run_command(capsys, partly_softmax, *options, "--layers", "0-1")
    assert code == 0
    assert "\nlayer 0 is softmax (alpha 1) and is not shown\n" in printed
    code, printed, _ = run_command(capsys, partly_softmax, *options, "--layers", "1")
    assert code == 0
    assert "not shown" not in printed


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--layers", 0), "--layers 0: layer 0 is softmax (alpha 1) and is not shown"),
        (("--layers", "0", "2"), "--layers 0 2: layers 0 2 are softmax (alpha 1) and are not shown"),
        (("--head", "2:1"), "--head 2:1: layer 2 is softmax (alpha 1) and is not shown"),
        (("--layers", 3), "--layers 3: the model has the layers 0 to 2"),
    ],
)
def test_layers_that_are_softmax_are_refused(llama_folder, partly_softmax, tmp_path, capsys, asked, words):
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path
    code, printed, complaints = run_command(capsys, partly_softmax, *options, *asked)
    assert (code, printed) == (1, "")
    assert words in complaints


def test_layers_without_attention_count(llama_folder, tmp_path, capsys):
    """LFM2 has convolutions between its attention."""
    pytest.importorskip("matplotlib")
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv", "conv"],
    )  # fmt: skip
    saved_beside(llama_folder, tmp_path, Lfm2ForCausalLM(config))
    options = "--text", llama_folder / "text.txt", "--tokens", 20, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, _ = run_command(capsys, tmp_path, *options)
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines() if "self_attn" in line] == ["1"]
    assert "\nlayers 0 2 3 have no entmax attention and are not shown\n" in printed
    code, _, complaints = run_command(capsys, tmp_path, *options, "--layers", 3)
    assert code == 1
    assert "--layers 3: layer 3 has no entmax attention and is not shown" in complaints


def test_a_model_all_of_whose_layers_are_softmax(llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    saved_beside(llama_folder, tmp_path, entmax_llama({0: 1, 1: 1}))
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, printed) == (1, "")
    assert "layers 0 1 are softmax (alpha 1) and are not shown: give --alpha" in complaints
    code, printed, _ = run_command(capsys, tmp_path, *options, "--alpha", 1.5)
    assert code == 0
    assert sum("self_attn" in line for line in printed.splitlines()) == 2


def test_calls_without_layers_of_their_own_are_numbered_as_they_ran():
    """No layer_idx, or one layer that runs twice."""
    from flash_entmax.programs.inspect.layers import number_by_layer

    class Layer(torch.nn.Module):
        def forward(self, inputs):
            return entmax_attention(*inputs)

    layer, inputs = Layer(), iid_inputs(1, 2, 5, 8)
    for make in (lambda: torch.nn.ModuleList([Layer(), Layer()]), lambda: torch.nn.ModuleList([layer])):
        model = make()
        layer.layer_idx = 7
        with inspection.record(model) as calls:
            for part in (model[0], model[-1]):
                part(inputs)
        assert not number_by_layer(model, calls)
        assert [call.number for call in calls] == [0, 1]
    with inspection.record(model) as calls:
        layer(inputs)
    assert number_by_layer(model, calls)
    assert [call.number for call in calls] == [7]
