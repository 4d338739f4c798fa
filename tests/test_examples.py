"""Every script in examples/ runs, at toy size, and prints what it is there to show."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Script -> (arguments at toy size, a pattern of its last lines, a package that it needs)
SCRIPTS = {
    "activations_and_losses.py": ((), r"entmax loss\s+100 % right, gradient exactly 0 for [6-9]\d %", None),
    "attention_layer.py": (("120",), r"\n\s+16\s+\d+ %\s+[\d.]+, [\d.]+ of 17", None),
    "anneal_softmax_to_entmax.py": (("20",), r"alpha annealed to 1.5:\s+validation loss \d\.\d+", None),
    "transformers_model.py": ((), r"\S", "transformers"),
    "train_context_parallel.py": (("5", "64"), r"2 processes, 32 of 64 tokens.*step 5: loss [34]\.\d+", None),
    "see_state_space.py": (("0", "4", "5"), r"entmax .*Mamba-2  0\.\d{3}      1   \d\.\d .*trained in", "transformers"),
    "see_attention.py": ((), r"attends to\n  0\.\d{4}  token", "matplotlib"),
}

LAUNCHERS = {"train_context_parallel.py": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")}


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script, tmp_path):
    arguments, pattern, package = SCRIPTS[script]
    if package is not None and not find_spec(package):
        pytest.skip(f"needs {package}")
    done = subprocess.run(
        [sys.executable, *LAUNCHERS.get(script, ()), EXAMPLES / script, *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(pattern, done.stdout, re.DOTALL), done.stdout
