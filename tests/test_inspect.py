"""The command flash-entmax inspect on a model of Transformers: table, page, maps, and the text that it reads."""

import json
import shutil

import pytest
import torch
from inspect_command import loss_of, run_command, shown_losses, words_of
from test_inspection import tiny_llama

from flash_entmax import inspection
from flash_entmax.programs.errors import CommandError


def test_command_on_a_model_of_transformers(llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = "--text", llama_folder / "text.txt", "--tokens", 90, "--device", "cpu"
    code, printed, complaints = run_command(capsys, llama_folder, *options, "--out", tmp_path)
    assert (code, complaints) == (0, "")
    assert "layers.1.self_attn" in printed
    assert "alpha 1.5, in place of its softmax; the first 90 tokens of" in printed
    assert {"support.png", "sparsity.png", "attention.html"} <= {path.name for path in tmp_path.iterdir()}
    content = (tmp_path / "attention.html").read_text()
    assert '"tokens":["the"," cat"," sat"," on"," the"," mat",".","\\nthe"," cat"," \\u003c"' in content
    assert content.count('id="attention-') == 2 * 4

    code, printed, _ = run_command(
        capsys, llama_folder, *options, "--out", tmp_path / "one", "--layers", 1, "--alpha", 1.9
    )
    assert code == 0
    assert "layers.0.self_attn" not in printed
    assert "alpha 1.9" in printed


def test_offset_skips_tokens_of_the_text(llama_folder, tmp_path, capsys):
    """The model reads the tokens from there on as its first; special tokens stay around them."""
    pytest.importorskip("matplotlib")
    options = "--text", llama_folder / "text.txt", "--tokens", 20, "--offset", 10, "--device", "cpu"
    code, printed, _ = run_command(capsys, llama_folder, *options, "--out", tmp_path)
    assert code == 0
    assert f"; 20 tokens of {llama_folder / 'text.txt'} from token 10 on\n" in printed
    expected = loss_of(tiny_llama(), "entmax15", words_of(llama_folder, 10, 20))
    assert shown_losses(printed)[0] == pytest.approx(expected, abs=0.0006)
    content = (tmp_path / "attention.html").read_text()
    assert '"tokens":[" the"," mat","."' in content
    assert "llama0, 20 tokens of text.txt from token 10 on</h1>" in content


def test_special_tokens_stay_around_the_text():
    tokenizers = pytest.importorskip("tokenizers")
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from flash_entmax.programs.inspect import transformers_model
    from flash_entmax.programs.inspect.settings import InspectSettings

    words = ["<s>", "</s>", *"abcdefgh"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    def read(offset: int, limit: int) -> list[str]:
        settings = InspectSettings("model", Path("text"), Path("out"), offset=offset)
        return transformers_model.encoded(tokenizer, settings, b"a b c d e f g h", limit)[1]

    with pytest.raises(CommandError, match="--tokens 2: the tokenizer adds 2 special ones to any text"):
        read(0, 2)
    assert read(0, 5) == ["<s>", "a", " b", " c", "</s>"]
    assert read(3, 5) == ["<s>", " d", " e", " f", "</s>"]
    assert read(6, 5) == ["<s>", " g", " h", "</s>"]
    with pytest.raises(CommandError, match="--offset 8: there are 8 tokens in text"):
        read(8, 5)


def test_heads_that_are_asked_for(llama_folder, tmp_path, capsys):
    """A map of each, and the page opens at the first."""
    pytest.importorskip("matplotlib")
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path
    code, _, complaints = run_command(capsys, llama_folder, *options, "--head", "1:2", "3")
    assert (code, complaints) == (0, "")
    assert {path.name for path in tmp_path.glob("map*")} == {"map-1-2.png", "map-0-3.png"}
    assert '"start":[1,2]' in (tmp_path / "attention.html").read_text()
    code, _, _ = run_command(capsys, llama_folder, *options[:-1], tmp_path / "one", "--head", "3", "--layers", 1)
    assert code == 0
    assert {path.name for path in (tmp_path / "one").glob("map*")} == {"map-1-3.png"}


def test_keys_of_64_queries_are_in_the_table(llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = "--text", llama_folder / "text.txt", "--tokens", 90, "--device", "cpu", "--out", tmp_path
    _, printed, _ = run_command(capsys, llama_folder, *options)
    with torch.no_grad(), inspection.record(model := tiny_llama()) as calls:
        model(torch.tensor([words_of(llama_folder, 0, 90)]))
    rows = [line.split() for line in printed.splitlines() if "layers." in line]
    for call, row in zip(calls, rows, strict=True):
        assert row[6] == f"{call.keys_per_64_queries.mean():.1f}"
        assert row[7] == f"{100 * (1 - call.key_sparsity.mean()):.0f}"


def test_a_terminal_sees_how_far_the_work_is(llama_folder, tmp_path, capsys, monkeypatch):
    """A line for each step, which is gone at the end; nothing where stderr is a file or a pipe."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path
    code, printed, progress = run_command(capsys, llama_folder, *options)
    assert code == 0
    steps = [step.removeprefix("\x1b[K") for step in progress.split("\r")]
    for step in (
        "reading the text: layers.1.self_attn",
        "counting the keys: layer 2 of 2",
        "writing the page: layer 1 of 2",
    ):
        assert f"{step} ..." in steps
    assert steps[-1] == ""
    assert "\r" not in printed


def test_a_tokenizer_that_cuts_on_the_left_is_read_from_the_start(llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(llama_folder, tmp_path / "left")
    options = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"truncation_side": "left"}))
    given = "--text", llama_folder / "text.txt", "--tokens", 20, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, _ = run_command(capsys, folder, *given)
    assert code == 0
    expected = loss_of(tiny_llama(), "entmax15", words_of(llama_folder, 0, 20))
    assert shown_losses(printed)[0] == pytest.approx(expected, abs=0.0006)


def test_pieces_of_one_character_show_it_once():
    from flash_entmax.programs.inspect.transformers_model import REST, pieces

    offsets, names = [(0, 0), (0, 1), (0, 1), (1, 2)], ["<s>", "a", "b", "c"]
    assert pieces("é!", offsets, names, [1, 0, 0, 0]) == ["<s>", "é", REST, "!"]
