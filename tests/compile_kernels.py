"""Compile every kernel for a GPU that is not there: compile_kernels.py CAPABILITY DTYPE SIZE ALPHA [everything | rows].

SIZE is that of heads. With `everything`, each option is on that costs the kernels code; with `rows`, the kernels are
those of activations and losses, for rows of SIZE. Prints one line for each kernel: its name, its shared memory in
bytes, and how many of its loads take 2 bytes. The interpreter runs Python; only this shows that Triton's compiler takes
the kernels too.
"""

import sys
from dataclasses import replace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from flash_entmax.core.call import SUMMARY_BLOCK, Problem, RoundedKeys, ScoreOptions, Tangents, VisibilityArgs
from flash_entmax.core.pages import Pages


class AbsentGpu:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def all_options(heads: int, length: int, tile: int) -> tuple[ScoreOptions, VisibilityArgs]:
    tiles = length // tile
    score = ScoreOptions(
        torch.full((heads,), 1.5), torch.full((heads,), 0.1), softcap=30.0, alibi_slopes=torch.full((1, heads), 0.5)
    )
    intervals = torch.zeros(1, 3, length, dtype=torch.int32)
    kinds = torch.zeros(1, heads, tiles, tiles + 1, dtype=torch.int32)
    bits = torch.zeros(3, tile, -(-tile // 32), dtype=torch.int32)
    return score, VisibilityArgs(intervals, kinds, bits, is_causal=True, max_visible_span=length)


def check_no_number_is_specialized(kernel, arguments: tuple) -> None:
    """Direct launches run what was compiled for one call with the numbers of others."""
    given = zip(kernel.params, arguments, strict=False)
    names = {param.name for param, argument in given if type(argument) is int and not param.do_not_specialize}
    assert not names, f"{kernel.fn.__name__} is compiled for values of {names}: add them to tile.UNSPECIALIZED"


def describe(kernel, compiled) -> None:
    print(kernel.fn.__name__, compiled.metadata.shared, compiled.asm["ptx"].count("ld.global.b16"))


def main(capability: int, dtype: torch.dtype, head_size: int, alpha: float, everything: bool) -> None:
    driver.set_active(AbsentGpu(capability))
    from flash_entmax.backends.triton import append, attention, config, launch, parts, plan
    from flash_entmax.backends.triton.config import tile_size

    def compile_only(kernel, programs, setting, config, *arguments):
        check_no_number_is_specialized(kernel, arguments)
        compiled = kernel.warmup(*arguments, grid=(1,), C=config, **setting(config).options, enable_fp_fusion=True)
        describe(kernel, compiled)

    launch.launch = compile_only
    query, key = torch.empty(1, 4, 512, head_size, dtype=dtype), torch.empty(1, 2, 512, head_size, dtype=dtype)
    score, visibility = ScoreOptions(alpha, 1.0), VisibilityArgs(None, None, None, True, 512)
    if everything:
        score, visibility = all_options(4, 512, tile_size(dtype, head_size))
    problem = Problem.of(query.shape, key.shape, score, visibility)
    output, *saved = attention.attention_forward(problem, query, key, key, True)
    attention.attention_backward(problem, output, query, key, key, *saved, everything)
    plan.FEWEST_SHARED = 0  # as for more tokens
    plan.plan_of.cache_clear()
    attention.attention_backward(problem, output, query, key, key, *saved, everything)
    config.reach_limits = lambda *_: (64, 0)  # as for very many tokens
    config._config.cache_clear()
    plan.plan_of.cache_clear()
    attention.attention_backward(problem, output, query, key, key, *saved, everything)
    attention.attention_support(problem, query, key, *saved[1:])
    numbers = (torch.ones(4), torch.ones(4), torch.ones(1, 4)) if everything else (None, None, None)
    attention.attention_tangent(problem, query, key, key, *saved, Tangents(query, key, key, *numbers))
    attention.attention_forward(problem, query, key, key, False)
    maximum, offset = (torch.empty(1, 4, 512) for _ in range(2))
    parts.row_maxima(problem, query, key)
    parts.sums_at(problem, query, key, maximum, offset)
    parts.output_at(problem, query, key, key, maximum, offset)
    few = query[:, :, :5]
    if everything:
        score, visibility = all_options(4, 512, tile_size(dtype, head_size))
        visibility = visibility._replace(intervals=visibility.intervals[:, :, :5].contiguous())
    problem = Problem.of(few.shape, key.shape, score, visibility)
    attention.attention_forward(problem, few, key, key, False)
    for queries in (1, 16):  # of two heads: few rows, and many
        shape = query[:, :, :queries].shape
        one = Problem.of(shape, key.shape, ScoreOptions(alpha, 1.0), VisibilityArgs(None, None, None, True, 512))
        attention.attention_forward(one, query[:, :, :queries], key, key, False)
    rounded_keys = rounded_keys_of(key)
    for given in (rounded_keys, rounded_keys._replace(centre=None, radius=None, centre_error=None)):
        append.append_keys(given, key, torch.zeros(1, dtype=torch.int32))
        attention.attention_forward(replace(problem, rounded_keys=given), few, key, key, False)
    for page_size, is_packed in ((16, everything), (128, not everything)):
        attend_to_pages(few, key, score, page_size, is_packed, 100 if everything else -1)


def rounded_keys_of(key: torch.Tensor) -> RoundedKeys:
    size, blocks = (*key.shape[:2], key.shape[2]), (*key.shape[:2], key.shape[2] // SUMMARY_BLOCK)
    rounded = torch.zeros(*size, key.shape[3], dtype=torch.int8)
    centre = torch.zeros(*blocks, key.shape[3], dtype=key.dtype)
    error, radius, centre_error = (torch.zeros(blocks) for _ in range(3))
    return RoundedKeys(rounded, torch.zeros(size), error, centre, radius, centre_error)


def attend_to_pages(query, key, score, page_size: int, is_packed: bool, left: int) -> None:
    """One batch row, with its keys in pages."""
    from flash_entmax.backends.triton import attention

    cache = key[0].transpose(0, 1).unflatten(0, (-1, page_size))
    table, lengths = torch.zeros(1, len(cache), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pages = Pages(table, lengths, torch.zeros(2, dtype=torch.int32) if is_packed else None, left, page_size)
    unmasked = VisibilityArgs(None, None, None, True, pages.capacity)
    attention.attention_paged(Problem.of(query.shape, key.shape, score, unmasked), pages, query, cache, cache)


def compile_rows(capability: int, dtype: torch.dtype, size: int, alpha: float) -> None:
    driver.set_active(AbsentGpu(capability))
    from flash_entmax.backends.triton import rows
    from flash_entmax.core.loss import LossOptions

    def compile_only(kernel, programs, config, *arguments):
        compiled = kernel.warmup(*arguments, grid=(1,), C=config, num_warps=config.warps)
        describe(kernel, compiled)

    rows.launch = compile_only
    x, alphas = torch.empty(8, size, dtype=dtype), torch.full((8,), alpha)
    for row_alphas in (None, alphas):
        rows.entmax(x, row_alphas, alpha)
        rows.entmax_backward(x, x, row_alphas, alpha, row_alphas is not None)
    for target, smoothing in ((torch.zeros(8, dtype=torch.int64), 0.1), (x, 0.0)):
        loss_options = LossOptions(-100, smoothing, alpha)
        losses, state = rows.loss(x, target, loss_options)
        rows.loss_backward(losses, x, target, state, loss_options)


if __name__ == "__main__":
    capability, dtype, size, alpha, *options = sys.argv[1:]
    settings = int(capability), getattr(torch, dtype), int(size), float(alpha)
    if options == ["rows"]:
        compile_rows(*settings)
    else:
        main(*settings, options == ["everything"])
