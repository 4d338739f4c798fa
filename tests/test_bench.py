"""`flash-entmax bench`: its files, its refusals, and the numbers that can be known beforehand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_entmax import entmax_attention, inspection
from flash_entmax.core.threshold import threshold_by_sort
from flash_entmax.programs.benchmarks import cold_start, competitors, gate, measure, refinement, roofline, speed
from flash_entmax.programs.benchmarks.cases import BenchCase
from flash_entmax.programs.benchmarks.settings import NAMES, settings_for
from flash_entmax.programs.cli import main
from flash_entmax.programs.files import write_json
from flash_entmax.testing import DISTRIBUTIONS, score_rows

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

CPU = {"device": "cpu", "out": Path("unused")}
SMALL_CASE = BenchCase(length=200, head_size=32, heads=4, key_heads=2, topics=4)


def bench(*arguments: str) -> int:
    return main(["bench", "--device", "cpu", "--smallest", *arguments])


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of one whole run."""
    folder = tmp_path_factory.mktemp("bench")
    assert bench("--out", str(folder)) == 0
    return folder


def test_files(finished):
    names = {"speed.json", "speed.png", "refinement.json", "refinement.png", "cold_start.json", "host.json"}
    assert {path.name for path in finished.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.glob("*.png"))


def test_conditions(finished):
    conditions = read(finished / "speed.json")["conditions"]
    expected = {"causal": True, "alpha": 1.5, "dtype": "float32", "torch": torch.__version__}
    assert conditions.items() >= expected.items()
    assert conditions["command"] == f"flash-entmax bench --device cpu --smallest --out {finished}"
    assert "median" in conditions["timing"]
    assert set(conditions["peers"]) == {"adasplash", "entmax"}


def test_speed_results(finished):
    results = read(finished / "speed.json")["results"]
    assert [result["topics"] for result in results] == [1, 4]
    assert results[0]["block_sparsity"] == 0 < results[1]["block_sparsity"]
    assert 0 < results[1]["key_density"] < results[0]["key_density"] <= 1
    for result in results:
        assert tuple(result["competitors"]) == NAMES
        for name in ("flash-entmax", "sdpa", "dense-entmax"):
            entry = result["competitors"][name]
            assert 0 < entry["forward_ms"] < entry["step_ms"]
            assert set(entry["errors"]) == set(gate.QUANTITIES)
        attained = result["roofline"]["step_ms"] / result["competitors"]["flash-entmax"]["step_ms"]
        assert result["roofline"]["attained"] == pytest.approx(attained)


def test_load_on_the_processor_slows_the_forward_pass_and_the_step_alike(monkeypatch):
    """A forward pass is half of its backward pass, whatever else runs: here more and more does."""
    seconds, load = 0.0, 1.0

    def work(amount: float) -> None:
        nonlocal seconds, load
        seconds, load = seconds + load * amount, 1.1 * load

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            work(1e-3)
            return query * 1

        @staticmethod
        def backward(ctx, grad_output):
            work(2e-3)
            return (grad_output,) * 3

    monkeypatch.setattr(measure, "perf_counter", lambda: seconds)
    inputs = tuple(torch.ones(1, requires_grad=True) for _ in range(3))
    settings = settings_for(**CPU, smallest=True)
    times = measure.forward_and_step(Product.apply, inputs, torch.ones(1), settings)
    assert times["step_ms"] == pytest.approx((1 + 2 * 1.1) * times["forward_ms"])


def test_reasons_of_those_that_cannot_run(finished):
    for result in read(finished / "speed.json")["results"]:
        for name in ("flash-attention-2", "cudnn", "flex-attention", "adasplash"):
            assert result["competitors"][name] == {"why_not": "runs on NVIDIA GPUs, this run is on cpu"}
    assert "plain PyTorch" in read(finished / "cold_start.json")["results"]["why_not"]
    assert "on a CPU" in read(finished / "host.json")["results"]["why_not"]


def test_reasons_are_printed_once(capsys, tmp_path):
    assert bench("--out", str(tmp_path), "--parts", "memory", "--only", "cudnn", "--topics", "1", "2") == 0
    assert capsys.readouterr().out.count("cuDNN: not run: runs on NVIDIA GPUs") == 1


