"""One attention call as the tests pose it: inputs with every option, and what an implementation makes of them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.backends import reference
from flash_entmax.core.call import Problem, ScoreOptions, Support, VisibilityArgs
from flash_entmax.core.tensors import row_dtype
from flash_entmax.core.threshold import threshold_by_bisection
from flash_entmax.core.visibility import Visibility
from flash_entmax.testing import iid_inputs, inputs_with_scores

PARAMETERS = ("alpha", "scale", "alibi_slopes")
MASKS = (
    "window_size", "query_positions", "key_lengths", "key_mask", "block_mask", "cu_seq_q", "cu_seq_k",
)  # fmt: skip


@dataclass
class Case:
    """Query, key and value are (batch, heads, length, dim), or (tokens, heads, dim) where the options have cu_seq_q.

    `options` are those of the public call that have no field here.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: float | Tensor = 1.5
    is_causal: bool = False
    scale: float | Tensor | None = None
    seed: int = 0
    scores_are_exact: bool = False
    options: dict = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        return "cu_seq_q" in self.options

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that gets a gradient."""
        parameters = {"alpha": self.alpha, "scale": self.scale, **self.options}
        learned = {name: parameters[name] for name in PARAMETERS if isinstance(parameters.get(name), Tensor)}
        return {"query": self.query, "key": self.key, "value": self.value} | learned

    def with_tensors(self, **tensors: Tensor) -> "Case":
        options = {name: tensors.pop(name) for name in list(tensors) if name in self.options}
        return replace(self, **tensors, options=self.options | options)

    def in_float64(self) -> "Case":
        return self.with_tensors(**{name: tensor.double() for name, tensor in self.tensors.items()})

    def leaves(self) -> dict[str, Tensor]:
        """Tensors that keep the strides of the inputs."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}

    def batched(self, tensor: Tensor) -> Tensor:
        """(batch, heads, length, dim), whether packed or not."""
        return tensor.transpose(0, 1).unsqueeze(0) if self.is_packed else tensor

    def as_given(self, tensor: Tensor) -> Tensor:
        """The inverse of `batched`."""
        return tensor.squeeze(0).transpose(0, 1) if self.is_packed else tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.batched(tensor) for tensor in (self.query, self.key, self.value))

    @property
    def score(self) -> ScoreOptions:
        """As the operators get it."""
        query, options = self.inputs[0], self.options
        softcap, slopes = options.get("softcap", 0.0), options.get("alibi_slopes")
        return ScoreOptions(self.alpha, self.scale, softcap, slopes).lowered(
            query.shape, row_dtype(query), query.device
        )

    @property
    def numbers(self) -> tuple[float | Tensor, float | Tensor]:
        """alpha and scale: two floats, or two tensors (heads,)."""
        return self.score[:2]

    @property
    def slopes(self) -> Tensor | None:
        return self.score.alibi_slopes

    @property
    def problem(self) -> Problem:
        """Without the masks but causality."""
        visibility = VisibilityArgs(None, None, None, self.is_causal, self.inputs[1].shape[2])
        return Problem.of(self.inputs[0].shape, self.inputs[2].shape, self.score, visibility)

    @property
    def visibility(self) -> Visibility:
        given = {name: self.options[name] for name in MASKS if name in self.options}
        if self.is_packed and given.get("cu_seq_k") is None:
            given["cu_seq_k"] = given["cu_seq_q"]
        return Visibility(self.is_causal, **given)

    def grad_output(self) -> Tensor:
        shape = *self.query.shape[:-1], self.value.shape[-1]
        generator = torch.Generator().manual_seed(self.seed + 7)
        return torch.randn(shape, generator=generator).to(self.query.device, self.query.dtype)


@dataclass
class Result:
    """Gradients are in the order of the case's tensors; the support has a batch dimension."""

    output: Tensor
    gradients: tuple[Tensor, ...]
    grad_output: Tensor
    support: Support | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.output, *self.gradients


def names(case: Case) -> tuple[str, ...]:
    """Of the tensors of a Result."""
    return "output", *(f"grad_{name}" for name in case.tensors)


def longest(boundaries: Tensor) -> int:
    return max(boundaries.diff().tolist(), default=0)


