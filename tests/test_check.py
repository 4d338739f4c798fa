"""`flash-entmax check`: what is right passes, and what is wrong or does not repeat is reported."""

import json
import re
from itertools import count
from pathlib import Path

import pytest
import torch

from flash_entmax import entmax_attention
from flash_entmax.programs import check, check_speed
from flash_entmax.programs.cli import main

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "2026-11-29-h200-keys.json"
CASE = check.SelfCheckCase(
    heads=2, key_heads=1, query_length=20, key_length=30, head_size=8, value_size=4, transposed=True
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_result_passes(dtype):
    verdict = check.check("cpu", "torch", dtype, CASE)
    assert verdict.passed
    assert verdict.quantity in check.NAMES
    assert 0 < verdict.error <= verdict.budget < 1e-4


@pytest.mark.parametrize("name", check.NAMES)
def test_a_wrong_quantity_is_named(monkeypatch, name):
    """Each in turn is off by a thousandth."""
    right = check.output_and_gradients

    def wrong(inputs, case, impl):
        results = right(inputs, case, impl)
        if impl != "reference":
            results[check.NAMES.index(name)] *= 1.001
        return results

    monkeypatch.setattr(check, "output_and_gradients", wrong)
    verdict = check.check("cpu", "torch", torch.float32, CASE)
    assert (verdict.passed, verdict.quantity) == (False, name)
    assert verdict.error == pytest.approx(1e-3, rel=1e-2)


def test_a_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(
        check,
        "entmax_attention",
        lambda *tensors, impl, **options: (
            entmax_attention(*tensors, impl=impl, **options) * (1.0 if impl == "reference" else torch.nan)
        ),
    )
    assert not check.check("cpu", "torch", torch.float32, CASE).passed


def test_the_command_reports_what_does_not_repeat(monkeypatch, capsys):
    """Within the budget, but with other bits at every call."""
    calls = count(1)
    monkeypatch.setattr(check, "plan", lambda: iter([("cpu", "torch", torch.float32, CASE)]))
    monkeypatch.setattr(check_speed, "speed_check", lambda: None)
    assert main(["check"]) == 0
    assert "1 of 1 cases agree with the float64 reference" in capsys.readouterr().out
    monkeypatch.setattr(
        check,
        "entmax_attention",
        lambda *tensors, **options: entmax_attention(*tensors, **options) * (1 + 2e-7 * next(calls)),
    )
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "NOT REPEATABLE" in printed
    assert "0 of 1 cases agree" in printed
    assert "WRONG: do not rely on" in printed


H200 = check_speed.EXPECTED["NVIDIA H200"]["training step"]


@pytest.mark.parametrize(
    ("gpu", "entmax", "softmax", "words"),
    [
        ("NVIDIA H200", 1.2, 1.0, "^as expected"),
        ("NVIDIA H200", 0.5, 2.0, "^as expected"),
        ("NVIDIA H200", 2.0, 1.1, "^SLOW: 2.0 times as long as expected .* where softmax is not: please report"),
        ("NVIDIA H200", 2.0, 2.0, "^SLOW: 2.0 times .* softmax is slow as well: is this GPU shared"),
        ("NVIDIA L4", 9.0, 9.0, r"no figures of this GPU are kept \(it is 0.49 on an NVIDIA H200\)"),
    ],
)
def test_times_are_judged_in_words(gpu, entmax, softmax, words):
    """Both times as multiples of those that are expected of an H200."""
    times = check_speed.Times(entmax * H200.entmax, softmax * H200.softmax)
    assert re.search(words, check_speed.judged(gpu, "training step", times))


def test_expected_times_were_measured():
    content = json.loads(RESULTS.read_text())
    row = content["rows"]["4 topics, 8 heads of 64, 32768 tokens"]
    for name, kind in (("training step", "graph"), ("forward pass", "forward")):
        measured = check_speed.Times(row["ours"][kind], row["cudnn"][kind])
        assert check_speed.EXPECTED[content["conditions"]["gpu"]][name] == pytest.approx(measured, abs=5e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_are_measured():
    for name, times in check_speed.measured():
        assert name in check_speed.EXPECTED["NVIDIA H200"]
        assert 0.1 < times.quotient < 10


def test_what_is_not_measured_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_speed.speed_check()
    assert "speed: not measured: there is no GPU" in capsys.readouterr().out
