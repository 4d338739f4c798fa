"""Calls and steps that are launched from notes, as tests make and look at them."""

import inspect
from typing import NamedTuple

import torch
from direct_launches import Launches

from flash_entmax import entmax_attention


class Given(NamedTuple):
    """Inputs, and a gradient of the output."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_output: torch.Tensor


def given(queries: int = 70, keys: int = 130, batch: int = 2, dtype=torch.float16) -> Given:
    shapes = (batch, 2, queries, 32), (batch, 1, keys, 32), (batch, 1, keys, 16), (batch, 2, queries, 16)
    query, key, value, grad_output = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return Given(*(tensor.requires_grad_() for tensor in (query, key, value)), grad_output)


def rows_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(tensor.requires_grad)


def all_rows_first() -> Given:
    return Given(*map(rows_first, given()))


def other_gradient() -> Given:
    tensors = given()
    return tensors._replace(grad_output=rows_first(tensors.grad_output))


def attend(tensors: Given, **options) -> torch.Tensor:
    return entmax_attention(*tensors[:3], impl="triton", **options)


def forward(tensors: Given, **options) -> list[torch.Tensor]:
    with torch.no_grad():
        return [attend(tensors, **options)]


def step(tensors: Given, **options) -> list[torch.Tensor]:
    output = attend(tensors, **options)
    return [output, *torch.autograd.grad(output, tensors[:3], tensors.grad_output)]


WAYS = {"forward": forward, "step": step}


def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32) for tensor in tensors]


def by_notes(launches: Launches, way, tensors: Given, **options) -> list[torch.Tensor]:
    """What a call gives, and that nothing was launched without notes."""
    before = launches.opened, len(launches.by_triton)
    results = way(tensors, **options)
    assert (launches.opened, len(launches.by_triton)) == before
    return results


def not_by_notes(launches: Launches, way, tensors: Given, **options) -> list[torch.Tensor]:
    opened = launches.opened
    results = way(tensors, **options)
    assert launches.opened > opened
    return results


def prepare(way, make, **options) -> None:
    """The first of equal calls is lowered and compiled; the second prepares what the others are."""
    for _ in range(3):
        way(make(), **options)


def named(launched: list[tuple], name: str) -> dict:
    """The arguments of the only launch of a kernel by their names."""
    ((kernel, _, arguments),) = [one for one in launched if one[0].fn.__name__ == name]
    return dict(zip(inspect.signature(kernel.fn).parameters, arguments, strict=True))


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)
