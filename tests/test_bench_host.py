"""`flash-entmax bench --parts host`: its ways to call, and its table."""

from pathlib import Path

import pytest
import torch

from flash_entmax.programs.benchmarks import host
from flash_entmax.programs.benchmarks.settings import settings_for

report = pytest.importorskip("flash_entmax.programs.benchmarks.report", reason="rich is not installed")


@pytest.fixture
def few_calls(monkeypatch):
    for name, number in {"SHAPE": (1, 1, 16, 8), "WARMUP": 1, "CALLS": 3}.items():
        monkeypatch.setattr(host, name, number)


@pytest.mark.parametrize("way", [host.step, host.step_in_one_thread])
@pytest.mark.parametrize("name", host.ATTEND)
def test_a_step_is_the_gradient_of_a_call(name, way):
    inputs = tuple(torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    grad_output = torch.randn_like(inputs[0])
    expected = torch.autograd.grad(host.ATTEND[name](*inputs), inputs, grad_output)
    torch.testing.assert_close(way(host.ATTEND[name], inputs, grad_output)(), expected)


def test_the_forward_pass_has_no_gradient():
    inputs = tuple(torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    assert not host.forward(host.ATTEND["sdpa"], inputs, inputs[0])()[0].requires_grad


def test_the_table_has_all_ways_and_says_what_failed(few_calls, monkeypatch, capsys):
    def no_gpu(*_):
        raise RuntimeError("no graph here\nand more")

    monkeypatch.setattr(host, "WAYS", {"forward": host.forward, "graph": no_gpu})
    content = host.measure(settings_for(device="cpu", out=Path("unused")))
    assert content["forward"]["sdpa"]["microseconds"] > 0
    assert content["graph"]["sdpa"] == {"failed": "RuntimeError: no graph here"}
    report.print_host(report.Console(width=200), content)
    text = capsys.readouterr().out
    assert "flash-entmax, graph: failed: RuntimeError: no graph here" in text
    assert text.count("failed") == 4
