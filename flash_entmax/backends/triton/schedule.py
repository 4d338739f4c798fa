"""Launch settings, as explicit rules of what a kernel is compiled for. Nothing is tuned at run time."""

from dataclasses import dataclass

from .config import WIDEST_PIPELINED, Config

DECODE_PARTS_PROGRAMS = 2  # of decode.py on a multiprocessor, which add up parts of long supports
LISTED_SCORING_PROGRAMS = 4  # of decode_summaries.py where blocks of keys are left out


@dataclass(frozen=True)
class LaunchSettings:
    """Warps per program, stages of the software pipeline, the most registers that a thread may take; and whether the
    kernel may start before the one before it has ended (programmatic dependent launch)."""

    warps: int
    stages: int
    registers: int | None = None
    overlapped: bool = False

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        overlap = {"launch_pdl": True} if self.overlapped else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit, **overlap}


def summary_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 1)


def registers(config: Config, programs: int) -> int | None:
    """So many that `programs` of 128 threads share a multiprocessor; float32 needs all that there are."""
    return None if config.COMPENSATED else 65536 // (128 * programs) // 8 * 8


def scan_settings(config: Config) -> LaunchSettings:
    """128 queries by 128 keys for twice the warps: each number that is loaded serves twice as many products."""
    if config.SCANNED > 1:
        return LaunchSettings(8, 2, registers(config, 4))
    return mark_settings(config)


def append_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4 if config.HEAD_PADDED <= WIDEST_PIPELINED else 8, 1)


def certify_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(2, 1)


def list_settings(config: Config) -> LaunchSettings:
    """One warp: what it scans needs no exchange between warps."""
    return LaunchSettings(1, 1)


def is_pipelined(config: Config) -> bool:
    """Matrix units multiply tiles of keys of which several fit the shared memory."""
    return config.HEAD_PADDED <= WIDEST_PIPELINED and not config.COMPENSATED


def is_light(config: Config) -> bool:
    """So few rows share a tile of keys in decode.py that one or two warps keep up with memory."""
    return config.ROWS <= 16 and is_pipelined(config)


def decode_scores_settings(config: Config) -> LaunchSettings:
    """With more warps than one, each computes the same addresses, and the maxima of a row cross warps. Programs of one
    warp are many, so that two stages of each keep memory busy.

    Keys in pages wait for the numbers of their pages: twice the stages, less the first, have as many tiles of keys on
    their way.
    """
    warps, stages = (1, 2) if is_light(config) else (4, 4 if is_pipelined(config) else 2)
    return LaunchSettings(warps, 2 * stages - 1 if config.PAGE else stages)


def scoring_programs(config: Config) -> int:
    """On a multiprocessor. With four warps and four stages, more than two do not run at once."""
    if not is_light(config):
        return 2
    return 8 if config.PAGE else 4


def rounded_scores_settings(config: Config) -> LaunchSettings:
    """With registers for all programs of a multiprocessor."""
    warps, stages = (2, 3) if is_light(config) else (4, listed_scores_settings(config).stages)
    limit = None
    if config.HEAD_PADDED <= WIDEST_PIPELINED:
        limit = registers(config, rounded_scoring_programs(config) * warps // 4)
    return LaunchSettings(warps, stages, limit)


def rounded_scoring_programs(config: Config) -> int:
    """On a multiprocessor: keys in 8 bits are half of the bytes, and more steps for each of them."""
    return 6 if is_light(config) else 4


def listed_scores_settings(config: Config) -> LaunchSettings:
    """A list of tiles takes more registers than LISTED_SCORING_PROGRAMS programs of a multiprocessor have."""
    return LaunchSettings(4, 4 if config.HEAD_PADDED <= 2 * WIDEST_PIPELINED else 2)


def block_bounds_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 2)


def decode_row_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 2, overlapped=config.OVERLAPPED)


def mark_settings(config: Config) -> LaunchSettings:
    if config.HEAD_PADDED <= 64:
        return LaunchSettings(4, 3, registers(config, 4))
    return LaunchSettings(4, 2, registers(config, 3)) if config.HEAD_PADDED <= 128 else LaunchSettings(4, 2)


def solve_settings(config: Config) -> LaunchSettings:
    if 64 < config.HEAD_PADDED <= 128:
        return LaunchSettings(4, 3, registers(config, 4))
    return mark_settings(config)


def output_settings(config: Config) -> LaunchSettings:
    """Of the output, and of the gradients."""
    return LaunchSettings(4, 2, registers(config, 3)) if is_narrow(config) else wide_settings(config)


def tangent_settings(config: Config) -> LaunchSettings:
    return LaunchSettings(4, 2) if is_narrow(config) else LaunchSettings(8, 1)


def is_narrow(config: Config) -> bool:
    return max(config.HEAD_PADDED, config.VALUE_PADDED) <= 64


def wide_settings(config: Config) -> LaunchSettings:
    """Heads over 128 double the accumulators: twice the warps share them, and one stage fits the shared memory."""
    return (
        LaunchSettings(4, 2)
        if max(config.HEAD_PADDED, config.VALUE_PADDED) <= WIDEST_PIPELINED
        else LaunchSettings(8, 1)
    )
