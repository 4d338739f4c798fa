"""Calls of which single keys are listed: what the kernels are set to, and what the records of a call say."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from unittest import mock

import torch
from cases import Case
from checks import recorded_words
from conftest import Backend
from torch import Tensor

from flash_entmax.core.call import live_words
from flash_entmax.core.tensors import ceil_div
from flash_entmax.operators import attention as ops

if find_spec("triton"):
    import triton.language as tl

    from flash_entmax.backends.triton import config, plan, share

TOPIC_SCORE = 30.0


def forget_plans() -> None:
    """Plans and Configs keep what a test sets."""
    plan.plan_of.cache_clear()
    config._config.cache_clear()


@contextmanager
def limits(reach: tuple[int, int] | None = None, blocks_of_part: int | None = None, **numbers: int) -> Iterator[None]:
    """Inside, numbers of plan.py are others, and (QUOTA, STORED_TILES), and share.FEWEST in the interpreter.

    Short calls look for single keys.
    """
    with ExitStack() as stack:
        stack.callback(forget_plans)
        stack.enter_context(mock.patch.multiple(plan, **{"FEWEST_MARKED": 1} | numbers))
        if reach is not None:
            stack.enter_context(mock.patch.object(config, "reach_limits", return_value=reach))
        if blocks_of_part is not None:
            stack.enter_context(mock.patch.object(share, "FEWEST", tl.constexpr(blocks_of_part)))
        forget_plans()
        yield


def limits_of(backend: Backend, **numbers) -> AbstractContextManager:
    """`limits` where the kernels run, and where some number is given."""
    return limits(**numbers) if numbers and backend.impl == "triton" else nullcontext()


def lone_inputs(
    length: int, dim: int = 32, *, heads: int = 1, key_heads: int = 1, batch: int = 1, keys_of_topic: int = 2,
    sinks: tuple[int, ...] = (0,), dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value: each query is of one of `dim` topics, of which each has so many keys anywhere.

    A query attends to the keys of its topic. So few queries of a tile reach a tile of keys, and few of its keys. Some
    keys are of all topics: all queries of a causal call see the first.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = (TOPIC_SCORE * dim**0.5) ** 0.5

    def noise(count: int) -> Tensor:
        return 0.3 * torch.randn(batch, count, length, dim, generator=generator)

    topics = torch.randint(0, dim, (batch, heads, length), generator=generator)
    query = centre * torch.eye(dim)[topics] + noise(heads)
    key = noise(key_heads)
    for head in key.flatten(0, 1):
        for topic in range(dim):
            head[torch.randperm(length, generator=generator)[:keys_of_topic], topic] += centre
        head[list(sinks)] += centre
    value = torch.randn(batch, key_heads, length, dim, generator=generator)
    return tuple(tensor.to(device, dtype) for tensor in (query, key, value))


def lone_case(backend, length: int, dim: int = 32, options: dict | None = None, **more) -> Case:
    """A case of `lone_inputs`; fields of the Case and options of the inputs are told apart by name."""
    fields = {name: more.pop(name) for name in ("alpha", "is_causal", "scale") if name in more}
    return Case(*lone_inputs(length, dim, device=backend.device, **more), **fields, options=options or {})


def listed_blocks(case: Case, reached_keys: Tensor) -> int:
    """How many blocks of single keys a call's records list."""
    tile = ops.tile_of("triton", case.query, case.value)
    query_length, key_length = (tensor.shape[2] for tensor in case.inputs[:2])
    records = reached_keys.unflatten(-1, (ceil_div(query_length, tile), -1))
    return int(records[..., 2 * live_words(key_length, tile)].sum())


def with_single_keys(case: Case, check: Callable):
    """What a check of a call returns, after single keys were really listed in its first forward pass."""
    with recorded_words() as kept:
        result = check(case)
    assert listed_blocks(case, kept[0]) > 0, "the call lists whole tiles only"
    return result
