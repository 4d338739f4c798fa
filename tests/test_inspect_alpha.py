"""Where flash-entmax inspect finds alpha: among the options, in config.json, or among the weights; and what it says."""

import json
import shutil

import pytest
import torch
from inspect_command import entmax_llama, loss_of, run_command, saved_beside, shown_losses, words_of
from test_inspection import tiny_llama

from flash_entmax import entmax_attention, inspection
from flash_entmax.testing import iid_inputs


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
