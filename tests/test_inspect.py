"""The command flash-entmax inspect, on a model of Transformers and on the demo's; and every way to ask it wrongly."""

from importlib.util import find_spec

import pytest
import torch
from test_inspection import tiny_llama

from flash_entmax import cli, inspection


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A random model with a tokenizer of words, which drops the spaces between them."""
    model = tiny_llama()
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = ["[unk]", "the", "cat", "sat", "on", "mat", ".", "<"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[unk]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("llama")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]").save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "text.txt").write_text("the cat sat on the mat.\nthe cat < the mat.\n" * 12)
    return folder


def test_command_on_a_model_of_transformers(llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = "--text", llama_folder / "text.txt", "--tokens", 90, "--device", "cpu"
    code, printed, complaints = run_command(capsys, llama_folder, *options, "--out", tmp_path)
    assert (code, complaints) == (0, "")
    assert "layers.1.self_attn" in printed
    assert "alpha 1.5" in printed
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


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    pytest.importorskip("rich")
    from flash_entmax.demo import checkpoint
    from flash_entmax.demo.model import Transformer
    from flash_entmax.demo.settings import settings_for

    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    settings = settings_for("cpu", folder, None, 1.7, None, smallest=True)
    model = Transformer(settings.layers, settings.width, settings.heads, alpha=settings.alpha)
    checkpoint.save(model, settings)
    return folder, model


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
    assert f"{words}; the first 256 tokens" in printed
    assert '"f","⟨c3⟩","⟨bc⟩","r"," ","\\u003c","b"' in (tmp_path / "attention.html").read_text()
    for block in model.blocks:
        block.attention.alpha = alpha
    with torch.no_grad(), inspection.record(model) as calls:
        model(torch.tensor([list(text.read_bytes()[:256])]))
    sizes = [f"{call.keys_per_query.mean():.1f}" for call in calls]
    rows = [line.split() for line in printed.splitlines() if "blocks." in line]
    assert [row[2] for row in rows] == sizes


def test_command_refuses(demo_folder, llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = demo_folder
    text, empty = tmp_path / "text.txt", tmp_path / "empty"
    text.write_text("text")
    empty.mkdir()
    (tmp_path / "wrong.pt").write_text("no model")
    wrong = {
        ("/nowhere/at/all", "--text", text): "no such folder",
        (folder, "--text", tmp_path / "none.txt"): "No such file",
        (folder, "--text", empty): "Is a directory",
        (folder, "--text", text, "--alpha", 1): "--alpha must be above 1",
        (folder, "--text", text, "--attention", "sparsemax", "--alpha", 1.5): "has its own alpha",
        (folder, "--text", text, "--tokens", 0): "--tokens must be from 1 to",
        (folder, "--text", text, "--layers", "7"): "the model has the layers 0 to 1",
        (folder, "--text", text, "--layers", "a"): "numbers and ranges",
        (folder, "--text", text, "--out", text): "--out",
        (empty, "--text", text): "holds neither",
        (tmp_path / "wrong.pt", "--text", text): "not a model that the demo wrote",
        (llama_folder, "--text", text, "--attention", "entmax", "--device", "cpu"): "needs --alpha",
    }
    for arguments, message in wrong.items():
        code, printed, complaints = run_command(capsys, *arguments)
        assert code == 1, arguments
        assert message in complaints, arguments
        assert complaints.startswith("flash-entmax inspect: ")
        assert "Traceback" not in printed + complaints


def test_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    from flash_entmax import command

    text = tmp_path / "text.txt"
    text.write_text("text")
    for package in ("transformers", "matplotlib"):
        monkeypatch.setattr(command, "find_spec", lambda name, p=package: None if name == p else find_spec(name))
        code, _, complaints = run_command(capsys, "some/model", "--text", text)
        assert code == 1
        assert "pip install" in complaints
        assert package in complaints or "plot" in complaints
