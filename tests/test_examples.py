"""Every script in examples/ runs, at toy size, and prints what it is there to show."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Script -> (arguments at toy size, a pattern of its last lines, a package that it needs)
SCRIPTS = {
    "activations_and_losses.py": ((), r"entmax loss\s+100 % right, gradient exactly 0 for [6-9]\d %", None),
    "any_alpha.py": ((), r"learned alphas 0\.6\d  1\.00  1\.50  2\.2\d\n.*normmax loss of random scores: \d", None),
    "attention_layer.py": (("120",), r"\n\s+16\s+\d+ %\s+[\d.]+, [\d.]+ of 17", None),
    "anneal_softmax_to_entmax.py": (("20",), r"alpha annealed to 1.5:\s+validation loss \d\.\d+", None),
    "transformers_model.py": ((), r"\S", "transformers"),
    "what_attention_remembers.py": ((), r"left: Kim .*attention by \de-1[4-9]\n.*from it by 1\.0", "matplotlib"),
    "torchtitan_attention.py": ((), r"2 processes, 128 of 256 tokens each: loss 8\.\d+, norm", "torchtitan"),
    "variational_autoencoder.py": (("1",), r"alpha 2: error of a restored pixel 0\.\d+, exactly", "sklearn"),
    "see_state_space.py": (("0", "4", "5"), r"entmax .*Mamba-2  0\.\d{3}      1   \d\.\d .*trained in", "transformers"),
    "serve_from_pages.py": ((), r"5 answers, each the same from keys in one piece; 24 of 24 pages are free", None),
    "see_attention.py": ((), r"attends to\n  0\.\d{4}  token", "matplotlib"),
}

LAUNCHER = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
PROCESSES = {"torchtitan_attention.py": "2"}
SHARDED = "train_context_parallel.py"


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {SHARDED, *SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script, tmp_path):
    arguments, pattern, package = SCRIPTS[script]
    if package is not None and not find_spec(package):
        pytest.skip(f"needs {package}")
    launcher = (*LAUNCHER, PROCESSES[script]) if script in PROCESSES else ()
    printed = run(*launcher, EXAMPLES / script, *arguments, folder=tmp_path)
    assert re.search(pattern, printed, re.DOTALL), printed


def run(*command, folder: Path) -> str:
    """What a command of Python prints."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    """After step 2 of 4 of two processes, one process has the losses that the two would have had."""
    options = ("--steps", "4", "--tokens", "96", "--save-every", "2", "--folder", "saved")

    def lines(processes: int) -> list[str]:
        return run(*LAUNCHER, str(processes), EXAMPLES / SHARDED, *options, folder=tmp_path).splitlines()

    first, *whole = lines(2)
    assert first.startswith("2 processes, 48 of 96 tokens each")
    shutil.rmtree(tmp_path / "saved" / "step-000004")
    first, *rest = lines(1)
    assert first.startswith("1 processes, 96 of 96 tokens each")
    found, expected = ([re.match(r"step (\d): loss ([\d.]+), [\d,]+ tokens a second", line).groups() for line in of] for
                       of in (rest, whole[2:]))  # fmt: skip
    assert [step for step, _ in found] == [step for step, _ in expected] == ["3", "4"]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
    assert float(found[-1][1]) < 5.4  # it has learned: a uniform guess has 5.545
