"""The command flash-entmax inspect, on a model of Transformers and on the demo's; and every way to ask it wrongly."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from test_inspection import tiny_llama

from flash_entmax import entmax_attention, inspection
from flash_entmax.programs import cli
from flash_entmax.programs.errors import CommandError
from flash_entmax.testing import iid_inputs


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()  # of what ran before
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
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    (folder / "text.txt").write_text("the cat sat on the mat.\nthe cat < the mat.\n" * 12)
    return folder


def saved_beside(llama_folder, folder, model):
    """The model with the tokenizer of words."""
    for path in llama_folder.glob("token*"):
        shutil.copy(path, folder)
    model.save_pretrained(folder)
    return folder


def loss_of(model, implementation: str, ids: list[int]) -> float:
    """By Transformers' own means, of all logits."""
    model.set_attn_implementation(implementation)
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


def shown_losses(printed: str) -> list[float]:
    """With this alpha, with softmax."""
    line = next(line for line in printed.splitlines() if line.startswith("loss in nats per"))
    return [float(number) for number in re.findall(r"(\d+\.\d{3}) with", line)]


def words_of(llama_folder, first: int, count: int) -> list[int]:
    """Token ids of the text."""
    from transformers import AutoTokenizer

    text = (llama_folder / "text.txt").read_text()
    return AutoTokenizer.from_pretrained(llama_folder)(text)["input_ids"][first:][:count]


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


@pytest.mark.parametrize("logits", [2**28, 64 * 7], ids=["at once", "in pieces"])
def test_losses_are_those_of_the_model(llama_folder, tmp_path, capsys, monkeypatch, logits):
    """With the alpha that is shown and with softmax, in the terminal and on the page; however many at a time."""
    from flash_entmax.programs.inspect import loss

    monkeypatch.setattr(loss, "MOST_LOGITS", logits)
    monkeypatch.setattr(loss, "ROWS", 5)
    options = "--text", llama_folder / "text.txt", "--tokens", 90, "--device", "cpu", "--out", tmp_path
    code, printed, complaints = run_command(capsys, llama_folder, *options, "--attention", "sparsemax")
    assert (code, complaints) == (0, "")
    ids, model = words_of(llama_folder, 0, 90), tiny_llama()
    expected = loss_of(model, "sparsemax", ids), loss_of(model, "sdpa", ids)
    assert abs(expected[0] - expected[1]) > 0.01
    assert shown_losses(printed) == pytest.approx(expected, abs=0.0006)
    line = next(line for line in printed.splitlines() if line.startswith("loss"))
    assert line.startswith("loss in nats per token: ")
    assert "with alpha 2, " in line
    assert line in (tmp_path / "attention.html").read_text()
    assert sum("layers." in row for row in printed.splitlines()) == 2


