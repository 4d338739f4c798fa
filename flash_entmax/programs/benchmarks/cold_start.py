"""How long a new process with empty caches takes to its first training step, and what a new length costs afterwards.

The parent starts a child (`python -m` of this module) with empty cache folders for Triton and Inductor. The child
counts compiled kernels as the .cubin files in its Triton cache. The clock starts before the child does. The total
therefore includes Python, the imports and the start of CUDA; the imports and CUDA have lines of their own.
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
    """Why nothing is measured; empty if something is."""
    if not settings.on_cuda:
        return "no kernels are compiled on the CPU path: plain PyTorch runs there"
    return "" if names_of(settings) else f"only {' and '.join(MORE_LENGTHS)} have one, --only names neither"


def names_of(settings: BenchSettings) -> list[str]:
    """Ours. AdaSplash-2, which compiles for minutes, only if --only names it."""
    return [name for name in MORE_LENGTHS if name in (settings.asked or (OURS,))]


def measure(name: str) -> dict:
    """Run the child, and return its report, or why there is none."""
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
    """Time a training step at the first length, then at the others, in this new process."""
    import torch

    from .cases import BenchCase
    from .competitors import COMPETITORS

    competitor = next(competitor for competitor in COMPETITORS if competitor.name == name)
    imported = time.time()
    torch.zeros(1, device="cuda")
    device_ready = time.time()
    report = {"imports_s": imported - started, "cuda_s": device_ready - imported}
    kernels_at_start = kernels()
    case = BenchCase(FIRST_LENGTH, HEAD_SIZE, HEADS, HEADS, TOPICS)
    attend = competitor.prepare(case, ()).attend
    run_once(attend, FIRST_LENGTH)
    report |= {
        "first_step_s": time.time() - device_ready,
        "total_s": time.time() - started,
        "kernels": kernels() - kernels_at_start,
        "lengths": [],
    }
    for length in MORE_LENGTHS[name]:
        kernels_at_start, start = kernels(), time.time()
        run_once(attend, length)
        seconds = time.time() - start
        report["lengths"].append({"length": length, "seconds": seconds, "kernels": kernels() - kernels_at_start})
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
    """How many kernels were compiled so far."""
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], float(sys.argv[2]))))
