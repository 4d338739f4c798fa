"""Modules: an attention layer, an activation, a loss."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .activations import check_alpha_number, entmax
from .backends import Impl, check_impl
from .core.call import ALPHAS
from .core.checks import check_flag, check_index, check_softcap, check_window, is_number, refuse_nested, said, typed
from .core.tensors import is_jagged, longest_sequence
from .core.visibility import UNLIMITED
from .functional import entmax_attention, entmax_attention_varlen
from .losses import check_options, entmax_loss

POSITIONS = "rope", "alibi", "nape", "none"
TEMPERATURES = "fixed", "adaptive"


class Alpha(nn.Module):
    """A number, or a learned tensor of a shape: 1.01 + 0.99 sigmoid(logit), which no step takes out of range.

    The logit is in float32, or float64 where the dtype is, whatever dtype the layer has; casting it to bfloat16, as
    ``model.to(torch.bfloat16)`` does, moves alpha by at most 0.0005.
    """

    def __init__(
        self,
        alpha: float,
        shape: tuple[int, ...] | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_alpha_number(alpha)
        self.number, self.logit = float(alpha), None
        if shape is not None:
            lowest, highest = ALPHAS
            if not lowest < alpha < highest:
                raise ValueError(f"a learned alpha must start between {lowest} and {highest}, got {alpha}")
            dtype = torch.get_default_dtype() if dtype is None else dtype
            dtype = torch.float32 if dtype.itemsize < 4 else dtype
            self.logit = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.logit is not None:
            lowest, highest = ALPHAS
            share = (self.number - lowest) / (highest - lowest)
            nn.init.constant_(self.logit, math.log(share / (1.0 - share)))

    def forward(self) -> float | Tensor:
        if self.logit is None:
            return self.number
        lowest, highest = ALPHAS
        logit = self.logit.float() if self.logit.dtype.itemsize < 4 else self.logit
        return lowest + (highest - lowest) * logit.sigmoid()

    def extra_repr(self) -> str:
        return f"alpha={self.number}" if self.logit is None else f"learned, shape={tuple(self.logit.shape)}"


class WithAlpha(nn.Module):
    """A module with an `Alpha` named power.

    A number is an option of the module, as its sizes are: copies have it, ``state_dict`` does not. A learned alpha is a
    parameter, ``power.logit``. A tensor that moves is neither: it is passed to each call.
    """

    power: Alpha

    @property
    def alpha(self) -> float | Tensor:
        """A number, or a tensor where it is learned, by head in an attention layer.

        A number that is assigned stays as it is. A tensor is refused: a copy of the module, or the same module on
        another device, would go on with a copy of it, which nothing moves.
        """
        return self.power()

    @alpha.setter
    def alpha(self, number: float) -> None:
        self.power = Alpha(number, None)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "alpha" and isinstance(value, Tensor):
            raise TypeError(
                f"alpha must be a number, got {typed(value)}: pass a tensor to each call, as in "
                "module(x, alpha=annealing.alpha), or learn it with learn_alpha=True"
            )
        super().__setattr__(name, value)


class Entmax(WithAlpha):
    """:func:`flash_entmax.entmax` along a dimension, with a fixed or a learned alpha.

    Args:
        alpha: from 1 to 2; where a learned one starts, strictly between.
        dim: the dimension that sums to 1.
        learn_alpha: alpha becomes a parameter's sigmoid, stretched to [1.01, 2] (as in Correia et al. 2019, arXiv
            1909.00015).
    """

    def __init__(self, alpha: float = 1.5, dim: int = -1, learn_alpha: bool = False) -> None:
        super().__init__()
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"dim must be an integer, got {said(dim)}")
        check_flag("learn_alpha", learn_alpha)
        self.dim = dim
        self.power = Alpha(alpha, () if learn_alpha else None)

    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None) -> Tensor:
        """``alpha`` is in place of the module's own, as when it is annealed."""
        return entmax(x, self.alpha if alpha is None else alpha, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class EntmaxLoss(nn.Module):
    """:func:`flash_entmax.entmax_loss` as a module, in place of ``torch.nn.CrossEntropyLoss``."""

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_options(alpha, ignore_index, reduction, label_smoothing)
        check_impl(impl)
        self.alpha, self.impl = alpha, impl
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = {name: getattr(self, name) for name in ("ignore_index", "reduction", "label_smoothing", "impl")}
        return entmax_loss(input, target, self.alpha, **options)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class EntmaxAttention(WithAlpha):
    """Multi-head self-attention whose weights are alpha-entmax, with everything that decides where heads look.

    Args:
        embed_dim: size of the inputs and outputs.
        num_heads: query heads.
        num_key_heads: key and value heads, a divisor of ``num_heads`` (grouped-query attention); default as many.
        head_dim: size of a head; default ``embed_dim // num_heads``.
        bias: of the four projections.
        alpha: from 1 (softmax) to 2 (sparsemax).
        learn_alpha: each head learns its own alpha, a parameter's sigmoid stretched to [1.01, 2], from ``alpha`` on.
        position: what heads know of distance. ``"rope"``: queries and keys are turned by their positions (Su et al.
            2021, arXiv 2104.09864). ``"alibi"``: scores fall with distance, by slopes 2^(-8 h / heads), h = 1, 2, ...
            (Press et al. 2022, arXiv 2108.12409). ``"nape"``: the first half of the heads know nothing, the others have
            slopes 1 / h (arXiv 2506.16640), which carries over to longer contexts. ``"none"``: nothing.
        temperature: ``"fixed"``, or ``"adaptive"``, the length-aware one of ASEntmax (arXiv 2506.16640): on the heads
            without slopes, scores of the query at position i are multiplied by 1 + beta * log(i + 2)^gamma, with
            beta = softplus(W_b x + b_b) and gamma = 2 tanh(W_g x + b_g) from the layer input x there; W, b start at 0.
        is_causal, window_size, softcap: as for :func:`flash_entmax.entmax_attention`.
        rope_base: of the slowest angle; positive.
        device, dtype: of the parameters; that of a learned alpha is at least float32.

    Shapes: (batch, length, embed_dim), or packed (tokens, embed_dim) with ``cu_seq`` and ``max_seq``.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        check_heads(embed_dim, num_heads, num_key_heads, head_dim)
        for name, flag in (("bias", bias), ("learn_alpha", learn_alpha), ("is_causal", is_causal)):
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
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(embed_dim, num_key_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(embed_dim, num_key_heads * self.head_dim, bias=bias, **factory)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias, **factory)
        self.power = Alpha(alpha, (num_heads,) if learn_alpha else None, **factory)
        self.temperature = None
        if temperature == "adaptive":
            self.temperature = AdaptiveTemperature(embed_dim, heads_without_slope(position, num_heads), **factory)

    def reset_parameters(self) -> None:
        """Back to the start; after ``to_empty``, to the first one."""
        for module in self.children():
            module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        alpha: float | Tensor | None = None,
        key_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seq: Tensor | None = None,
        max_seq: int | None = None,
        impl: Impl = "auto",
    ) -> Tensor:
        """Attention of ``x`` to itself.

        Args:
            x: (batch, length, embed_dim), or (tokens, embed_dim) with ``cu_seq``; or a jagged nested tensor (batch,
                ragged length, embed_dim), whose sequences are packed: the output is one as well.
            alpha: in place of the layer's own, as when it is annealed (:class:`flash_entmax.anneal.AlphaAnnealing`).
            key_lengths, key_mask: padding of batch rows, as for :func:`flash_entmax.entmax_attention`.
            cu_seq, max_seq: boundaries (sequences + 1,) and longest length of packed sequences.
        """
        if is_jagged(x):
            if any(option is not None for option in (key_lengths, key_mask, cu_seq, max_seq)):
                raise ValueError("key_lengths, key_mask, cu_seq and max_seq are for tensors that are not nested")
            tokens = x.values()
            packed = self(tokens, alpha=alpha, cu_seq=x.offsets(), max_seq=longest_sequence(x), impl=impl)
            return torch.nested.nested_tensor_from_jagged(packed, x.offsets())
        self.check(x, key_lengths, key_mask, cu_seq, max_seq)
        position = positions_of(x, cu_seq)
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        if self.position == "rope":
            rotation = rotation_of(position, self.head_dim, self.rope_base)
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.temperature is not None:
            query = query * self.temperature(x, position, self.num_heads).to(query.dtype).unsqueeze(-1)
        options = {
            "alpha": self.alpha if alpha is None else alpha,
            "is_causal": self.is_causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": slopes_of(self.position, self.num_heads, x.device),
            "impl": impl,
        }
        if cu_seq is not None:
            mixed = entmax_attention_varlen(query, key, value, cu_seq, None, max_seq, max_seq, **options)
        else:
            query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
            mixed = entmax_attention(query, key, value, key_lengths=key_lengths, key_mask=key_mask, **options)
            mixed = mixed.transpose(1, 2)
        return self.out(mixed.flatten(-2))

    def check(self, x, key_lengths, key_mask, cu_seq, max_seq) -> None:
        width = self.query.in_features
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        refuse_nested("x", x)
        if (cu_seq is None) != (max_seq is None):
            raise ValueError(f"cu_seq and max_seq must be given together, got {cu_seq} and {max_seq}")
        expected = f"(batch, length, {width})" if cu_seq is None else f"(tokens, {width})"
        if x.dim() != (3 if cu_seq is None else 2) or x.shape[-1] != width:
            raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
        if cu_seq is None:
            return
        if not (key_lengths is None and key_mask is None):
            raise ValueError("key_lengths and key_mask are for batch rows: packed sequences have no padding")
        check_index("cu_seq", cu_seq, x, None)
        if cu_seq.dim() != 1 or cu_seq.shape[0] == 0:
            raise ValueError(f"cu_seq must have shape (sequences + 1,), got {tuple(cu_seq.shape)}")

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_key_heads={self.num_key_heads}, head_dim={self.head_dim}, "
            f"position={self.position!r}, is_causal={self.is_causal}"
        )


class Zeros(nn.Linear):
    """Starts at zero: drawn at random, projections of a temperature were seen to stay where they start.

    As it draws nothing, what is made after it is as without it from the same seed.
    """

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class AdaptiveTemperature(nn.Module):
    """ASEntmax (arXiv 2506.16640): 1 + beta * log(position + 2)^gamma, for the first ``heads`` heads; 1 for others."""

    def __init__(self, embed_dim: int, heads: int, **factory) -> None:
        super().__init__()
        self.beta, self.gamma = (Zeros(embed_dim, heads, **factory) for _ in range(2))

    def reset_parameters(self) -> None:
        self.beta.reset_parameters(), self.gamma.reset_parameters()

    def forward(self, x: Tensor, position: Tensor, num_heads: int) -> Tensor:
        """x (..., embed_dim) at position (...) -> (..., num_heads) float32."""
        beta, gamma = softplus(self.beta(x).float()), 2.0 * self.gamma(x).float().tanh()
        factor = 1.0 + beta * (position + 2.0).log().unsqueeze(-1) ** gamma
        rest = num_heads - factor.shape[-1]
        return torch.cat((factor, factor.new_ones(*factor.shape[:-1], rest)), -1) if rest else factor


def heads_without_slope(position: str, num_heads: int) -> int:
    """They come first."""
    return {"alibi": 0, "nape": num_heads - num_heads // 2}.get(position, num_heads)


def slopes_of(position: str, num_heads: int, device: torch.device) -> Tensor | None:
    """(heads,) float32 ALiBi slopes, or None where no head has one."""
    if position not in ("alibi", "nape"):
        return None
    free = heads_without_slope(position, num_heads)
    count = torch.arange(1 - free, num_heads + 1 - free, dtype=torch.float32, device=device)
    if position == "alibi":
        return 2.0 ** (-8.0 * count / num_heads)
    return torch.where(count > 0, 1.0 / count.clamp_min(1.0), 0.0)


def positions_of(x: Tensor, cu_seq: Tensor | None) -> Tensor:
    """(length,), or for packed sequences (tokens,), each token's place in its own sequence; float32."""
    place = torch.arange(x.shape[-2], device=x.device)
    if cu_seq is not None:
        sequence = torch.searchsorted(cu_seq, place, right=True) - 1
        place = place - cu_seq[sequence]
    return place.float()


def rotation_of(position: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """(length,) positions -> (2, length, head_dim), of the rotary angles (arXiv 2104.09864) the cosines of both halves,
    and the sines, those of the first half negated.
    """
    place = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device)
    speed = base ** -(place / head_dim)
    angle = position.unsqueeze(-1) * speed
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """(..., length, heads, head_dim): turn the pairs (x_j, x_{j + head_dim / 2}) of each position by its angles."""
    cosine, sine = rotation.unsqueeze(-2)
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cosine + partner * sine).to(x.dtype)


def check_heads(embed_dim: int, num_heads: int, num_key_heads: int, head_dim: int | None) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_key_heads": num_key_heads}
    sizes |= {} if head_dim is None else {"head_dim": head_dim}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer, got {said(size)}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if num_heads % num_key_heads:
        raise ValueError(f"num_heads must be a multiple of num_key_heads, got {num_heads} and {num_key_heads}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, or head_dim given, got {embed_dim}, {num_heads}")


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