def test_a_model_whose_softmax_is_eager(llama_folder, tmp_path, capsys):
    """Gemma 2 caps its scores, which PyTorch's attention does not: the loss with softmax has the cap as well."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=1, attn_logit_softcapping=2.0, initializer_range=0.5,
        final_logit_softcapping=3.0, sliding_window=16,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    saved_beside(llama_folder, tmp_path, model)
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, complaints) == (0, "")
    ids = words_of(llama_folder, 0, 40)
    expected = loss_of(model, "entmax15", ids), loss_of(model, "eager", ids)
    assert shown_losses(printed) == pytest.approx(expected, abs=0.0006)


def without_a_head():
    return tiny_llama().model


def that_fills_gaps():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=64, attention_probs_dropout_prob=0.0, **sizes))


def that_sees_ahead():
    model = tiny_llama()
    model.config.is_causal = False
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_a_head, "LlamaModel has no head that predicts the next token"),
        (that_fills_gaps, "BertForMaskedLM predicts hidden tokens, not the next one"),
        (that_sees_ahead, "the tokens of this LlamaForCausalLM see those that follow them"),
    ],
)
def test_why_no_loss_is_shown(llama_folder, tmp_path, capsys, make, words):
    pytest.importorskip("matplotlib")
    saved_beside(llama_folder, tmp_path, make())
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, complaints) == (0, "")
    assert f"\nno loss is shown: {words}\n" in printed
    assert f"no loss is shown: {words}" in (tmp_path / "out" / "attention.html").read_text()


@pytest.mark.parametrize(
    ("asked", "alpha", "words"),
    [
        ((), 1.7, "alpha 1.7, as found in its config.json"),
        (("--alpha", 1.2), 1.2, "alpha 1.2, in place of 1.7 in its config.json"),
        (("--attention", "sparsemax"), 2.0, "alpha 2, in place of 1.7 in its config.json"),
    ],
)
def test_a_model_that_was_saved_with_entmax(llama_folder, tmp_path, capsys, asked, alpha, words):
    """Its own alpha is what is shown, and said to be found there."""
    pytest.importorskip("matplotlib")
    model = tiny_llama()
    model.set_attn_implementation("entmax")
    model.config.entmax_alpha = 1.7
    saved_beside(llama_folder, tmp_path, model)
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options, *asked)
    assert (code, complaints) == (0, "")
    assert words in printed
    model.config.entmax_alpha = alpha
    expected = loss_of(model, "entmax", words_of(llama_folder, 0, 40))
    assert shown_losses(printed)[0] == pytest.approx(expected, abs=0.0006)


@pytest.mark.parametrize(
    ("alpha", "asked", "words"),
    [
        (torch.nn.Parameter(torch.full((4,), 1.3)), (), "alpha 1.3, as found among its weights"),
        (torch.tensor(1.3), (), "alpha 1.3, as found among its weights"),
        (
            torch.nn.Parameter(torch.full((4,), 1.3)),
            ("--alpha", 1.5),
            "alpha 1.5, in place of its learned one for each of 4 heads;",
        ),
        (torch.tensor(1.3), ("--alpha", 1.5), "alpha 1.5, in place of its own one for all heads;"),
        ({0: 1.25, 1: 1.75}, (), "alpha 1.25 to 1.75, as found in its config.json"),
        (
            {0: 1.25, 1: 1.75},
            ("--alpha", 1.5),
            "alpha 1.5, in place of alpha by layer, 1.25 to 1.75, in its config.json",
        ),
    ],
)
def test_where_alpha_is_found(llama_folder, tmp_path, capsys, alpha, asked, words):
    """A tensor among the weights, numbers in config.json."""
    pytest.importorskip("matplotlib")
    model = entmax_llama(alpha)
    saved_beside(llama_folder, tmp_path, model)
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options, *asked)
    assert (code, complaints) == (0, "")
    assert words in printed


def entmax_llama(alpha, layers=2):
    from flash_entmax.integrations.transformers import set_alpha

    model = tiny_llama(layers)
    model.set_attn_implementation("entmax")
    set_alpha(model, alpha)
    return model


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((), "alpha 1.8, with the entmax_alpha of its config.json, in place of its softmax;"),
        (("--alpha", 1.5), "alpha 1.5, in place of its softmax;"),
        (("--attention", "sparsemax"), "alpha 2, in place of its softmax;"),
    ],
)
def test_a_model_that_was_saved_with_softmax(llama_folder, tmp_path, capsys, asked, words):
    """Whatever its config says of alpha."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "saved"
    shutil.copytree(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"entmax_alpha": 1.8}))
    options = "--text", folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, folder, *options, *asked)
    assert (code, complaints) == (0, "")
    assert words in printed


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


def test_alphas_that_differ_are_shown_from_the_smallest_to_the_largest():
    from flash_entmax.programs.inspect.loss import alpha_of

    with inspection.record() as calls:
        for alpha in (1.5, torch.tensor([1.25, 1.75])):
            entmax_attention(*iid_inputs(1, 2, 5, 8), alpha=alpha)
    assert alpha_of(calls) == "alpha 1.25 to 1.75"
    assert alpha_of(calls[:1]) == "alpha 1.5"


def test_a_config_whose_alpha_is_no_number_is_refused(llama_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "saved"
    shutil.copytree(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"entmax_alpha": "1.5"}))
    options = "--text", folder / "text.txt", "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, folder, *options)
    assert (code, printed) == (1, "")
    assert "entmax_alpha must be a number" in complaints


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


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    pytest.importorskip("rich")
    from flash_entmax.programs.demo import checkpoint
    from flash_entmax.programs.demo.model import Transformer
    from flash_entmax.programs.demo.settings import settings_for

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
    folder, model = demo_folder
    with torch.no_grad():
        for part in (model.predict.weight, *(block.attention.out.weight for block in model.blocks)):
            part.normal_(std=0.5)
    saved = torch.load(folder / "model.pt", weights_only=True)
    torch.save({"sizes": saved["sizes"], "weights": model.state_dict()}, tmp_path / "model.pt")
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


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


def fnet():
    from transformers import FNetConfig, FNetForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return FNetForMaskedLM(FNetConfig(vocab_size=64, **sizes))


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [mamba, fnet, bloom])
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