def attend(case: Case, impl: str, **more):
    """The public call; `more` options go before those of the case."""
    options = {"alpha": case.alpha, "is_causal": case.is_causal, "scale": case.scale, **case.options, **more}
    tensors = case.query, case.key, case.value
    if not case.is_packed:
        return entmax_attention(*tensors, **options, impl=impl)
    cu_seq_q, cu_seq_k = options.pop("cu_seq_q"), options.pop("cu_seq_k", None)
    max_q = options.pop("max_q", longest(cu_seq_q))
    max_k = options.pop("max_k", longest(cu_seq_q if cu_seq_k is None else cu_seq_k))
    return entmax_attention_varlen(*tensors, cu_seq_q, cu_seq_k, max_q, max_k, **options, impl=impl)


def attend_with_support(case: Case, impl: str) -> tuple[Tensor, Support]:
    """The public call; the support has a batch dimension in any case."""
    output, support = attend(case, impl, return_support=True)
    if case.is_packed:
        support = Support(*(field.unsqueeze(0) if isinstance(field, Tensor) else field for field in support))
    return output, support


class Step:
    """The forward pass of the public call, and then the backward one."""

    def __init__(self, case: Case, impl: str) -> None:
        self.leaves = case.leaves()
        self.output, self.support = attend_with_support(case.with_tensors(**self.leaves), impl)

    def backward(self, grad_output: Tensor) -> Result:
        gradients = torch.autograd.grad(self.output, list(self.leaves.values()), grad_output)
        return Result(self.output.detach(), gradients, grad_output, self.support)


def run(case: Case, impl: str, grad_output: Tensor) -> Result:
    return Step(case, impl).backward(grad_output)


def run_dense(case: Case, grad_output: Tensor) -> Result:
    """Entmax attention as plain PyTorch computes it in the inputs' dtype: products in it, the rows in float32.

    Scores are not rounded to 16 bits, since no implementation here does so; probabilities and gradients are.
    """
    leaves = case.leaves()
    case = case.with_tensors(**leaves)
    query, key, value = case.inputs
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    output, _ = reference.attention(case.problem, query.to(wide), key.to(wide), value, case.visibility)
    output = case.as_given(output)
    return Result(output.detach(), torch.autograd.grad(output, list(leaves.values()), grad_output), grad_output)


def make_case(backend, heads=2, length=130, dim=16, *, dtype=torch.float32, batch=1, seed=0, **options) -> Case:
    """Independent inputs; options of the inputs, fields of the Case and its options are told apart by name."""
    shape = {name: options.pop(name) for name in ("key_length", "key_heads", "value_dim") if name in options}
    fields = {name: options.pop(name) for name in ("alpha", "is_causal", "scale") if name in options}
    tensors = iid_inputs(batch, heads, length, dim, dtype=dtype, device=backend.device, seed=seed, **shape)
    return Case(*tensors, **fields, seed=seed, options=options)


def crowd(
    alpha: float, depth: float, spread: float, dtype: torch.dtype, device: str = "cpu", keys: int = 2048, rows: int = 16
) -> Case:
    """Two keys, 0 and -1/4 in units of z, are the support, or nearly: all others are around `depth` above their tau."""
    generator = torch.Generator().manual_seed(0)
    _, offset = threshold_by_bisection(torch.tensor([0.0, -0.25], dtype=torch.float64), alpha)
    z = depth - offset + spread * (torch.rand(rows, keys, generator=generator, dtype=torch.float64) - 0.5)
    z[:, 5], z[:, keys // 2] = 0.0, -0.25
    query, key, scale = inputs_with_scores(z.half().double(), alpha)
    value = 0.3 * torch.randn(1, 1, keys, 16, generator=generator, dtype=torch.float64)
    value[..., 0] += 1.0  # on which the crowd agrees
    value[0, 0, 5] *= -1.0
    return Case(*(tensor.to(device, dtype) for tensor in (query, key, value)), alpha=alpha, scale=scale)


def boundaries(lengths, device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """(sequences + 1,), from 0 upwards."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def packed_case(backend, query_lengths, key_lengths=None, *, spare=0, index_dtype=torch.int32, **options) -> Case:
    """Packed sequences of independent inputs, with `spare` tokens past the last boundary."""
    lengths = query_lengths if key_lengths is None else key_lengths
    options["cu_seq_q"] = boundaries(query_lengths, backend.device, index_dtype)
    if key_lengths is not None:
        options["cu_seq_k"] = boundaries(key_lengths, backend.device, index_dtype)
    case = make_case(backend, length=sum(query_lengths) + spare, key_length=sum(lengths) + spare, **options)
    case.query, case.key, case.value = (
        tensor[0].transpose(0, 1).contiguous() for tensor in (case.query, case.key, case.value)
    )
    return case