@pytest.mark.parametrize("name", ["flash-entmax", "sdpa"])
def test_a_wrong_result_is_never_timed(name, monkeypatch, tmp_path, capsys):
    """A competitor that scales its output by 1.2 is reported by its error; only ours makes the command fail."""

    def wrong(prepare):
        def prepare_wrong(case, inputs):
            ready = prepare(case, inputs)
            return replace(ready, attend=lambda *tensors: 1.2 * ready.attend(*tensors))

        return prepare_wrong

    changed = [replace(one, prepare=wrong(one.prepare)) if one.name == name else one for one in competitors.COMPETITORS]
    monkeypatch.setattr(competitors, "COMPETITORS", tuple(changed))
    only = "flash-entmax", "sdpa"
    status = bench("--out", str(tmp_path), "--parts", "speed", "--topics", "1", "--only", *only)
    assert status == (1 if name == "flash-entmax" else 0)
    entries = read(tmp_path / "speed.json")["results"][0]["competitors"]
    assert "relative error 0.2 of the output" in entries[name]["wrong"]
    assert not {"forward_ms", "step_ms", "memory_mib"} & entries[name].keys()
    assert "step_ms" in entries[only[1 - only.index(name)]]
    assert "WRONG: relative error 0.2" in capsys.readouterr().out


def test_a_wrong_gradient_is_refused():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    settings = settings_for(**CPU)
    inputs = speed.inputs_of(SMALL_CASE, settings)
    truth = gate.Truth(SMALL_CASE, inputs, torch.randn_like(inputs[0]))
    ours = competitors.COMPETITORS[0].prepare(SMALL_CASE, inputs).attend
    assert not truth.judge(ours, 1.5, is_ours=True).wrong
    verdict = truth.judge(lambda query, key, value: ours(query, Half.apply(key), value), 1.5, is_ours=False)
    assert verdict.wrong.startswith("relative error 0.5 of the gradient of key")
    assert truth.judge(lambda *tensors: torch.nan * ours(*tensors), 1.5, is_ours=False).wrong


def test_the_gate_of_long_sequences_checks_the_last_rows(monkeypatch):
    """Only they have a gradient then, which every key still receives; slices of rows do not change the results."""
    settings = settings_for(**CPU)
    inputs = speed.inputs_of(SMALL_CASE, settings)
    grad_output = torch.randn_like(inputs[0])
    monkeypatch.setattr(gate, "EVERY_ROW", 100)
    monkeypatch.setattr(gate, "LAST_ROWS", 30)
    whole = gate.Truth(SMALL_CASE, inputs, grad_output)
    monkeypatch.setattr(gate, "SLICE_SCORES", 7 * 200 * 2)
    sliced = gate.Truth(SMALL_CASE, inputs, grad_output)
    assert whole.results(1.5)[0].shape == (1, 2, 30, 32)
    for one, other in zip(whole.results(1.5), sliced.results(1.5), strict=True):
        torch.testing.assert_close(one, other)
    ours = competitors.COMPETITORS[0].prepare(SMALL_CASE, inputs).attend
    assert not sliced.judge(ours, 1.5, is_ours=True).wrong


def test_a_competitor_that_breaks_down_leaves_the_others(monkeypatch, tmp_path):
    def breaks(case, inputs):
        raise RuntimeError("no kernel\nand many more lines")

    changed = [replace(one, prepare=breaks) if one.name == "sdpa" else one for one in competitors.COMPETITORS]
    monkeypatch.setattr(competitors, "COMPETITORS", tuple(changed))
    only = "flash-entmax", "sdpa"
    assert bench("--out", str(tmp_path), "--parts", "speed", "--topics", "1", "--only", *only) == 0
    entries = read(tmp_path / "speed.json")["results"][0]["competitors"]
    assert entries["sdpa"] == {"failed": "RuntimeError: no kernel"}
    assert "step_ms" in entries["flash-entmax"]


def test_support_that_fails_leaves_the_competitors(monkeypatch, tmp_path, capsys):
    def fails(*tensors, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "entmax_attention", fails)
    assert bench("--out", str(tmp_path), "--parts", "speed", "roofline", "--topics", "1", "--only", "sdpa") == 0
    result = read(tmp_path / "speed.json")["results"][0]
    assert result["block_sparsity"] is result["key_density"] is None
    assert result["support_failed"] == "RuntimeError: out of memory"
    assert "step_ms" in result["competitors"]["sdpa"]
    assert "support not measured: RuntimeError: out of memory" in capsys.readouterr().out


def test_block_sparsity_counts_visible_tiles():
    """3 x 5 tiles of 64 x 32 at 130 tokens: rows 0-63 reach 2 tiles of keys, 64-127 reach 4, 128-129 all 5."""
    tiles = torch.zeros(1, 2, 3, 5, dtype=torch.bool)
    tiles[..., 0] = True
    support = SimpleNamespace(tiles=tiles, tile_shape=(64, 32), size=torch.ones(1, 2, 130))
    assert speed.block_sparsity(support) == pytest.approx(1 - 3 / 11)


