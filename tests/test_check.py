"""`flash-entmax check`: what is right passes, and what is wrong or does not repeat is reported."""

from itertools import count

import pytest
import torch

from flash_entmax import entmax_attention
from flash_entmax.programs import check
from flash_entmax.programs.cli import main

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
