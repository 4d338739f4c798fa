"""How long a new process with empty caches takes to its first forward and backward, and what a new length costs after.

The parent gives a child empty cache folders for Triton and Inductor; the child (`python -m` of this module) counts the
compiled kernels as the .cubin files in its Triton cache. The clock starts before the child does, so Python, the imports
and the start of CUDA are in the total; each has its own line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .settings import ADASPLASH, OURS, BenchSettings

FIRST_LENGTH = 1024
MORE_LENGTHS = {OURS: (2048, 1000, 4096), ADASPLASH: (2048, 4096)}
HEADS, HEAD_SIZE, TOPICS = 8, 64, 4
LIMIT_SECONDS = 400


def why_not(settings: BenchSettings) -> str:
    if not settings.on_cuda:
        return "no kernels are compiled on the CPU path: plain PyTorch runs there"
    return "" if names_of(settings) else f"only {' and '.join(MORE_LENGTHS)} have one, --only names neither"


def names_of(settings: BenchSettings) -> list[str]:
    """Ours, and AdaSplash-2 where --only asks for it: it compiles for minutes."""
    return [name for name in MORE_LENGTHS if name in (settings.asked or (OURS,))]


def measure(name: str) -> dict:
    """Run the child; its report, or why there is none."""
    root = str(Path(__file__).resolve().parents[3])
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        environment = os.environ | caches | {"PYTHONPATH": path}
        command = [sys.executable, "-m", "flash_entmax.programs.benchmarks.cold_start", name, repr(time.time())]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LIMIT_SECONDS} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, started: float) -> dict:
    """Forward and backward at the first length, then at the others, in this new process."""
    import torch

    from .cases import BenchCase
    from .competitors import COMPETITORS

    competitor = next(one for one in COMPETITORS if one.name == name)
    imported = time.time()
    torch.zeros(1, device="cuda")
    device_ready = time.time()
    report = {"imports_s": imported - started, "cuda_s": device_ready - imported}
    before = kernels()
    case = BenchCase(FIRST_LENGTH, HEAD_SIZE, HEADS, HEADS, TOPICS)
    attend = competitor.prepare(case, ()).attend
    run_once(attend, FIRST_LENGTH)
    report |= {
        "first_step_s": time.time() - device_ready,
        "total_s": time.time() - started,
        "kernels": kernels() - before,
        "lengths": [],
    }
    for length in MORE_LENGTHS[name]:
        before, start = kernels(), time.time()
        run_once(attend, length)
        report["lengths"].append({"length": length, "seconds": time.time() - start, "kernels": kernels() - before})
    return report


def run_once(attend, length: int) -> None:
    import torch

    from flash_entmax.testing import topic_inputs

    inputs = topic_inputs(1, HEADS, length, HEAD_SIZE, TOPICS, dtype=torch.bfloat16, device="cuda")
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    output = attend(*inputs)
    torch.autograd.grad(output, inputs, torch.randn_like(output))
    torch.cuda.synchronize()


def kernels() -> int:
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], float(sys.argv[2]))))