def test_key_density_counts_visible_keys():
    """130 tokens, tiles of 64 queries: they see 64, 128 and 130 keys; the heads reach 1 + 2 + 3 and 4 + 5 + 6."""
    keys = torch.tensor([[[1, 2, 3], [4, 5, 6]]], dtype=torch.int32)
    tiles = torch.zeros(1, 2, 3, 5, dtype=torch.bool)
    support = SimpleNamespace(tiles=tiles, keys=keys, tile_shape=(64, 32), size=torch.ones(1, 2, 130))
    assert speed.key_density(support) == pytest.approx(21 / (2 * 322))


def test_densities_are_those_of_a_recorded_call():
    settings = settings_for(**CPU)
    inputs = speed.inputs_of(SMALL_CASE, settings)
    with inspection.record() as calls:
        entmax_attention(*inputs, is_causal=True)
    facts = speed.facts_of(SMALL_CASE, inputs)
    assert facts["block_sparsity"] == pytest.approx(calls[0].block_sparsity.mean().item())
    assert facts["key_density"] == pytest.approx(calls[0].key_density.mean().item())
    assert 0 < facts["key_density"] < 1 - facts["block_sparsity"]


def test_a_cold_start_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(cold_start.sys, "executable", "/bin/false")
    assert cold_start.measure("flash-entmax") == {"failed": "no message"}


def test_results_are_written_after_each_case(monkeypatch, tmp_path):
    """A run that is stopped in its second case keeps the first."""
    measure_case = speed.measure_case

    def stops(case, *rest):
        if case.topics == 2:
            raise KeyboardInterrupt
        return measure_case(case, *rest)

    monkeypatch.setattr(speed, "measure_case", stops)
    assert bench("--out", str(tmp_path), "--parts", "speed", "--topics", "1", "2", "--only", "sdpa") == 130
    assert [result["topics"] for result in read(tmp_path / "speed.json")["results"]] == [1]


def test_write_json_replaces(tmp_path):
    for number in (1, 2):
        write_json(tmp_path / "a.json", {"number": number})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read(tmp_path / "a.json") == {"number": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "0"], "--lengths must be at least 1, got 0"),
        (["--head-sizes", "600"], "--head-sizes must be from 1 to 512, got 600"),
        (["--topics", "40"], "--topics must be at most the head size, got 40 at head size 32"),
        (["--groups", "3"], "--groups must divide the 2 heads at length 256, got 3"),
        (["--only", "cudnn", "fa9"], "got 'fa9'"),
        (["--parts", "sped"], "got 'sped'"),
        (["--copies", "10"], "--copies 10 is for the heads of captured inputs: it needs --inputs FILE"),
        (["--copies", "0"], "--copies must be at least 1, got 0"),
        (["--side-by-side"], "--side-by-side is for the heads of captured inputs: it needs --inputs FILE"),
        (["--parts", "roofline"], "--parts roofline: roofline compares with the measured time"),
    ],
)
def test_errors_quote_what_was_passed(arguments, said, capsys):
    assert bench(*arguments) == 1
    assert said in capsys.readouterr().err


def test_a_word_for_a_number_is_quoted(capsys):
    with pytest.raises(SystemExit):
        bench("--lengths", "4k")
    assert "'4k'" in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    assert bench("--out", str(path), "--parts", "memory") == 1
    assert str(path) in capsys.readouterr().err


