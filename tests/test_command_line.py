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


def test_an_interruption_is_one_line(monkeypatch, capsys):
    from flash_entmax.programs import cli, recipes

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "check_arms", interrupted)
    assert cli.main(["recipe", "sort", "--size", "toy", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "flash-entmax recipe: interrupted: the same command goes on from what is done\n"


def test_a_reader_may_close_the_output():
    """As `flash-entmax info | head -1` does."""
    command = [sys.executable, "-m", "flash_entmax", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


def test_what_cannot_be_written_is_one_line(monkeypatch, capsys):
    from flash_entmax.programs import cli, recipes

    def full(*_):
        raise OSError(28, "No space left on device", "out/file")

    monkeypatch.setattr(recipes, "check_arms", full)
    assert cli.main(["recipe", "sort", "--size", "toy", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "flash-entmax recipe: out/file: No space left on device\n"
