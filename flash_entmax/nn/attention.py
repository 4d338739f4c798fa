"""Multi-head self-attention whose weights are alpha-entmax."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends import Impl
from ..core.checks import (
    DTYPES,
    check_flag,
    check_index,
    check_softcap,
    check_window,
    checked_device,
    is_number,
    require_dense,
    said,
)
from ..core.intervals import UNLIMITED
from ..core.keywords import LEFT_OUT, check_keywords, refuse_positions
from ..core.tensors import is_jagged, jagged_like, longest_sequence, row_dtype
from ..functional import entmax_attention, entmax_attention_varlen
from .alpha import AlphaParameter, WithAlpha
from .cache import KeyValueCache
from .positions import POSITIONS, alibi_slopes_of, heads_without_slope, in_sequences, rotate, rotation_of
from .temperature import AdaptiveTemperature

if TYPE_CHECKING:
    from ..distributed import ContextParallel

TEMPERATURES = "fixed", "adaptive"
# Arguments of other attention layers, and what says the same here.
OWN_OPTION = "it is an option of the layer"
FROM_X = "keys and values come from x: call entmax_attention for others"
OF_LAYERS = {
    "num_kv_heads": "it is num_key_heads",
    "batch_first": f"the batch is the first dimension, {LEFT_OUT}",
    "kdim": FROM_X,
    "vdim": FROM_X,
    "key": FROM_X,
    "value": FROM_X,
    "is_causal": OWN_OPTION,
    "window_size": OWN_OPTION,
    "attn_mask": "padding is key_mask or key_lengths; of other masks call entmax_attention",
    "block_mask": "call entmax_attention",
    "need_weights": "flash_entmax.inspection.record shows what was attended to",
}


class EntmaxAttention(WithAlpha):
    """Multi-head self-attention with alpha-entmax weights, from projections to output.

    Args:
        embed_dim: size of the inputs and outputs.
        num_heads: query heads.
        num_key_heads: key and value heads, a divisor of ``num_heads`` (grouped queries). Default: ``num_heads``.
        head_dim: size of a head. Default: ``embed_dim // num_heads``.
        bias: of the four projections.
        alpha: from 1 (softmax) to 2 (sparsemax). Learned alphas start there.
        learn_alpha: each head learns its own alpha, as 1.01 + 0.99 sigmoid(parameter).
        position: what heads know of distance. ``"rope"``: queries and keys are rotated by their positions (Su et al.
            2021, arXiv 2104.09864). ``"alibi"``: each score loses slope * distance; head h = 1, 2, ... has the slope
            2^(-8 h / heads) (Press et al. 2022, arXiv 2108.12409). ``"nape"``: the first half of the heads know nothing
            of distance, and the others have the slopes 1 / h; this carries over to longer contexts (arXiv 2506.16640).
            ``"none"``: nothing.
        temperature: ``"fixed"``, or ``"adaptive"``, the length-aware one of ASEntmax (arXiv 2506.16640). It multiplies
            the scores of the query at position i by 1 + beta * log(i + 2)^gamma, in the heads without slopes. There,
            beta = softplus(W_b x + b_b) and gamma = 2 tanh(W_g x + b_g) of the layer input x; W and b start at 0.
        is_causal, window_size, softcap: as for :func:`flash_entmax.entmax_attention`.
        rope_base: base of the rotary angles, positive.
        output_norm: an RMSNorm of the output, after the output projection, as in Gemma 2 (arXiv 2408.00118). A mean
            over more values is smaller; the norm gives each token's output the same size at every length.
        context_parallel: a group of ``torch.distributed``, or a :class:`flash_entmax.distributed.ContextParallel`. Then
            inputs and outputs are this rank's parts of sequences, as :func:`flash_entmax.distributed.shard` cuts them,
            and positions count in whole sequences. Each rank gets its share of the gradient of each parameter, alpha
            among them: the shares add up to the gradient of the sum of the ranks' losses. FSDP or DDP over the group
            averages them, as those of any other layer; by themselves they are not reduced.
        device, dtype: of the parameters. A learned alpha is float32 or float64.

    Shapes: (batch, length, embed_dim), or packed (tokens, embed_dim) with ``cu_seq`` and ``max_seq``.

    Generation reads the tokens in chunks of any size, and keeps their keys and values::

        cache = layer.new_cache(batch, capacity)
        with torch.no_grad():
            output = torch.cat([layer(chunk, cache=cache) for chunk in x.split(16, 1)], 1)  # layer(x), up to rounding

    Raises:
        TypeError, ValueError: for options of the wrong type or out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        alpha: float = 1.5,
        learn_alpha: bool = False,
        position: str = "rope",
        temperature: str = "fixed",
        is_causal: bool = True,
        window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
        softcap: float = 0.0,
        rope_base: float = 10_000.0,
        output_norm: bool = False,
        context_parallel: "ContextParallel | object | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        check_keywords(EntmaxAttention.__init__, unknown, OF_LAYERS)
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        check_heads(embed_dim, num_heads, num_key_heads, head_dim)
        flags = {"bias": bias, "learn_alpha": learn_alpha, "is_causal": is_causal, "output_norm": output_norm}
        for name, flag in flags.items():
            check_flag(name, flag)
        check_window(window_size)
        check_softcap(softcap)
        if not is_number(rope_base):
            raise TypeError(f"rope_base must be a positive number, got {said(rope_base)}")
        if not 0.0 < rope_base < math.inf:
            raise ValueError(f"rope_base must be positive and finite, got {rope_base}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        check_choices(position, temperature, self.head_dim, num_heads)
        self.num_heads, self.num_key_heads, self.position = num_heads, num_key_heads, position
        self.is_causal, self.window_size, self.softcap = is_causal, window_size, softcap
        self.rope_base = rope_base
        self.context_parallel = context_parallel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(embed_dim, num_key_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(embed_dim, num_key_heads * self.head_dim, bias=bias, **factory)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias, **factory)
        self.output_norm = nn.RMSNorm(embed_dim, **factory) if output_norm else None
        self.alpha_parameter = AlphaParameter(alpha, (num_heads,) if learn_alpha else None, **factory)
        self.temperature: AdaptiveTemperature | None = None
        if temperature == "adaptive":
            self.temperature = AdaptiveTemperature(embed_dim, heads_without_slope(position, num_heads), **factory)

    @property
    def context_parallel(self) -> "ContextParallel | None":
        """How sequences are shared. It can be assigned, also a group, or None for whole sequences."""
        return self._context_parallel

    @context_parallel.setter
    def context_parallel(self, given: "ContextParallel | object | None") -> None:
        if given is not None:
            from ..distributed import ContextParallel  # torch.distributed is loaded where it is used

            given = ContextParallel.of(given)
        self._context_parallel = given

    def reset_parameters(self) -> None:
        """Draw all parameters anew, for instance after ``to_empty``."""
        modules: Iterator[Any] = self.children()
        for module in modules:
            module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *by_position: NoReturn,
        alpha: float | Tensor | None = None,
        key_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seq: Tensor | None = None,
        max_seq: int | None = None,
        cache: KeyValueCache | None = None,
        impl: Impl = "auto",
        **unknown: NoReturn,
    ) -> Tensor:
        """Attention of ``x`` to itself, and to the tokens in the cache. The output has the shape of ``x``.

        Args:
            x: (batch, length, embed_dim); or (tokens, embed_dim) with ``cu_seq``; or a jagged nested tensor (batch,
                ragged length, embed_dim), whose output is jagged as well.
            alpha: replaces the layer's alpha for this call, for instance while it is annealed
                (:class:`flash_entmax.anneal.AlphaAnnealing`).
            key_lengths, key_mask: padding of batch rows, as for :func:`flash_entmax.entmax_attention`. With
                ``context_parallel``, lengths of whole sequences, and the mask of this rank's part.
            cu_seq, max_seq: boundaries (sequences + 1,) and longest length of packed sequences. With
                ``context_parallel``, boundaries in the whole sequence, without a longest length.
            cache: what ``new_cache`` made. The tokens of ``x`` follow those in the cache, and are added to it.
                For causal layers, tensors (batch, length, embed_dim) without padding, and where gradients are off.

        Raises:
            TypeError, ValueError: for inputs of the wrong type, shape or combination; ValueError where the cache has
                no room. The cache is as before.
        """
        if by_position or unknown:
            refuse_positions(EntmaxAttention.forward, ("x",), by_position, f"options have names; {FROM_X}")
            check_keywords(EntmaxAttention.forward, unknown, OF_LAYERS)
        if cache is not None:
            self._check_cache(x, alpha, cache, (key_lengths, key_mask, cu_seq, max_seq))
        if is_jagged(x):
            if any(option is not None for option in (key_lengths, key_mask, cu_seq, max_seq)):
                raise ValueError("key_lengths, key_mask, cu_seq and max_seq are for tensors that are not nested")
            if self.context_parallel is not None:
                raise ValueError("context_parallel takes no nested tensors: pass (tokens, width) and cu_seq instead")
            # Not as self(...): hooks of the module are for calls from outside.
            packed = self.forward(x.values(), alpha=alpha, cu_seq=x.offsets(), max_seq=longest_sequence(x), impl=impl)
            return jagged_like(x, packed)
        self._check_inputs(x, key_lengths, key_mask, cu_seq, max_seq)
        query, key, value = self._project(x, in_sequences(self._positions(x, cache), cu_seq))
        options: dict[str, Any] = {
            "alpha": self.alpha if alpha is None else alpha,
            "is_causal": self.is_causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": alibi_slopes_of(self.position, self.num_heads, x.device, row_dtype(x)),
            "impl": impl,
        }
        if self.context_parallel is not None:
            options |= {"key_lengths": key_lengths, "key_mask": key_mask, "cu_seq": cu_seq}
            mixed = attend_to_all_parts(self.context_parallel, query, key, value, options)
        elif cu_seq is not None and max_seq is not None:
            mixed = entmax_attention_varlen(query, key, value, cu_seq, None, max_seq, max_seq, **options)
        else:
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            if cache is not None:
                key, value, options["window_size"] = self._with_cached(key, value, cache)
            mixed = entmax_attention(query, key, value, key_lengths=key_lengths, key_mask=key_mask, **options)
            mixed = mixed.transpose(1, 2)
        output = self.out(mixed.flatten(-2))
        if self.output_norm is not None:
            output = self.output_norm(output)
        if cache is not None:
            cache.length += x.shape[1]
        return output

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueCache:
        """An empty cache of this layer.

        Args:
            batch: rows of the inputs.
            capacity: how many tokens each row has room for.
            device, dtype: default those of the layer, or the dtype of autocast where that is on.

        Raises:
            TypeError, ValueError: for sizes of the wrong type or below 1, and another device or dtype; ValueError for a
                layer that is not causal.
        """
        check_sizes({"batch": batch, "capacity": capacity})
        self._check_may_cache()
        weight = self.key.weight
        device = weight.device if device is None else checked_device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        return KeyValueCache(batch, self.num_key_heads, capacity, self.head_dim, device=device, dtype=dtype)

    def _positions(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Of each token in the whole of what is read, (length,) int64."""
        if self.context_parallel is not None:
            return self.context_parallel.positions(x.shape[-2], x.device)
        first = 0 if cache is None else cache.length
        return torch.arange(first, first + x.shape[-2], device=x.device)

    def _with_cached(self, key: Tensor, value: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Keys and values of the tokens that some query sees, the last of them those given; the window among them."""
        left, first = self.window_size[0], 0
        if left != UNLIMITED:
            first = max(0, cache.length - left)
        key, value = (tensor[:, :, first:] for tensor in cache.write(key, value))
        return key, value, (UNLIMITED if key.shape[2] <= left + 1 else left, UNLIMITED)

    def _check_may_cache(self) -> None:
        if self.context_parallel is not None:
            raise ValueError(
                "a cache holds whole sequences, and a layer with context_parallel has parts: set "
                "layer.context_parallel = None to generate, or see flash_entmax.distributed.decode_sharded"
            )
        if not self.is_causal:
            raise ValueError("a cache is for a causal layer, got is_causal=False: a token would see those after it")

    def _check_cache(self, x: object, alpha: object, cache: object, others: tuple) -> None:
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache must be a KeyValueCache, which new_cache makes, got {said(cache)}")
        self._check_may_cache()
        if is_jagged(x) or any(option is not None for option in others):
            raise ValueError(
                "all rows of a cache have one length: key_lengths, key_mask, cu_seq, max_seq and nested tensors have "
                "no place beside it"
            )
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in (x, alpha, *self.parameters()) if isinstance(tensor, Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            raise ValueError("a cache holds no gradients: call the layer under torch.no_grad(), got gradients on")

    def _check_inputs(
        self,
        x: object,
        key_lengths: Tensor | None,
        key_mask: Tensor | None,
        cu_seq: Tensor | None,
        max_seq: int | None,
    ) -> None:
        width = self.query.in_features
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        require_dense("x", x)
        if self.context_parallel is not None:
            if max_seq is not None:
                raise ValueError(f"context_parallel takes cu_seq of whole sequences without max_seq, got {max_seq}")
        elif (cu_seq is None) != (max_seq is None):
            raise ValueError(f"cu_seq and max_seq must be given together, got {cu_seq} and {max_seq}")
        expected = f"(batch, length, {width})" if cu_seq is None else f"(tokens, {width})"
        if x.dim() != (3 if cu_seq is None else 2) or x.shape[-1] != width:
            raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        is_plain = type(self.query) is nn.Linear  # a quantized one takes other dtypes than that of its weight
        if is_plain and not is_cast and x.dtype != self.query.weight.dtype:
            raise TypeError(f"x must be {self.query.weight.dtype}, the dtype of the layer, got {x.dtype}")
        if cu_seq is None:
            return
        if not (key_lengths is None and key_mask is None):
            raise ValueError("key_lengths and key_mask are for batch rows: packed sequences have no padding")
        check_index("cu_seq", cu_seq, x, None)
        if cu_seq.dim() != 1 or cu_seq.shape[0] == 0:
            raise ValueError(f"cu_seq must have shape (sequences + 1,), got {tuple(cu_seq.shape)}")

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (..., length, heads, head_dim), with rotation and temperature applied."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.query, self.key, self.value)
        )
        if self.position == "rope":
            rotation = rotation_of(position.to(row_dtype(query)), self.head_dim, self.rope_base)
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.temperature is not None:
            query = query * self.temperature(x, position, self.num_heads).to(query.dtype).unsqueeze(-1)
        return query, key, value

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_key_heads={self.num_key_heads}, head_dim={self.head_dim}, "
            f"position={self.position!r}, is_causal={self.is_causal}"
            + (f", context_parallel={self.context_parallel.size} ranks" if self.context_parallel is not None else "")
        )


