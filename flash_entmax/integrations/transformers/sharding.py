"""Batches that the processes of a group share: each process has a part of every sequence."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import string_at
from typing import Any

import torch
from torch import Tensor, nn

from ...core.checks import is_number, said, typed
from ...distributed import ContextParallel, positions, shard
from ...distributed.ranks import Ranks, agreed, described
from .config import IMPLEMENTATIONS, implementation_of
from .setting import root_in
from .shared_batch import SharedBatch, close_batch, open_batch, shared_batch

IGNORED = -100  # a label that does not count
BY_TOKEN = "input_ids", "inputs_embeds", "token_type_ids", "attention_mask", "position_ids", "labels", "shift_labels"
INDICES = torch.int64, torch.int32
DTYPES = dict.fromkeys(("input_ids", "token_type_ids", "position_ids"), INDICES)
DTYPES |= dict.fromkeys(("labels", "shift_labels"), (torch.int64,))
LOCAL_LAYERS = {"full_attention", "sliding_attention", "attention"}  # other layers than these need the whole sequence
GROWING_ROPE = {"dynamic", "longrope"}  # whose angles depend on the last position that a rank sees


@contextmanager
def context_parallel(model: nn.Module, batch: dict[str, Any], group: object) -> Iterator[dict[str, Any]]:
    """Share a batch over the ranks of a group, and let the model's entmax attention bring its parts together.

    ::

        with context_parallel(model, {"input_ids": ids, "labels": ids}, group) as own:
            loss = model(**own).loss
            loss.backward()

    Every rank passes the same whole batch, and calls the model on its own part. The losses of the ranks are shares:
    they add up to the loss of one process, and so do the gradients. FSDP and DDP average gradients, so multiply the
    loss by the number of ranks there. Labels are shifted before they are cut, as the next token may be on another rank.
    Logits are those of the own tokens; :func:`flash_entmax.distributed.unshard` puts them together.

    Take the backward pass within the block too, where a checkpoint may run the whole model again. It works under FSDP2,
    DDP, activation checkpointing, autocast and ``torch.compile``. Graphs hold the exchange, and not FSDP2's hooks.

    Args:
        model: one of Transformers, or a wrapper around one, all of whose layers run entmax.
        batch: what ``model(**batch)`` takes, whole and the same on all ranks: input_ids or inputs_embeds, and
            optionally attention_mask (batch, length), position_ids (batch or 1, length), token_type_ids, labels or
            shift_labels, num_items_in_batch. Without position_ids, tokens count 0, 1, 2 and so on. Models that count
            in another way, as RoBERTa does, need them. As without a group, position_ids that start anew pack sequences
            where there is no attention_mask; here in a batch of 1.
        group: a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or a
            :class:`flash_entmax.distributed.ContextParallel` with method and layout.

    Yields:
        The own part of the batch, as ``model(**own)`` takes it.

    Raises:
        TypeError, ValueError: models and batches that cannot be shared, and batches that differ between ranks (the
            numbers of tensors on a CPU are compared). ``ContextParallel(group, check_ranks=False)`` compares nothing.
    """
    parallel = ContextParallel.of(group)

    def prepare() -> tuple[dict[str, Any], SharedBatch]:
        if shared_batch() is not None:
            raise ValueError("context_parallel is open already: one block holds one batch, got a second inside it")
        root = check_model(model)
        check_batch(root, batch)
        return own_part(root, batch, parallel)

    def describe(_: object) -> dict[str, str]:
        return description(model, batch, parallel)

    own, shared = agreed(Ranks.of(parallel.group), prepare, describe, parallel.check_ranks)
    open_batch(shared)
    try:
        yield own
    finally:
        close_batch()


def description(model: nn.Module, batch: dict[str, Any], parallel: ContextParallel) -> dict[str, str]:
    """What must be the same on all ranks."""
    texts = {"function": "context_parallel", "model": type(root_in(model)).__name__}
    texts |= {name: repr(getattr(parallel, name)) for name in ("method", "layout", "heads_at_a_time")}
    given = {name: value for name, value in batch.items() if value is not None and name != "use_cache"}  # it is False
    return texts | {name: described_in_short(value) for name, value in given.items()}


def described_in_short(value: object) -> str:
    """As `described`, with a hash in place of the numbers of a tensor."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return described(value, is_shared=False)
    numbers = value.detach().contiguous()
    digest = hashlib.sha256(string_at(numbers.data_ptr(), numbers.nbytes)).hexdigest()
    return f"{described(value, is_shared=False)}, of hash {digest[:16]}"


