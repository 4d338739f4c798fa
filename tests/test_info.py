"""`flash-entmax info`: it says what is here, where caches are, and what to try."""

from pathlib import Path

import pytest
import torch

import flash_entmax
from flash_entmax.programs import info
from flash_entmax.programs.cli import main

CPU = info.Facts(
    has_gpu=False,
    has_driver=False,
    is_cpu_build=False,
    obstacle="",
    has_compiler=True,
    has_headers=True,
    unwritable={},
    interpreted=False,
)
GPU = CPU._replace(has_gpu=True, has_driver=True)
HINTS = {
    "there is no GPU": CPU,
    "install a torch for CUDA": CPU._replace(has_driver=True, is_cpu_build=True),
    "does CUDA_VISIBLE_DEVICES hide it": CPU._replace(has_driver=True),
    "plain PyTorch is slow there: the kernels need Triton 3.6": GPU._replace(obstacle="the kernels need Triton 3.6"),
    "unset it": GPU._replace(interpreted=True),
    "install gcc": GPU._replace(has_compiler=False),
    "python3-dev": GPU._replace(has_headers=False),
    "/full cannot be written: let TRITON_CACHE_DIR name": GPU._replace(unwritable={"triton": Path("/full")}),
}


@pytest.mark.parametrize("words", HINTS)
def test_a_cause_is_named_before_anything_else(words):
    first, *others = info.hints(HINTS[words])
    assert words in first
    assert not any(words in other for other in others)
    assert all(word not in " ".join(info.hints(GPU)) for word in HINTS)


def test_the_command_says_what_is_here(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_PRINT_AUTOTUNING", "1")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for said in (
        flash_entmax.__version__,
        torch.__version__,
        "TRITON_PRINT_AUTOTUNING  1",
        *map(str, info.caches().values()),
    ):
        assert said in printed
    assert printed.count("torch   ") >= len(info.DTYPES)  # the lines of the CPU
    assert printed.index("what to try") > printed.index("impl='auto' takes")


def test_caches_are_those_of_triton_and_inductor(monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    knobs = pytest.importorskip("triton.knobs")
    for home in (None, tmp_path):
        for folder in (None, tmp_path / "kernels"):
            for name, value in (("TRITON_HOME", home), ("TRITON_CACHE_DIR", folder)):
                monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
            assert info.caches()["triton"] == Path(knobs.cache.dir)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    assert info.caches()["inductor"] == Path(cache_dir())


def test_what_a_cache_holds(tmp_path):
    (tmp_path / "kernel").write_bytes(bytes(2 * info.MIB))
    assert info.state_of_cache(tmp_path) == "1 files, 2 MiB"
    assert info.state_of_cache(tmp_path / "new" / "folder") == "empty"
    assert info.state_of_cache(tmp_path / "kernel" / "folder") == "cannot be written"
