"""Every case in turn: its inputs and their sparsity, and time and memory of every competitor that is right on them."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from flash_entmax import Support, entmax_attention
from flash_entmax.testing import topic_inputs

from . import captured, measure, roofline
from .cases import BenchCase
from .competitors import Competitor, Ready, contestants
from .gate import Truth
from .settings import ALPHA, OURS, BenchSettings


def measure_cases(settings: BenchSettings, rate: float | None, finished: Callable[[dict], None]) -> bool:
    """Hand the results of every case to ``finished`` as soon as they are there. True if ours was right on all cases."""
    is_right = True
    for cases in settings.shapes():
        ready: dict[str, Ready] = {}
        for case in cases:
            result = measure_case(case, settings, ready, rate)
            ours = result["competitors"].get(OURS, {})
            is_right &= not {"wrong", "failed"} & ours.keys()
            finished(result)
            release(settings)
    return is_right


def measure_case(case: BenchCase, settings: BenchSettings, ready: dict[str, Ready], rate: float | None) -> dict:
    """``ready`` holds the competitors that earlier cases of this shape prepared; this case adds others to it."""
    inputs = inputs_of(case, settings)
    grad_output = torch.randn_like(inputs[0])
    truth = Truth(case, inputs, grad_output)
    result = facts_of(case, inputs) | {"competitors": {}}
    for competitor in contestants(settings):
        entry = measure_competitor(competitor, case, settings, ready, truth, grad_output)
        result["competitors"][competitor.name] = entry
    ours = result["competitors"].get(OURS, {})
    if rate is not None and "step_ms" in ours and result["block_sparsity"] is not None:
        floor = roofline.floor(case, 1 - result["block_sparsity"], result["key_density"], rate)
        result["roofline"] = floor._asdict() | {"attained": floor.step_ms / ours["step_ms"]}
    return result


def inputs_of(case: BenchCase, settings: BenchSettings) -> tuple[Tensor, ...]:
    if case.captured:
        inputs = captured.load(case.captured, settings.dtype, settings.device)
    else:
        inputs = topics_of(case, settings)
    return tuple(tensor.requires_grad_() for tensor in inputs)


def topics_of(case: BenchCase, settings: BenchSettings) -> tuple[Tensor, ...]:
    return topic_inputs(
        case.batch,
        case.heads,
        case.length,
        case.head_size,
        case.topics,
        key_heads=case.key_heads,
        dtype=settings.dtype,
        device=settings.device,
        wide_blocks=case.wide_blocks,
    )


def facts_of(case: BenchCase, inputs: tuple[Tensor, ...]) -> dict:
    """The case, and the sparsity of its inputs; None if measuring it failed."""
    facts = asdict(case) | {"inputs": case.inputs}
    facts |= {"block_sparsity": None, "key_density": None, "support_size": None}
    try:
        query, key, value = (tensor.detach() for tensor in inputs)
        support = entmax_attention(query, key, value, alpha=ALPHA, is_causal=True, return_support=True)[1]
        return facts | {
            "block_sparsity": block_sparsity(support),
            "key_density": key_density(support),
            "support_size": support.size.double().mean().item(),
            "tile": list(support.tile_shape),
        }
    except Exception as error:  # the competitors can still be measured
        return facts | {"support_failed": f"{type(error).__name__}: {first_line(error)}"}


def block_sparsity(support: Support) -> float:
    """The share of the visible tiles without support, in a causal call with as many queries as keys."""
    columns = torch.arange(support.tiles.shape[-1]) * support.tile_shape[1]
    visible = (columns < keys_seen(support).unsqueeze(-1)).sum().item() * support.tiles[..., 0, 0].numel()
    return 1 - support.tiles.sum().item() / visible


def key_density(support: Support) -> float:
    """Of the keys that a tile of queries sees in such a call, the share to which one of its queries attends."""
    visible = keys_seen(support).sum().item() * support.keys[..., 0].numel()
    return support.keys.sum().item() / visible


def keys_seen(support: Support) -> Tensor:
    """(query tiles,): how many keys the last query of each tile sees in such a call."""
    tiles = torch.arange(1, support.tiles.shape[-2] + 1)
    return (tiles * support.tile_shape[0]).clamp_max(support.size.shape[-1])


def measure_competitor(
    competitor: Competitor,
    case: BenchCase,
    settings: BenchSettings,
    ready: dict[str, Ready],
    truth: Truth,
    grad_output: Tensor,
) -> dict:
    """The times and memory of a competitor; or else why it does not run, how it failed, or how wrong it is."""
    if reason := competitor.why_not(case, settings):
        return {"why_not": reason}
    try:
        if competitor.name not in ready:
            ready[competitor.name] = competitor.prepare(case, truth.inputs)
        prepared = ready[competitor.name]
        with prepared.context():
            verdict = truth.judge(prepared.attend, competitor.alpha, competitor.name == OURS)
            entry = {"errors": verdict.errors} | ({"note": prepared.note} if prepared.note else {})
            if verdict.wrong:
                return entry | {"wrong": verdict.wrong}
            return entry | timed(prepared.attend, truth.inputs, grad_output, settings, competitor.name == OURS)
    except Exception as error:  # the other competitors are still measured
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def timed(attend, inputs: tuple[Tensor, ...], grad_output: Tensor, settings: BenchSettings, is_ours: bool) -> dict:
    entry = {}
    if "speed" in settings.parts:
        entry |= measure.forward_and_step(attend, inputs, grad_output, settings)
        if is_ours and settings.on_cuda:
            entry["stages_ms"] = measure.stages_ms(attend, inputs, grad_output)
    if "memory" in settings.parts and settings.on_cuda:
        entry["memory_mib"] = measure.peak_memory_mib(attend, inputs, grad_output)
    return entry


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def release(settings: BenchSettings) -> None:
    """Give cached memory back between cases, so that the next case has all of it."""
    if settings.on_cuda:
        torch.cuda.empty_cache()
