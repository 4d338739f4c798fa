"""The kernels of a training step under other launch settings than those of schedule.py.

python benchmarks/launch_settings.py FILE takes two minutes on a GPU. FILE holds one captured head of 64, as
`flash-entmax bench --inputs` reads it; benchmarks/keys.py says what is made of it. Beside it, synthetic inputs that are
sparse by tile. Every setting is given at once to scan, mark, solve, output and the gradients: warps of a program,
stages of its pipeline, and how many programs of 128 threads the registers leave room for (0: no limit). All are
compiled first, in many processes, and then timed one after another. Milliseconds are means of five steps by PyTorch's
profiler. A line for each kernel says what it takes as shipped, and with the best settings. All of it goes to
FOLDER/launch-settings.json with --out FOLDER.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from keys import captured, kernels
from torch import Tensor

from flash_entmax import entmax_attention
from flash_entmax.backends.triton import launch, plan, schedule
from flash_entmax.backends.triton.config import Config
from flash_entmax.operators import dispatch
from flash_entmax.programs.recipes.workers import cores
from flash_entmax.testing import topic_inputs

KERNELS = "scan", "mark", "solve", "output", "gradient_query", "gradient_key_value"
RULES = "scan_settings", "mark_settings", "solve_settings", "output_settings"
SHIPPED = {rule: getattr(schedule, rule) for rule in RULES}
SHORT, LONG = 4_096, 32_768


class Setting(NamedTuple):
    warps: int
    stages: int
    programs: int  # that share a multiprocessor; 0 where registers have no limit

    def rule(self, config: Config) -> schedule.LaunchSettings:
        limit = schedule.registers(config, self.programs) if self.programs else None
        return schedule.LaunchSettings(self.warps, self.stages, limit)


SETTINGS = tuple(Setting(*numbers) for numbers in product((4, 8), (2, 3, 4), (0, 3, 4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    conditions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(conditions, flush=True)
    with ProcessPoolExecutor(min(cores(), len(SETTINGS) + 1), get_context("spawn")) as pool:
        unfit = {setting for setting, fits in zip(SETTINGS, pool.map(compiles, SETTINGS), strict=True) if not fits}
        list(pool.map(compiles, [None]))
    rows = {}
    for name, inputs, scale in inputs_of(args.file):
        rows[name] = {"shipped": timed(None, inputs, scale)}
        rows[name] |= {str(tuple(each)): timed(each, inputs, scale) for each in SETTINGS if each not in unfit}
        report(name, rows[name])
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        numbers = {"conditions": conditions, "unfit": sorted(unfit), "rows": rows}
        (args.out / "launch-settings.json").write_text(json.dumps(numbers, indent=1))


def inputs_of(file: Path) -> list[tuple[str, list[Tensor], float | None]]:
    """(name, query, key and value, scale): the captured head at full length, and topics; heads of 64 and 128."""
    made = [(name, inputs, scale) for name, inputs, scale in captured(file) if inputs[0].shape[2] == LONG]
    for dim in (64, 128):
        topics = topic_inputs(1, 8, LONG, dim, 20, dtype=torch.bfloat16, device="cuda")
        made.append((f"20 topics, 8 heads of {dim}, {LONG} tokens", topics, None))
    return made


def use(setting: Setting | None) -> None:
    """Launch with this setting from here on; None: as shipped."""
    for rule, shipped in SHIPPED.items():
        setattr(schedule, rule, shipped if setting is None else setting.rule)
    read_settings_again()


def read_settings_again() -> None:
    """From here on, every launch asks for its settings."""
    launch.CAN_BE_DIRECT = False
    launch.launcher_of.cache_clear()
    plan.plan_of.cache_clear()
    dispatch.kept.clear()


def step_of(inputs: list[Tensor], scale: float | None):
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    attend = partial(entmax_attention, query, key, value, is_causal=True, scale=scale)
    grad_output = torch.randn_like(query)
    return lambda: torch.autograd.grad(attend(), (query, key, value), grad_output)


def compiles(setting: Setting | None) -> bool:
    """Compile everything for a setting, in the cache on the disk. False where a kernel does not fit the GPU."""
    use(setting)
    try:
        for dim in (64, 128):
            step_of(topic_inputs(1, 8, SHORT, dim, 4, dtype=torch.bfloat16, device="cuda"), None)()
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources:
        return False
    return True


def timed(setting: Setting | None, inputs: list[Tensor], scale: float | None) -> dict[str, float]:
    """Milliseconds of each kernel of a step."""
    use(setting)
    step = step_of(inputs, scale)
    for _ in range(3):
        step()
    return kernels(step)


def report(name: str, row: dict[str, dict[str, float]]) -> None:
    print(f"{name}: kernel, ms as shipped, the three best settings (warps, stages, programs)", flush=True)
    for kernel in KERNELS:
        shipped = row["shipped"][kernel]
        others = sorted((times[kernel], setting) for setting, times in row.items() if setting != "shipped")
        print(f"    {kernel:24} {shipped:.3f}  " + "  ".join(f"{ms:.3f} {setting}" for ms, setting in others[:3]))


if __name__ == "__main__":
    main()
