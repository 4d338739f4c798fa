"""Every refusal of a call: an error that quotes what was passed and says what is accepted, before any kernel runs."""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .call import ALPHAS, MAX_HEAD_SIZE, NUMBER_ALPHAS, ScoreOptions
from .intervals import FURTHEST, UNLIMITED
from .modes import as_autocast
from .tensors import ceil_div, is_nested
from .visibility import Visibility

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
SMALLEST_SOFTCAP = 1e-30  # kernels divide by it, and by softcap / scale, in float32


def checked_inputs(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, *, parts: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, under autocast in its dtype, after every refusal but that of a backend that cannot run.

    The keys are one of so many ``parts`` of one length.
    """
    query, key, value = as_autocast(query, key, value)
    check_inputs(query, key, value)
    check_score_options(query, score)
    if visibility.cu_seq_q is not None:
        check_packed(visibility)
    check_visibility(query, key, visibility)
    check_alignment(query.shape[2], parts * key.shape[2], score, visibility)
    if visibility.cu_seq_q is not None:
        check_boundaries(query, visibility)
    return query, key, value


def require_dense(name: str, tensor: object) -> None:
    """Neither nested nor sparse."""
    if is_nested(tensor):
        raise ValueError(f"{name} must be a tensor that is not nested, got a nested one: pass its values()")
    if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got one of layout {tensor.layout}: pass its to_dense()")


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Tensors of one floating dtype and device, whose shapes fit."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        require_dense(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, length, dim), got {tuple(tensor.shape)}")
    check_devices_and_dtypes(tensors)
    _check_shapes(query, key, value)


def check_devices_and_dtypes(tensors: dict[str, Tensor]) -> None:
    """Of three tensors by their names."""
    query, key, value = tensors.values()
    names = "{}, {} and {}".format(*tensors)
    if not query.dtype == key.dtype == value.dtype:
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        raise TypeError(f"{names} must have one dtype, got {_listed(dtypes)}")
    if query.dtype not in DTYPES:
        raise TypeError(f"{names} must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if not query.device == key.device == value.device:
        devices = {name: tensor.device for name, tensor in tensors.items()}
        raise ValueError(f"{names} must be on one device, got {_listed(devices)}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            f"query, key and value must have one batch size, got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same number of heads, got {key.shape[1]} and {value.shape[1]}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"key and value must have the same length, got {key.shape[2]} and {value.shape[2]}")
    check_heads(query.shape[1], key.shape[1], query.shape[3], key.shape[3], value.shape[3])


def check_heads(heads: int, key_heads: int, query_size: int, key_size: int, value_size: int) -> None:
    """Numbers of heads, and head sizes."""
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"query heads must be a multiple of key heads, got {heads} query heads and {key_heads} key heads"
        )
    if query_size != key_size:
        raise ValueError(f"query and key must have the same head size, got {query_size} and {key_size}")
    for name, size in (("query and key", query_size), ("value", value_size)):
        if not 1 <= size <= MAX_HEAD_SIZE:
            raise ValueError(f"head size of {name} must be from 1 to {MAX_HEAD_SIZE}, got {size}")


def check_number_alpha(name: str, alpha: float) -> None:
    lowest, highest = NUMBER_ALPHAS
    if not (alpha == 1.0 or lowest <= alpha <= highest):
        raise ValueError(f"{name} must be 1 (softmax), or from {lowest} to {highest:g} (sparsemax), got {alpha}")


def check_score_options(query: Tensor, score: ScoreOptions) -> None:
    (batch, heads), (alpha, scale, softcap, slopes) = query.shape[:2], score
    if isinstance(alpha, Tensor):
        _check_parameter("alpha", alpha, query, ((), (heads,)))
    elif not is_number(alpha):
        raise TypeError(f"alpha must be 1, a float from 1.0001 to 2, or a tensor, got {typed(alpha)}")
    else:
        check_number_alpha("alpha", alpha)
    if isinstance(scale, Tensor):
        _check_parameter("scale", scale, query, ((), (heads,)))
    elif scale is not None and not is_number(scale):
        raise TypeError(f"scale must be a positive float, a tensor or None, got {typed(scale)}")
    elif scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    check_softcap(softcap)
    limit = 1e3 if query.dtype.itemsize == 2 else 1e6
    if softcap > limit:
        raise ValueError(f"softcap must be at most {limit:g} for {query.dtype}, got {softcap}")
    if softcap and not isinstance(scale, Tensor) and scale is not None and softcap / scale < SMALLEST_SOFTCAP:
        found = f"softcap {softcap} and scale {scale}"
        raise ValueError(f"softcap / scale must be at least {SMALLEST_SOFTCAP:g}, got {found}")
    if slopes is not None:
        _check_parameter("alibi_slopes", slopes, query, ((heads,), (batch, heads)))
    if not isinstance(alpha, Tensor) and isinstance(scale, Tensor) and 1.0 < alpha < ALPHAS[0]:
        raise ValueError(f"alpha beside a tensor scale must be 1, or in [{ALPHAS[0]:g}, {ALPHAS[1]:g}], got {alpha}")
    if not isinstance(alpha, Tensor) and not isinstance(scale, Tensor) and alpha > 1.0:
        z_scale = (alpha - 1.0) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if not 1e-30 <= z_scale <= 1e30:
            raise ValueError(f"(alpha - 1) * scale must be from 1e-30 to 1e30, got alpha {alpha} and scale {scale}")


def check_keys(key: Tensor, value_size: object) -> None:
    """Keys by themselves, and the head size of values, or None."""
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be a torch.Tensor, got {type(key).__name__}")
    require_dense("key", key)
    if key.dim() != 4 or not 1 <= key.shape[3] <= MAX_HEAD_SIZE:
        wanted = f"(batch, key heads, key length, head size), with a head size from 1 to {MAX_HEAD_SIZE}"
        raise ValueError(f"key must have shape {wanted}, got {tuple(key.shape)}")
    if key.dtype not in DTYPES:
        raise TypeError(f"key must be float16, bfloat16, float32 or float64, got {key.dtype}")
    if value_size is not None and not is_int(value_size):
        raise TypeError(f"value_size must be an integer or None, got {typed(value_size)}")
    if value_size is not None and not 1 <= value_size <= MAX_HEAD_SIZE:
        raise ValueError(f"value_size must be from 1 to {MAX_HEAD_SIZE}, got {value_size}")


def check_softcap(softcap: object) -> None:
    if not is_number(softcap):
        raise TypeError(f"softcap must be a positive float, or 0 for none, got {typed(softcap)}")
    if not (softcap == 0 or SMALLEST_SOFTCAP <= softcap < math.inf):
        raise ValueError(f"softcap must be at least {SMALLEST_SOFTCAP:g} and finite, or 0 for none, got {softcap}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be True or False, got {said(value)}")


def said(value: object) -> str:
    """What was passed, in a message: its value, or its type where that may be long."""
    is_scalar = getattr(value, "ndim", None) == 0 and not isinstance(value, Tensor)  # of NumPy
    is_short = is_scalar or isinstance(value, (bool, int, float, str, type(None)))
    return repr(value) if is_short else type(value).__name__


def typed(value: object) -> str:
    """What was passed, in a message about types: its type, and its value where that is short."""
    kind = type(value).__name__
    return kind if said(value) == kind else f"{kind} {said(value)}"


def checked_device(device: Any) -> torch.device:
    """A device, or the name of one. Whether it is there, the first tensor on it says."""
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"device must be a torch.device or its name, as 'cpu' or 'cuda:0', got {device!r}") from error


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_parameter(name: str, tensor: Tensor, query: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of the query, {query.device}, got {tensor.device}")


def _listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def check_visibility(query: Tensor, key: Tensor, visibility: Visibility) -> None:
    (batch, heads, query_length, _), key_length = query.shape, key.shape[2]
    check_flag("is_causal", visibility.is_causal)
    check_window(visibility.window_size)
    given = visibility.query_positions
    if isinstance(given, Tensor):
        check_index("query_positions", given, query, ((query_length,), (batch, query_length)))
    elif given is not None and not is_int(given):
        raise TypeError(f"query_positions must be an integer, an integer tensor or None, got {typed(given)}")
    elif given is not None and abs(given) > FURTHEST:
        raise ValueError(f"query_positions must be from -2^30 to 2^30, got {given}")
    if visibility.key_lengths is not None:
        check_index("key_lengths", visibility.key_lengths, query, ((batch,),))
    if visibility.key_mask is not None:
        _check_tensor("key_mask", visibility.key_mask, query, ((batch, key_length),))
        if visibility.key_mask.dtype != torch.bool:
            dtype = visibility.key_mask.dtype
            advice = "mask == 0, if it is added to scores" if dtype.is_floating_point else "its bool()"
            raise TypeError(f"key_mask must be boolean, True where a key may be seen, got {dtype}: pass {advice}")
    if visibility.block_mask is not None:
        if visibility.key_mask is not None:
            raise ValueError("key_mask and block_mask exclude each other: let the block mask's mask_mod hide the keys")
        _check_block_mask(visibility.block_mask, (batch, heads, query_length, key_length), query.device)


def check_alignment(queries: int, keys: int, score: ScoreOptions, visibility: Visibility) -> None:
    """Whether the last query is the last of all keys or of ``key_lengths`` must not be guessed. One causal query sees
    the same keys in both cases."""
    if visibility.key_lengths is None or visibility.query_positions is not None or visibility.cu_seq_q is not None:
        return
    left, right = visibility.window_size
    right = 0 if visibility.is_causal else right
    sees_the_past = left == UNLIMITED and score.alibi_slopes is None
    if sees_the_past and (right == UNLIMITED or (right == 0 and queries == 1)):
        return
    if queries != keys and 0 not in (queries, keys):
        raise ValueError(
            "key_lengths beside is_causal, window_size or alibi_slopes needs query_positions where queries are not as "
            f"many as keys, got {queries} and {keys}: key_lengths.unsqueeze(1) + torch.arange(-{queries}, 0) if the "
            f"last query is the last of key_lengths, {keys - queries} if it is the last of all keys"
        )


def check_window(window: object) -> None:
    if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(is_int(size) for size in window)):
        raise TypeError(f"window_size must be a pair of integers (left, right), got {window!r}")
    if min(window) < UNLIMITED:
        raise ValueError(f"window_size must be (left, right) with each at least 0, or -1 for no limit, got {window}")


def check_boundaries(query: Tensor, visibility: Visibility) -> None:
    """The boundaries of packed sequences: shapes and dtypes."""
    given: dict[str, Any] = {"cu_seq_q": visibility.cu_seq_q, "cu_seq_k": visibility.cu_seq_k}
    for name, boundaries in given.items():
        check_index(name, boundaries, query, None)
        if boundaries.dim() != 1 or boundaries.shape[0] == 0:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(boundaries.shape)}")
    counts = [boundaries.shape[0] for boundaries in given.values()]
    if counts[0] != counts[1]:
        raise ValueError("cu_seq_q and cu_seq_k must have one length, got {} and {}".format(*counts))


def check_packed(visibility: Visibility) -> None:
    """What packed sequences are given by numbers."""
    if isinstance(visibility.query_positions, int):
        got = type(visibility.query_positions).__name__
        raise TypeError(f"query_positions of packed sequences must be a tensor or None, got {got}")
    for name, longest in (("max_q", visibility.max_q), ("max_k", visibility.max_k)):
        check_longest(name, longest, least=0)


def check_longest(name: str, longest: object, least: int) -> None:
    if not is_int(longest):
        raise TypeError(f"{name} must be an integer, got {typed(longest)}")
    if longest < least:
        raise ValueError(f"{name} must be at least {least}, got {longest}")


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_index(
    name: str, tensor: Any, query: Tensor, shapes: tuple[tuple[int, ...], ...] | None, beside: str = "the query"
) -> None:
    """`beside` says in messages what `query` is."""
    _check_tensor(name, tensor, query, shapes, beside)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def _check_tensor(
    name: str, tensor: object, query: Tensor, shapes: tuple[tuple[int, ...], ...] | None, beside: str = "the query"
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of {beside}, {query.device}, got {tensor.device}")
    if shapes is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")


def _check_block_mask(block_mask: object, sizes: tuple[int, int, int, int], device: torch.device) -> None:
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        of_tensor = ""
        if isinstance(block_mask, Tensor):
            of_tensor = (
                ": create_block_mask(lambda b, h, q, k: mask[q, k], None, None, queries, keys, device) makes one"
            )
        raise TypeError(f"block_mask must be a FlexAttention BlockMask, got {type(block_mask).__name__}{of_tensor}")
    if torch.compiler.is_compiling():
        raise ValueError(
            "block_mask cannot be read inside torch.compile: which tiles it fills depends on its data. is_causal, "
            "window_size, key_lengths and key_mask compile; torch.compiler.disable leaves a call out of the graph"
        )
    batch, heads, *lengths = sizes
    if tuple(block_mask.seq_lengths) != tuple(lengths):
        raise ValueError(
            f"block_mask must be for {lengths[0]} queries and {lengths[1]} keys, got one for {block_mask.seq_lengths} "
            "(of a slice of a mask, set mask_mod, and before torch 2.14 seq_lengths)"
        )
    grid = tuple(ceil_div(length, size) for length, size in zip(lengths, block_mask.BLOCK_SIZE, strict=True))
    for indices in (block_mask.kv_indices, block_mask.full_kv_indices):
        if indices is not None and tuple(indices.shape[-2:]) != grid:
            raise ValueError(f"block_mask must have {grid} blocks for its lengths, got {tuple(indices.shape[-2:])}")
    leading = tuple(block_mask.kv_indices.shape[:-2])
    if len(leading) != 2 or leading[0] not in (1, batch) or leading[1] not in (1, heads):
        raise ValueError(f"block_mask must have batch 1 or {batch} and heads 1 or {heads}, got {leading}")
    if any(size % 64 for size in block_mask.BLOCK_SIZE):
        raise ValueError(f"block_mask must have a BLOCK_SIZE of multiples of 64, got {block_mask.BLOCK_SIZE}")
    if block_mask.kv_indices.device != device:
        raise ValueError(f"block_mask must be on the device of the query, {device}, got {block_mask.kv_indices.device}")