# The own part


def own_part(
    root: nn.Module, batch: dict[str, Any], parallel: ContextParallel
) -> tuple[dict[str, Any], SharedBatch]:  # fmt: skip
    """What this rank passes to the model, and what its layers must know."""
    tokens = batch["inputs_embeds" if batch.get("inputs_embeds") is not None else "input_ids"]
    length = tokens.shape[1]
    whole = {name: batch[name] for name in BY_TOKEN if batch.get(name) is not None}
    boundaries = None
    if "position_ids" in whole and "attention_mask" not in whole:
        boundaries = boundaries_of(whole["position_ids"], tokens.shape[0])
    if "attention_mask" in whole and whole["attention_mask"].bool().all():
        del whole["attention_mask"]
    if "labels" in whole and "shift_labels" not in whole:
        whole["shift_labels"] = nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=IGNORED)
    own = {name: shard(tensor, 1, parallel.group, parallel.layout) for name, tensor in whole.items()}
    if "position_ids" not in own:
        own["position_ids"] = positions(length, parallel.group, parallel.layout, device=tokens.device).unsqueeze(0)
    if "shift_labels" in own:
        own["labels"] = torch.full_like(own["shift_labels"], IGNORED)  # not read; a model that does has no loss but NaN
        counted = batch.get("num_items_in_batch")
        own["num_items_in_batch"] = (whole["shift_labels"] != IGNORED).sum() if counted is None else counted
    if hasattr(root.config, "use_cache"):
        own["use_cache"] = False
    jumps = bool((own["position_ids"].diff(dim=1) != 1).any())
    return own, SharedBatch(parallel, length // parallel.size, boundaries, jumps)


def boundaries_of(position_ids: Tensor, batch_size: int) -> Tensor | None:
    """(sequences + 1,) int32, where positions start anew; None for one sequence."""
    starts = position_ids.diff(dim=1) != 1
    if not starts.any():
        return None
    if batch_size > 1:
        raise ValueError(
            f"position_ids that start anew pack sequences, in a batch of 1 here, got a batch of {batch_size}: put all "
            "sequences into one row"
        )
    (places,) = starts[0].nonzero(as_tuple=True)
    ends = places.new_tensor([0, position_ids.shape[1]])
    return torch.cat((ends[:1], places + 1, ends[1:])).int()


# Checks


def check_model(model: object) -> nn.Module:
    """The model of Transformers, all of whose layers can share sequences."""
    root = root_in(model) if isinstance(model, nn.Module) else None
    if root is None:
        raise TypeError(f"context_parallel takes a model of Transformers, got {said(model)}")
    kind, config = type(root).__name__, root.config
    found = {implementation_of(module) for module in root.modules() if hasattr(module, "config")} - {None}
    others = sorted(found - set(IMPLEMENTATIONS))
    if others or not found:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(
            f"context_parallel needs a model whose attention is one of {names}, got "
            f"{', '.join(map(repr, others)) or 'none'}: others would attend to the own part only; call "
            "model.set_attn_implementation('entmax15')"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"context_parallel is for models of one sequence, and {kind} has an encoder and a decoder")
    if "position_ids" not in inspect.signature(root.forward).parameters:
        raise ValueError(f"{kind} takes no position_ids, so that a part of a sequence cannot know where it stands")
    kinds = {str(layer) for layer in (getattr(config, "layer_types", None) or ())}
    kinds |= {str(layer) for layer in (getattr(config, "layers_block_type", None) or ())}
    if kinds - LOCAL_LAYERS:
        raise ValueError(f"{kind} has layers that need the whole sequence: {', '.join(sorted(kinds - LOCAL_LAYERS))}")
    growing = GROWING_ROPE & set(rope_types(getattr(config, "rope_parameters", None)))
    if growing:
        raise ValueError(
            f"{kind} has rotary angles of type {', '.join(map(repr, sorted(growing)))}, which depend on the length "
            "that a rank sees: use 'default', 'linear', 'yarn' or 'llama3'"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError("output_router_logits=True adds a loss of the own tokens only: set it to False in the config")
    return root


def rope_types(parameters: object) -> Iterator[str]:
    """All values of "rope_type": there is one, or one for each kind of layer."""
    if isinstance(parameters, dict):
        for name, value in parameters.items():
            if name == "rope_type":
                yield value
            yield from rope_types(value)


def check_batch(root: nn.Module, batch: object) -> None:
    if not isinstance(batch, dict):
        raise TypeError(f"batch must be a dict of what the model takes, got {typed(batch)}")
    if batch.get("use_cache") or batch.get("past_key_values") is not None or batch.get("cache") is not None:
        raise ValueError("context_parallel has no caches, as keys are spread over the ranks: leave use_cache False")
    known = {*BY_TOKEN, "num_items_in_batch", "use_cache", "past_key_values", "cache"}
    unknown = [name for name, value in batch.items() if name not in known and value is not None]
    if unknown:
        raise ValueError(
            f"context_parallel shares {', '.join(BY_TOKEN)} and num_items_in_batch, got {', '.join(map(str, unknown))}"
        )
    names = [name for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None]
    if len(names) != 1:
        raise ValueError(f"batch must have input_ids or inputs_embeds, got {' and '.join(names) or 'neither'}")
    tokens = batch[names[0]]
    check_first(names[0], tokens)
    for name in BY_TOKEN:
        if batch.get(name) is not None:
            check_tokens(name, batch[name], tokens)
    counted = batch.get("num_items_in_batch")
    if counted is not None and not isinstance(counted, Tensor) and not is_number(counted):
        raise TypeError(f"num_items_in_batch must be a number or a tensor, got {typed(counted)}")
    if batch.get("labels") is not None or batch.get("shift_labels") is not None:
        check_loss(root)


def check_first(name: str, tokens: object) -> None:
    """What says how many tokens there are."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {typed(tokens)}")
    expected = ("batch", "length", "width")[: dim_of(name)]
    if tokens.dim() != len(expected):
        raise ValueError(f"{name} must have shape ({', '.join(expected)}), got {tuple(tokens.shape)}")


def dim_of(name: str) -> int:
    return 3 if name == "inputs_embeds" else 2


def check_tokens(name: str, tensor: object, tokens: Tensor) -> None:
    """A tensor for each token."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {typed(tensor)}")
    if name in DTYPES and tensor.dtype not in DTYPES[name]:
        raise TypeError(f"{name} must be of {' or '.join(map(str, DTYPES[name]))}, got {tensor.dtype}")
    dim = dim_of(name)
    rows = (1, tokens.shape[0]) if name == "position_ids" else (tokens.shape[0],)
    if tensor.dim() != dim or tensor.shape[0] not in rows or tensor.shape[1] != tokens.shape[1]:
        expected = f"({tokens.shape[0]}, {tokens.shape[1]}{', width' if dim == 3 else ''})"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def check_loss(root: nn.Module) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if root.loss_function is not ForCausalLMLoss:
        name = getattr(root.loss_function, "__name__", root.loss_function)
        raise ValueError(
            f"labels are shared for the loss ForCausalLMLoss, and {type(root).__name__} has {name}: leave them out, "
            "cut them by flash_entmax.distributed.shard, and compute the loss from the logits"
        )
