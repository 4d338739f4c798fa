"""The command flash-entmax inspect on models with state-space layers: hybrid ones, and those without any attention."""

import json
import re

import pytest
import torch
from inspect_command import run_command, saved_beside, shown_losses, words_of
from mixers import config_of, spread

from flash_entmax import inspection
from flash_entmax.integrations import state_space


@pytest.fixture(scope="module")
def folders(llama_folder, tmp_path_factory):
    """Mamba, and Bamba with attention in its second layer of three."""
    pytest.importorskip("matplotlib")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    configs = {
        "pure": config_of("MambaMixer", num_hidden_layers=2),
        "hybrid": config_of("BambaMixer", num_hidden_layers=3, attn_layer_indices=[1]),
    }
    return {
        name: saved_beside(
            llama_folder, tmp_path_factory.mktemp(name), spread(AutoModelForCausalLM.from_config(config))
        )
        for name, config in configs.items()
    }


def options(llama_folder, out) -> tuple:
    return "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", out


def facts_of(out) -> dict:
    return json.loads(re.search(r'id="facts">(.*?)</script>', (out / "attention.html").read_text())[1])


def test_a_model_without_attention(llama_folder, folders, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    code, printed, complaints = run_command(capsys, folders["pure"], *options(llama_folder, tmp_path))
    assert (code, complaints) == (0, "")
    assert ": no entmax attention; the first 40 tokens of" in printed
    words = "layers 0 1 are state-space layers: keys are the fewest tokens that make up 99 % of an output"
    assert words in printed
    assert {"support.png", "sparsity.png", "attention.html"} <= {path.name for path in tmp_path.iterdir()}
    ids = torch.tensor([words_of(llama_folder, 0, 40)])
    model = AutoModelForCausalLM.from_pretrained(folders["pure"])
    with torch.no_grad(), inspection.record(model, layers=state_space.recorder()) as calls:
        loss = model(ids, labels=ids).loss.item()
    assert f"\nloss in nats per token: {loss:.3f}\n" in printed
    rows = [line.split() for line in printed.splitlines() if ".mixer" in line]
    assert [row[:3] for row in rows] == [
        [str(n), f"layers.{n}.mixer", f"{calls[n].keys_per_query[0]:.1f}"] for n in (0, 1)
    ]
    for call, layer in zip(calls, facts_of(tmp_path)["layers"], strict=True):
        assert layer["covered"] == 0.99
        left = 1 - call.rows().to_dense().double().sum(-1)
        torch.testing.assert_close(torch.tensor(layer["other"][0], dtype=torch.float64), left, rtol=0, atol=1e-5)
        assert left.max() > 0.001
    assert words in (tmp_path / "attention.html").read_text()


def test_a_hybrid_model(llama_folder, folders, tmp_path, capsys):
    """Attention keeps its alpha and its two losses, and nothing of its rows is left out."""
    arguments = folders["hybrid"], *options(llama_folder, tmp_path), "--head", "2:0", "1:1"
    code, printed, complaints = run_command(capsys, *arguments)
    assert (code, complaints) == (0, "")
    assert "entmax attention, alpha 1.5, in place of its softmax" in printed
    assert len(shown_losses(printed)) == 2
    assert "layers 0 2 are state-space layers" in printed
    assert [line.split()[:2] for line in printed.splitlines() if "layers." in line and " is " not in line] == [
        ["0", "layers.0.mamba"], ["1", "layers.1.self_attn"], ["2", "layers.2.mamba"]
    ]  # fmt: skip
    layers = facts_of(tmp_path)["layers"]
    assert [(len(layer["sizes"]), layer["covered"], layer["other"] is None) for layer in layers] == [
        (1, 0.99, False), (2, 1.0, True), (1, 0.99, False)
    ]  # fmt: skip
    assert {path.name for path in tmp_path.glob("map*")} == {"map-2-0.png", "map-1-1.png"}
    code, printed, _ = run_command(capsys, *arguments[:-3], "--layers", 1)
    assert code == 0
    assert "state-space" not in printed


@pytest.mark.parametrize(
    ("model", "asked", "words"),
    [
        ("pure", ("--alpha", 1.5), "--alpha 1.5: this model has no attention"),
        ("pure", ("--attention", "sparsemax"), "--attention sparsemax: this model has no attention"),
        ("hybrid", ("--head", "0:1"), "--head 1: layer 0 has the heads 0 to 0"),
    ],
)
def test_what_these_layers_do_not_have_is_refused(llama_folder, folders, tmp_path, capsys, model, asked, words):
    code, _, complaints = run_command(capsys, folders[model], *options(llama_folder, tmp_path), *asked)
    assert code == 1
    assert words in complaints


def test_linear_layers_of_another_kind(llama_folder, folders, tmp_path, capsys, monkeypatch):
    """A model without attention, of whose layers none can be shown."""
    monkeypatch.setattr(state_space, "recorder", lambda: lambda module: None)
    code, _, complaints = run_command(capsys, folders["pure"], *options(llama_folder, tmp_path))
    assert code == 1
    assert "this model has no attention, and none of its layers is a state-space layer" in complaints
