"""Triton's compiler takes every kernel, for GPUs that need not be there, within their shared memory."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import HAS_CUDA, THIRD

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    "summary_kernel", "scan_kernel", "certify_kernel", "list_queries_kernel", "mark_kernel", "solve_kernel",
    "output_kernel", "gradient_query_kernel", "reaching_kernel", "share_kernel", "gradient_key_value_kernel",
    "add_parts_kernel", "support_kernel", "tangent_kernel", "row_maxima_kernel", "sums_kernel", "output_at_kernel",
    "decode_scores_kernel", "decode_solve_kernel", "decode_parts_kernel", "append_kernel", "block_bounds_kernel",
    "rounded_scores_kernel", "rounded_solve_kernel",
}  # fmt: skip
KERNELS_OF_ROWS = {"entmax_kernel", "entmax_backward_kernel", "loss_kernel", "loss_backward_kernel"}
MOST_NARROW_LOADS = 1  # of 2 bytes. A tile of 16-bit numbers loaded so takes 64: it is to come by 16 bytes at a time
SMALLEST_SHARED = 99 * 1024  # of GPUs of capability 8.6 and 8.9; 8.0 has 163 KiB, 9.0 has 227
# Each takes a core minutes: without a GPU the default runs every day, and one of the others in turn.
DEFAULT = (90, "bfloat16", 64, 1.5, ())
OTHERS = [
    (80, "float16", 128, 1.3, ()),
    (90, "float32", 64, 1.2, ()),
    (80, "bfloat16", 128, 2.0, ("everything",)),
]
ROWS = [(90, "bfloat16", 131_072, 1.5, ("rows",)), (80, "float32", 1_000, 1.3, ("rows",))]


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize(
    ("capability", "dtype", "size", "alpha", "options"),
    [DEFAULT, *(OTHERS if HAS_CUDA else [OTHERS[THIRD]]), *ROWS],
)
def test_every_kernel_compiles(capability, dtype, size, alpha, options, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability), dtype, str(size), str(alpha), *options],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    shared = {name: int(size) for name, size, _ in lines}
    options_kernels = {(): KERNELS, ("everything",): KERNELS | {"bounds_kernel"}, ("rows",): KERNELS_OF_ROWS}
    assert shared.keys() == options_kernels[options]
    assert max(shared.values()) <= SMALLEST_SHARED
    if options != ("rows",):  # one row's numbers may start anywhere
        assert {name: int(loads) for name, _, loads in lines if int(loads) > MOST_NARROW_LOADS} == {}
