"""Decoding under other launch settings of the kernels that read the keys.

python benchmarks/decode_settings.py takes two minutes on a GPU. A setting is: warps of a program, stages of its
pipeline, and how many programs a multiprocessor is given. Keys are 16-bit in one piece, 16-bit in pages of 16, and in 8
bits. All settings are compiled first, in many processes, and then timed one after another. Times are those of calls in
CUDA graphs, in microseconds, on the inputs of benchmarks/decode.py. There is a line for each kind and size: as shipped,
and the five best settings. All of it goes to FOLDER/decode-settings.json with --out FOLDER.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from decode import BEYOND_CACHES, in_pages, time_of_graph
from launch_settings import read_settings_again
from torch import Tensor

from flash_entmax import KeySummaries, entmax_attention, entmax_attention_paged
from flash_entmax.backends.triton import schedule
from flash_entmax.backends.triton.config import Config
from flash_entmax.programs.recipes.workers import cores
from flash_entmax.testing import decoding_inputs

HEADS, KEY_HEADS, DIM = 32, 8, 128
SIZES = (1, 8_192), (1, 32_768), (1, 131_072), (16, 8_192), (16, 32_768)  # batch, keys
RULES = "decode_scores_settings", "rounded_scores_settings"
PROGRAMS = "scoring_programs", "rounded_scoring_programs"
SHIPPED = {name: getattr(schedule, name) for name in RULES + PROGRAMS}


class Setting(NamedTuple):
    warps: int
    stages: int
    programs: int

    def rule(self, config: Config) -> schedule.LaunchSettings:
        return schedule.LaunchSettings(self.warps, 2 * self.stages - 1 if config.PAGE else self.stages)

    def of(self, name: str):
        """What stands in for a rule of schedule.py."""
        if name in PROGRAMS:
            return lambda config: self.programs
        return self.rounded_rule if name == "rounded_scores_settings" else self.rule

    def rounded_rule(self, config: Config) -> schedule.LaunchSettings:
        """With registers for all programs of a multiprocessor, as the shipped rule has them."""
        limit = schedule.registers(config, max(1, self.programs * self.warps // 4))
        return schedule.LaunchSettings(self.warps, self.stages, limit)


SETTINGS = tuple(Setting(*numbers) for numbers in product((1, 2, 4), (2, 3, 4), (2, 4, 6, 8, 12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    conditions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(conditions, flush=True)
    to_compile = [None, *dict.fromkeys(setting._replace(programs=2) for setting in SETTINGS)]
    with ProcessPoolExecutor(min(cores(), len(to_compile)), get_context("spawn")) as pool:
        list(pool.map(compile_all, to_compile))
    rows = {}
    for batch, keys in SIZES:
        for kind, call in calls(batch, keys).items():
            name = f"{batch} x {keys}, {kind}"
            rows[name] = {"shipped": timed(None, call)}
            rows[name] |= {str(tuple(setting)): timed(setting, call) for setting in SETTINGS}
            best = sorted((time, setting) for setting, time in rows[name].items())[:5]
            found = "  ".join(f"{time:.1f} {setting}" for time, setting in best)
            print(f"{name}: shipped {rows[name]['shipped']:.1f}; {found}", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode-settings.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))


def calls(batch: int, keys: int) -> dict[str, list[Callable[[], Tensor]]]:
    """Calls of each kind, each with tensors of its own: so many that no cache holds their keys, in 8 bits either."""
    kinds: dict[str, list[Callable[[], Tensor]]] = {"one piece": [], "pages of 16": [], "8 bits": []}
    for seed in range(max(2, BEYOND_CACHES // (batch * KEY_HEADS * keys * DIM))):
        inputs = decoding_inputs(
            batch, HEADS, keys, DIM, queries=1, key_heads=KEY_HEADS, dtype=torch.bfloat16, device="cuda", seed=seed
        )
        kinds["one piece"].append(partial(entmax_attention, *inputs))
        kinds["pages of 16"].append(partial(entmax_attention_paged, *in_pages(*inputs)))
        kinds["8 bits"].append(partial(entmax_attention, *inputs, key_summary=KeySummaries.of(inputs[1])))
    return kinds


def use(setting: Setting | None) -> None:
    """Launch with this setting from here on; None: as shipped."""
    for name, shipped in SHIPPED.items():
        setattr(schedule, name, shipped if setting is None else setting.of(name))
    read_settings_again()


@torch.no_grad()
def compile_all(setting: Setting | None) -> None:
    """Compile everything for a setting, in the cache on the disk."""
    use(setting)
    for kind in calls(1, 1_024).values():
        kind[0]()
    torch.cuda.synchronize()


@torch.no_grad()
def timed(setting: Setting | None, kind: list[Callable[[], Tensor]]) -> float:
    """Microseconds of a call."""
    use(setting)
    return 1e3 * time_of_graph(lambda call: call(), [(call,) for call in kind])


if __name__ == "__main__":
    main()