def cuda_settings(monkeypatch, **options):
    """The settings of a GPU run; nothing here touches one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return settings_for("cuda", Path("unused"), **options)


def test_the_default_grid_of_a_gpu(monkeypatch):
    cases = cuda_settings(monkeypatch).cases
    assert len(set(cases)) == len(cases)
    assert {case.topics for case in cases if case.length == 4096} == {1, 2, 4, 10, 20}
    assert {case.topics for case in cases if case.length >= 65536} == {4, 20}
    assert {case.head_size for case in cases if case.length == 131072} == {64}
    assert {case.heads for case in cases if case.length <= 8192} == {16}
    assert {case.heads for case in cases if case.length > 8192} == {8}
    assert {case.length for case in cases if case.group == 4} == {8192, 32768}


def test_flags_replace_their_part_of_the_grid(monkeypatch):
    cases = cuda_settings(monkeypatch, lengths=[131072], head_sizes=[128], topics=[1], groups=[2]).cases
    assert cases == (BenchCase(131072, 128, 8, 4, 1),)


@pytest.mark.parametrize(
    ("case", "asked", "said"),
    [
        (BenchCase(65536, 64, 8, 8, 4), (), "over 32,768"),
        (BenchCase(3000, 64, 8, 8, 4), (), "powers of two"),
        (BenchCase(8192, 48, 8, 8, 4), (), "head sizes"),
        (BenchCase(8192, 64, 16, 4, 4), (), "--only"),
        (BenchCase(8192, 64, 16, 4, 4), ("adasplash",), ""),
        (BenchCase(32768, 128, 8, 8, 4), (), ""),
        (BenchCase(4096, 128, 16, 16, 4), (), "--only"),
    ],
)
def test_what_adasplash_takes(case, asked, said, monkeypatch):
    settings = cuda_settings(monkeypatch, only=asked)
    monkeypatch.setattr(competitors, "find_spec", lambda name: name)
    reason = competitors.why_not_adasplash(case, settings)
    assert said in reason
    assert bool(said) == bool(reason)
    monkeypatch.setattr(competitors, "find_spec", lambda name: None)
    assert competitors.why_not_adasplash(case, settings) == "the package adasplash is not installed"


def test_two_configurations_are_kept():
    def config(warps, stages, **kwargs):
        return SimpleNamespace(num_warps=warps, num_stages=stages, kwargs=kwargs)

    plain = [config(warps, stages) for warps in (2, 4) for stages in (2, 3, 4)]
    assert competitors.two_of(plain) == [plain[3], plain[4]]
    tiled = [config(4, s, BLOCK_M=m, BLOCK_N=n) for m, n in ((128, 128), (128, 64), (64, 64)) for s in (2, 3)]
    assert competitors.two_of(tiled) == tiled[2:4]
    assert competitors.two_of(plain[:3]) == plain[:2]


def test_dense_entmax_needs_memory(monkeypatch):
    monkeypatch.setattr(competitors, "free_memory", lambda device: 2.0**30)
    settings = settings_for(**CPU)
    assert competitors.why_not_dense(BenchCase(2048, 64, 4, 4, 1), settings) == ""
    assert competitors.why_not_dense(BenchCase(4096, 64, 4, 4, 1), settings) == "needs about 4 GiB, 1 GiB are free"
    assert "up to length 8,192" in competitors.why_not_dense(BenchCase(16384, 64, 4, 4, 1), settings)


def test_the_causal_block_mask_is_that_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    built = competitors.causal_block_mask(512, torch.device("cpu"))
    known = create_block_mask(competitors.is_visible, None, None, 512, 512, device="cpu")
    assert torch.equal(built.to_dense(), known.to_dense())
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        number = getattr(known, counts)
        assert torch.equal(getattr(built, counts), number)
        used = torch.arange(number.shape[-1]) < number.unsqueeze(-1)
        assert torch.equal(getattr(built, indices)[used], getattr(known, indices)[used])
    assert built.seq_lengths == known.seq_lengths


def test_roofline():
    """2 heads of 4, 8 tokens: a product has 2 * 8^2 * 4 = 512 flop, at 512 flop/s one second."""
    case = BenchCase(length=8, head_size=4, heads=2, key_heads=1, topics=1)
    assert roofline.product_flop(case) == 512
    assert roofline.floor(case, 0.0, 0.0, 512.0) == (1000.0, 1000.0)
    assert roofline.floor(case, 1.0, 0.0, 512.0) == (2000.0, 2000.0)
    assert roofline.floor(case, 1.0, 1.0, 512.0) == (5000.0, 12000.0)
    assert roofline.floor(case, 0.5, 0.25, 1024.0) == (1125.0, 2000.0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_method_finds_tau(distribution):
    z = score_rows(distribution, 2000, rows=64)
    maximum, exact = threshold_by_sort(z, 1.5)
    rows = refinement.Rows(z)
    for method in refinement.METHODS:
        refined = refinement.refine(method, rows)
        distance = (z - maximum.unsqueeze(-1) + refined.offset.unsqueeze(-1)).clamp_min(0)
        assert (distance.square().sum(-1) - 1).abs().max() <= 1.01 * refinement.TOLERANCE
        torch.testing.assert_close(refined.offset, exact, rtol=1e-5, atol=0, msg=lambda m, n=method.name: f"{n}: {m}")


def test_refinement_counts(finished):
    content = read(finished / "refinement.json")
    assert content["tolerance"] == 1e-6
    most = {"bisection": 30, "halley": 8, "uniform-bins": 6, "geometric-bins": 6, "certified": 6, "certified-newton": 6}
    assert set(content["methods"]) == set(most)
    for result in content["results"]:
        assert result["mean_steps"] <= result["mean_steps_of_tile"] <= result["worst_steps"] <= most[result["method"]]
    steps = {name: [r["mean_steps"] for r in content["results"] if r["method"] == name] for name in most}
    mean = {name: sum(counts) / len(counts) for name, counts in steps.items()}
    assert mean["bisection"] > 20
    assert mean["certified"] < 2.5
    assert 3 < mean["halley"] < 5