def check_heads(embed_dim: int, num_heads: int, num_key_heads: int, head_dim: int | None) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_key_heads": num_key_heads}
    check_sizes(sizes if head_dim is None else sizes | {"head_dim": head_dim})
    if num_heads % num_key_heads:
        raise ValueError(f"num_heads must be a multiple of num_key_heads, got {num_heads} and {num_key_heads}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, or head_dim given, got {embed_dim}, {num_heads}")


def check_sizes(sizes: Mapping[str, object]) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer, got {said(size)}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_choices(position: str, temperature: str, head_dim: int, num_heads: int) -> None:
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(map(repr, POSITIONS))}, got {position!r}")
    if temperature not in TEMPERATURES:
        raise ValueError(f"temperature must be one of {', '.join(map(repr, TEMPERATURES))}, got {temperature!r}")
    if position == "rope" and head_dim % 2:
        raise ValueError(f"position='rope' needs an even head_dim, got {head_dim}")
    if position == "nape" and num_heads < 2:
        raise ValueError(f"position='nape' needs at least 2 heads, got {num_heads}")
    if position == "alibi" and temperature == "adaptive":
        raise ValueError("temperature='adaptive' is for heads without slopes, and position='alibi' leaves none")


def attend_to_all_parts(
    ranks: "ContextParallel", query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    """(..., local length, heads, head_dim), of queries of this rank, to the keys and values of all ranks."""
    is_packed = options["cu_seq"] is not None
    parts = (tensor.transpose(-3, -2) for tensor in (query, key, value))
    parts = (part.unsqueeze(0) for part in parts) if is_packed else parts
    mixed = ranks.attention(*parts, **options).transpose(1, 2)
    return mixed.squeeze(0) if is_packed else mixed
