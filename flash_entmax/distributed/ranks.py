"""The processes of a group, and that all of them make the same call before anything is exchanged."""

import hashlib
from collections.abc import Callable
from functools import wraps
from itertools import takewhile
from textwrap import shorten
from typing import NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..core.checks import is_number, said

Prepared = TypeVar("Prepared")
Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")
SHOWN = 300  # characters of a value in a message
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # by version


class Ranks(NamedTuple):
    """The processes of a group, and which of them this one is."""

    group: ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: object) -> "Ranks":
        """For a ProcessGroup or a one-dimensional DeviceMesh that this process belongs to."""
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be a DeviceMesh of one dimension, got {group.ndim}: pass mesh[NAME]")
            group = group.get_group()
        if group is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one that this process belongs to, got a group of others")
        if not isinstance(group, ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup or a one-dimensional DeviceMesh, got {said(group)} "
                "(after init_process_group, torch.distributed.group.WORLD is the group of all processes)"
            )
        rank = distributed.get_rank(group)
        if rank < 0:
            raise ValueError("group must be one that this process belongs to, got a group of others")
        return cls(group, rank, distributed.get_world_size(group))

    def device(self) -> torch.device:
        """Where the group exchanges a few numbers with the least effort: on the CPU, if one of its backends can."""
        if "cpu" in distributed.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")


def outside_of_graphs(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """torch.compile calls the function as it is, between two graphs. (Its own decorator would load it at once.)"""

    @wraps(function)
    def call(*arguments: Inputs.args, **options: Inputs.kwargs) -> Result:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*arguments, **options)

    return call


def agreed(
    ranks: Ranks, prepare: Callable[[], Prepared], describe: Callable[[Prepared], dict[str, str]], is_checked: bool
) -> Prepared:
    """What `prepare` returns, once it has returned on all ranks, and with the same description on all of them.

    Otherwise every rank raises an error: its own, or one that says what another rank has refused, or what differs.
    Unchecked, or in a graph of torch.compile, each rank raises its own only.
    """
    if not is_checked or torch.compiler.is_compiling():
        return prepare()
    description: dict[str, str] = {}
    refusal = None
    try:
        prepared = prepare()
        description = describe(prepared)
    except Exception as error:
        refusal = error
    told = f"{type(refusal).__name__}: {refusal}" if refusal is not None else description
    text = told if isinstance(told, str) else repr(sorted(told.items()))
    if not all_alike(ranks, text) or refusal is not None:
        refuse(ranks, told, refusal)
    return prepared


def all_alike(ranks: Ranks, text: str) -> bool:
    """Whether the text is the same on all ranks."""
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(ranks.device())
    digests = digest.new_empty(ranks.size * len(digest))
    all_gather(digests, digest, group=ranks.group)
    return bool((digests.view(ranks.size, -1) == digest).all())


def refuse(ranks: Ranks, told: dict[str, str] | str, refusal: Exception | None) -> NoReturn:
    """Raise, on every rank, what is wrong with the calls."""
    everyone: list = [None] * ranks.size
    distributed.all_gather_object(everyone, told, group=ranks.group)
    if refusal is not None:
        raise refusal
    for rank, other in enumerate(everyone):
        if isinstance(other, str):
            raise ValueError(f"rank {rank} of the group refuses its call, so this rank does not make its own: {other}")
    names = dict.fromkeys(name for description in everyone for name in description)
    differing = [name for name in names if len({description.get(name) for description in everyone}) > 1]
    raise ValueError("all ranks of the group must make the same call, got " + "; ".join(
        f"{name} {by_rank([description.get(name, 'none') for description in everyone])}" for name in differing
    ))  # fmt: skip


def by_rank(texts: list[str]) -> str:
    """Each text with the ranks that it comes from. Long ones begin just before the place where they differ."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    start = sum(1 for _ in alike) - SHOWN // 3
    if start > 0 and max(map(len, texts)) > SHOWN:
        texts = [f"... {text[start:]}" for text in texts]
    ranks = {text: [str(rank) for rank, other in enumerate(texts) if other == text] for text in dict.fromkeys(texts)}
    return ", ".join(
        f"{shorten(text, SHOWN)} on {'rank' if len(own) == 1 else 'ranks'} {', '.join(own)}"
        for text, own in ranks.items()
    )


def described(value: object, is_shared: bool) -> str:
    """A value as all ranks should have it: of a tensor shape and dtype, and its numbers if it is shared.

    To read the numbers of a tensor on a GPU would wait for it: they are left out.
    """
    if not isinstance(value, Tensor):
        if is_number(value) and float(value).is_integer():  # 2 and 2.0 are the same call
            return repr(int(value))
        return repr(value)
    parts = [f"{value.dtype} {tuple(value.shape)} on {value.device.type}"]
    parts += ["with gradient"] if value.requires_grad and torch.is_grad_enabled() else []
    parts += [str(value.tolist())] if is_shared and value.device.type == "cpu" else []
    return ", ".join(parts)
