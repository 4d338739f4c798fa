"""What the tools load runs nothing: no pickle, and no code of a model. SECURITY.md says so."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from inspect_command import run_command

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("flash_entmax", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "numpy.load", "np.load", "pickle.load", "eval", "exec"}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def refused(tmp_path, capsys):
    """Opens a model with `flash-entmax inspect`, which must fail without making the file `ran`; returns its words."""
    ran, text = tmp_path / "ran", tmp_path / "text.txt"
    text.write_text("text")

    def run(model: Path) -> str:
        options = "--text", text, "--out", tmp_path / "out", "--device", "cpu"
        code, printed, complaints = run_command(capsys, model, *options)
        assert (code, printed) == (1, "")
        assert not ran.exists()
        return complaints

    run.ran = ran
    return run


@pytest.fixture
def copied_llama(llama_folder, tmp_path):
    return Path(shutil.copytree(llama_folder, tmp_path / "llama"))


def test_weights_that_are_a_pickle_are_not_read(refused, copied_llama):
    pytest.importorskip("matplotlib")
    (copied_llama / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(refused.ran)}, copied_llama / "pytorch_model.bin")
    assert "model.safetensors" in refused(copied_llama)
    torch.load(copied_llama / "pytorch_model.bin", weights_only=False)
    assert refused.ran.exists(), "the file would have run, had it been read"


def test_code_of_a_model_is_not_run(refused, copied_llama):
    pytest.importorskip("matplotlib")
    config = json.loads((copied_llama / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (copied_llama / "config.json").write_text(json.dumps(config))
    (copied_llama / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(refused.ran)!r}).touch()\nclass Own: pass\n"
    )
    assert "Python code of its own, which is not run" in refused(copied_llama)


def test_a_model_of_the_demo_that_is_a_pickle_is_not_read(refused, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Touch(refused.ran)))
    assert "not a model that the demo wrote" in refused(tmp_path / "model.safetensors")


def unsafe(source: str) -> set[str]:
    """Modules and calls that may run what they read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & UNSAFE_MODULES
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & UNSAFE_CALLS
            found |= {word.arg for word in node.keywords if word.arg == "trust_remote_code" and is_true(word.value)}
    return found


def is_true(node: ast.expr) -> bool:
    return not isinstance(node, ast.Constant) or bool(node.value)


def test_no_source_calls_what_may_run_what_it_reads():
    assert unsafe("import pickle\ntorch.load(path)\nf(trust_remote_code=True)") == {
        "pickle", "torch.load", "trust_remote_code",
    }  # fmt: skip
    assert len(SOURCES) > 100
    assert not {path.name: found for path in SOURCES if (found := unsafe(path.read_text()))}
