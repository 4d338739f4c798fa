"""The command line, started in each way that Python has."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["flash_entmax", "flash_entmax.programs.cli"])
def test_the_command_line_runs_as_a_module(module, tmp_path):
    """It does what was asked, and its exit status says whether it could."""
    text = tmp_path / "text.txt"
    wrong = [sys.executable, "-m", module, "inspect", "./nowhere", "--text", str(text), "--out", str(tmp_path / "out")]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("flash-entmax inspect: ")
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("usage: flash-entmax ")
