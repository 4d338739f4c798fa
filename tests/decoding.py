"""Decoding calls as the tests pose them: few queries against many keys, with every option."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import ModuleType
from unittest import mock

import torch
from cases import Case, attend, make_case, run_dense
from checks import PAIRS, check_layout
from single_keys import limits
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax.operators import dispatch
from flash_entmax.testing import FLOOR, assert_within_budget

if find_spec("triton"):
    import triton.language as tl

    from flash_entmax.backends.triton import decode, decode_lists, plan


def check_decode(case: Case, impl: str, more: float = 0.0, **options) -> torch.Tensor:
    """The output without gradients against the float64 reference; `more` is added to the floor of a few roundings.

    Options are for the call that is checked only.
    """
    actual = attend(case, impl, **options)
    exact = attend(case.in_float64(), "reference")
    dense = run_dense(case, case.grad_output()).output
    size = case.value.double().abs().amax().item() if case.value.numel() else 0.0
    assert actual.dtype == case.query.dtype
    check_layout(case, actual)
    floor = FLOOR[case.query.dtype] + more
    assert_within_budget(actual, exact, dense, name="output", magnitude=size, floor=floor)
    return actual


def few_queries(backend, queries=2, keys=None, **options) -> Case:
    keys = backend.sizes(130, 700, 700) if keys is None else keys
    return make_case(backend, length=queries, key_length=keys, **{"value_dim": 8, **options})


def sees(batch, head, query, key):
    return (key + query + head) % 3 > 0


def sees_few(batch, head, query, key):
    """Hides whole tiles of keys behind one that is seen."""
    return (key < 40 - 30 * (head % 2)) & ((key + query) % 3 > 0)


def options_of(name: str, device: str, keys: int) -> dict:
    """Of calls of 2 batch rows, 4 heads and 5 queries."""

    def numbers(*values):
        return torch.tensor(values, device=device)

    return {
        "causal": lambda: {"is_causal": True},
        "window": lambda: {"window_size": (70, 3)},
        "window, causal": lambda: {"window_size": (10, -1), "is_causal": True},
        "first position": lambda: {"query_positions": 40, "is_causal": True},
        "positions": lambda: {"query_positions": numbers(90, 3, 64, 0, 127), "window_size": (40, 2)},
        "positions of batch rows": lambda: {
            "query_positions": numbers((90, 3, 64, 0, 9), (5, 6, 7, 8, -1)), "is_causal": True,
        },
        "key lengths": lambda: {"key_lengths": numbers(keys - 3, 17)},
        "a row without keys": lambda: {
            "key_lengths": numbers(keys, 0), "is_causal": True, "query_positions": keys - 5,
        },
        "left padding": lambda: {"key_mask": torch.arange(keys, device=device) >= numbers(70, 3).unsqueeze(-1)},
        "right padding": lambda: {"key_mask": torch.arange(keys, device=device) < numbers(20, 100).unsqueeze(-1)},
        "key mask": lambda: {"key_mask": torch.arange(2 * keys, device=device).view(2, keys) % 7 % 2 > 0},
        "key mask, window": lambda: {
            "key_mask": torch.arange(2 * keys, device=device).view(2, keys) % 7 % 2 > 0, "window_size": (20, 2),
        },
        "no key": lambda: {"key_mask": torch.zeros(2, keys, dtype=torch.bool, device=device)},
        "block mask": lambda: {"block_mask": create_block_mask(sees, None, 4, 5, keys, device=device)},
        "hidden blocks": lambda: {
            "block_mask": create_block_mask(sees_few, None, 4, 5, keys, device=device), "is_causal": True,
        },
        "softcap": lambda: {"softcap": 1.0, "scale": 1.0},
        "ALiBi": lambda: {"alibi_slopes": numbers(0.1, 0.01, 0.0, -0.02)},
        "infinite ALiBi": lambda: {"alibi_slopes": numbers(torch.inf, 0.1, torch.inf, 0.0), "is_causal": True},
        "ALiBi of batch rows": lambda: {
            "alibi_slopes": numbers((0.1, 0.2, 0.3, 0.4), (0.0, -0.01, torch.inf, 1.0)), "window_size": (30, 30),
        },
        "learned": lambda: {name: numbers(*pair * 2) for name, pair in PAIRS.items()},
        "together": lambda: {
            "alpha": numbers(1.2, 1.5, 1.7, 2.0), "softcap": 2.0, "alibi_slopes": numbers(0.1, torch.inf, 0.0, -0.01),
            "window_size": (100, 0), "key_lengths": numbers(keys - 1, 90), "query_positions": keys - 5,
            "key_mask": torch.arange(2 * keys, device=device).view(2, keys) % 5 > 0,
        },
    }[name]()  # fmt: skip


OPTIONS = (
    "causal", "window", "window, causal", "first position", "positions", "positions of batch rows", "key lengths",
    "a row without keys", "left padding", "right padding", "key mask", "key mask, window", "no key", "block mask",
    "hidden blocks", "softcap", "ALiBi", "infinite ALiBi", "ALiBi of batch rows", "learned", "together",
)  # fmt: skip


def case_with(backend, name: str, **more) -> Case:
    options = options_of(name, backend.device, 130)
    return few_queries(backend, 5, 130, **{"batch": 2, "heads": 4, "key_heads": 2, **options, **more})


class Torch:
    """The backend without the fixture."""

    impl, device = "torch", "cpu"

    def sizes(self, interpreter, processor, cuda):
        return processor


TORCH = Torch()


def torch_case(queries=2, keys=700, **options) -> Case:
    return few_queries(TORCH, queries, keys, **options)


@contextmanager
def small_steps(part: int = 16, places: int = 64, processors: int = 3, decoded: int = 2**27) -> Iterator[None]:
    """Inside, the kernels in the interpreter take few keys at a time, and split and chunk short calls."""
    dispatch.kept.clear()  # what was prepared took other steps
    part, holders = tl.constexpr(part), [module for module in sys.modules.values() if holds_part(module)]
    with ExitStack() as stack:
        stack.enter_context(limits(DECODED=decoded))
        size = tl.constexpr(places)
        stack.enter_context(mock.patch.object(decode, "PLACES", size))
        stack.enter_context(mock.patch.multiple(decode_lists, PLACES=size, LISTED=size))
        stack.enter_context(mock.patch.object(plan, "processors_of", return_value=processors))
        for module in holders:
            stack.enter_context(mock.patch.object(module, "PART", part))
        yield


def holds_part(module: ModuleType) -> bool:
    return module.__name__.startswith("flash_entmax.") and getattr(module, "PART", None) is decode.PART
