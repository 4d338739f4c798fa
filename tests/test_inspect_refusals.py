"""What flash-entmax inspect refuses, in words: wrong options, and models that it cannot inspect."""

import json
import shutil
from importlib.util import find_spec

import pytest
from inspect_command import run_command, saved_beside
from test_inspection import tiny_llama


def test_command_refuses(demo_folder, llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = demo_folder
    text, empty = tmp_path / "text.txt", tmp_path / "empty"
    text.write_text("text")
    empty.mkdir()
    (tmp_path / "wrong.safetensors").write_text("no model")
    wrong = {
        ("/nowhere/at/all", "--text", text): "no such folder",
        (folder, "--text", tmp_path / "none.txt"): "No such file",
        (folder, "--text", empty): "Is a directory",
        (folder, "--text", text, "--alpha", 1): "--alpha must be from 1.0001 (1 is softmax",
        (folder, "--text", text, "--attention", "sparsemax", "--alpha", 1.5): "has its own alpha",
        (folder, "--text", text, "--tokens", 0): "--tokens must be from 1 to",
        (folder, "--text", text, "--layers", "7"): "the model has the layers 0 to 1",
        (folder, "--text", text, "--layers", "a"): "numbers and ranges",
        (folder, "--text", text, "--layers", "0", "1-0"): "--layers 1-0: no layer is in there",
        (folder, "--text", text, "--out", text): "--out",
        (empty, "--text", text): "holds neither",
        (tmp_path / "wrong.safetensors", "--text", text): "not a model that the demo wrote",
        (llama_folder, "--text", text, "--attention", "entmax", "--device", "cpu"): "needs --alpha",
        (folder, "--text", text, "--offset", -1): "--offset must be at least 0, got -1",
        (folder, "--text", text, "--offset", 4): f"--offset 4: there are 4 bytes in {text}",
        (llama_folder, "--text", text, "--offset", 1, "--device", "cpu"): f"--offset 1: there are 1 tokens in {text}",
        (folder, "--text", text, "--head", "x"): "--head takes a head, such as 8, or layer and head, such as 23:8",
        (folder, "--text", text, "--head", "1:2:3"): "got '1:2:3'",
        (folder, "--text", text, "--head", ":3"): "got ':3'",
        (folder, "--text", text, "--head", 2): "--head 2: the model has the heads 0 to 1",
        (llama_folder, "--text", text, "--head", 0, "1:4", "--device", "cpu"): "the model has the heads 0 to 3",
        (folder, "--text", text, "--head", "2:0"): "--head 2:0: the model has the layers 0 to 1",
        (folder, "--text", text, "--head", "1:0", "--layers", 0): "--head 1:0: --layers 0 leaves layer 1 out",
    }
    for arguments, message in wrong.items():
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        code, printed, complaints = run_command(capsys, *arguments, *out)
        assert code == 1, arguments
        assert message in complaints, arguments
        assert complaints.startswith("flash-entmax inspect: ")
        assert printed == ""


def test_refusals_come_before_the_weights_are_read(llama_folder, demo_folder, tmp_path, capsys, monkeypatch):
    """What the config tells, and the text."""
    from flash_entmax.programs.inspect import transformers_model

    monkeypatch.setattr(transformers_model, "load_weights", None)
    for wrong in (
        ("--layers", 2),
        ("--head", 4),
        ("--head", "2:0"),
        ("--offset", 10**6),
        ("--out", llama_folder / "text.txt"),
    ):
        options = "--text", llama_folder / "text.txt", "--device", "cpu", "--out", tmp_path, *wrong
        code, _, complaints = run_command(capsys, llama_folder, *options)
        assert code == 1
        assert wrong[0] in complaints
    for alpha, words in ((1, "must be above 1 and at most 2, got 1"), (2.5, "got 2.5")):
        folder = tmp_path / str(alpha)
        shutil.copytree(llama_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"entmax_alpha": alpha}))
        code, _, complaints = run_command(capsys, folder, "--text", llama_folder / "text.txt", "--out", tmp_path)
        assert code == 1
        assert words in complaints


def test_weights_that_are_missing_are_refused(llama_folder, tmp_path, capsys):
    """They would be random numbers."""
    pytest.importorskip("matplotlib")
    saved_beside(llama_folder, tmp_path, tiny_llama().model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    options = "--text", llama_folder / "text.txt", "--device", "cpu", "--out", tmp_path / "out"
    code, _, complaints = run_command(capsys, tmp_path, *options)
    assert code == 1
    assert "1 weights of LlamaForCausalLM are missing, such as lm_head.weight" in complaints


def test_what_cannot_be_loaded_is_said(llama_folder, tmp_path, capsys, monkeypatch):
    """A folder without a tokenizer; and a name that is no folder here, nor known elsewhere."""
    pytest.importorskip("matplotlib")
    tiny_llama().save_pretrained(tmp_path / "model")
    options = "--text", llama_folder / "text.txt", "--device", "cpu", "--out", tmp_path / "out"
    code, _, complaints = run_command(capsys, tmp_path / "model", *options)
    assert code == 1
    assert "its tokenizer, which --text needs, cannot be loaded" in complaints

    from flash_entmax.programs.inspect import transformers_model

    def unknown(*_):
        raise OSError("nobody knows it")

    monkeypatch.setattr(transformers_model, "load", unknown)
    code, _, complaints = run_command(capsys, "out/nothing", *options)
    assert code == 1
    assert "out/nothing: no such folder here, and as a name of a model: nobody knows it" in complaints


def test_what_a_model_cannot_do_is_said_in_words(llama_folder, tmp_path, capsys):
    """Attention sinks are a part of softmax."""
    pytest.importorskip("matplotlib")
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    saved_beside(llama_folder, tmp_path, GptOssForCausalLM(config))
    options = "--text", llama_folder / "text.txt", "--tokens", 20, "--device", "cpu", "--out", tmp_path / "out"
    code, _, complaints = run_command(capsys, tmp_path, *options)
    assert code == 1
    assert "attention sinks are a term of softmax's denominator" in complaints


def fnet():
    from transformers import FNetConfig, FNetForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return FNetForMaskedLM(FNetConfig(vocab_size=64, **sizes))


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [fnet, bloom])
def test_models_without_the_attention_interface(llama_folder, tmp_path, capsys, make):
    """Found out by their class, or when they have run: in words, and without advice that the command cannot take."""
    pytest.importorskip("matplotlib")
    saved_beside(llama_folder, tmp_path, make())
    options = "--text", llama_folder / "text.txt", "--tokens", 20, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, printed) == (1, "")
    words = "this model does not use Transformers' attention interface, so there is nothing to inspect"
    assert complaints == f"flash-entmax inspect: {tmp_path}: {words}\n"


def test_advice_for_those_who_build_a_model_is_left_out():
    from flash_entmax.programs.inspect.transformers_model import in_words

    error = ValueError("biases added to the scores are not supported: use attn_implementation='eager'")
    assert in_words(error) == "biases added to the scores are not supported"
    assert in_words(ValueError("two: words. More")) == "two: words. More"


def test_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    from flash_entmax.programs import errors as command

    text = tmp_path / "text.txt"
    text.write_text("text")
    for package in ("transformers", "matplotlib"):
        monkeypatch.setattr(command, "find_spec", lambda name, p=package: None if name == p else find_spec(name))
        code, _, complaints = run_command(capsys, "some/model", "--text", text)
        assert code == 1
        assert "pip install" in complaints
        assert package in complaints or "plot" in complaints
