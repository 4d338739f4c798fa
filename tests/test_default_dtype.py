"""Another default dtype than float32 changes no bit of what is computed from tensors whose dtype is said."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import entmax, entmax_attention, entmax_attention_varlen, entmax_loss, inspection, linear_entmax_loss
from flash_entmax.anneal import AlphaAnnealing
from flash_entmax.nn import POSITIONS, AdaptiveTemperature, EntmaxAttention, rotation_of
from flash_entmax.testing import iid_inputs, topic_inputs

LENGTH, KEYS, WIDTH, FLOAT32 = 70, 90, 16, torch.float32


def number(value) -> torch.Tensor:
    return torch.tensor(value, dtype=FLOAT32)


def options_of_attention():
    """One call for each option."""
    lengths, heads = torch.tensor([50, KEYS]), number([0.1, 0.4])
    mask = create_block_mask(lambda b, h, q, k: (q - k).abs() % 9 < 5, None, None, LENGTH, KEYS, device="cpu")
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "other alpha": {"alpha": 1.3},
        "softmax": {"alpha": 1.0, "is_causal": True, "alibi_slopes": heads},
        "tensors": {"alpha": number([1.2, 1.7]), "scale": number(0.3)},
        "one tensor": {"alpha": number(1.4)},
        "window, softcap": {"window_size": (30, 5), "softcap": 2.0},
        "slopes": {"alibi_slopes": heads, "is_causal": True},
        "positions": {"query_positions": torch.arange(LENGTH).flip(0), "is_causal": True},
        "lengths": {"key_lengths": lengths},
        "mask": {"key_mask": torch.arange(KEYS) % 7 != lengths[:, None] % 7},
        "blocks": {"block_mask": mask},
    }


def attention(impl):
    for options in options_of_attention().values():
        yield from step(lambda *leaves: entmax_attention(*leaves, impl=impl, **options))  # noqa: B023
    support = entmax_attention(*inputs(), impl=impl, return_support=True)[1]
    yield from (*support[:4], support.keys, support.tau)


def inputs():
    return iid_inputs(2, 2, LENGTH, WIDTH, key_length=KEYS)


def step(call, leaves=None):
    leaves = [tensor.requires_grad_() for tensor in (inputs() if leaves is None else leaves)]
    output = call(*leaves)
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


def packed(impl):
    tokens = [tensor[0].transpose(0, 1) for tensor in iid_inputs(1, 2, LENGTH, WIDTH)]
    boundaries = torch.tensor([0, 30, 31, 60], dtype=torch.int32)
    options = {"is_causal": True, "alpha": number(1.3), "alibi_slopes": number([0.1, 0.0]), "impl": impl}
    return step(lambda *leaves: entmax_attention_varlen(*leaves, boundaries, None, 30, 30, **options), tokens)


def layers():
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=FLOAT32)
    for position in POSITIONS:
        for temperature in ("fixed", "adaptive")[: 1 if position == "alibi" else 2]:
            torch.manual_seed(0)
            layer = EntmaxAttention(
                WIDTH, 4, position=position, temperature=temperature, learn_alpha=True, bias=True, dtype=FLOAT32
            )
            yield from step(lambda x, *_: layer(x), [x.clone(), *layer.parameters()])  # noqa: B023
            yield layer(x[0], cu_seq=torch.tensor([0, 20, LENGTH]), max_seq=50).detach()
    yield rotation_of(torch.arange(9000, dtype=FLOAT32)[::1000], WIDTH)
    temperature = AdaptiveTemperature(WIDTH, 2, dtype=FLOAT32)
    yield temperature(x, torch.arange(LENGTH, dtype=FLOAT32), 4).detach()


def activations(impl):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2), dtype=FLOAT32)
    for alpha in (1.0, 1.3, 1.5, 2.0, number([[1.1], [1.2], [1.3], [1.5], [2.0]])):
        yield from step(lambda x: entmax(x, alpha, impl=impl), [x.clone()])  # noqa: B023


def losses(impl):
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, generator=generator, dtype=FLOAT32) for shape in ((9, 40), (30, 40)))
    target = torch.arange(9)
    target[4] = -100
    for options in ({}, {"label_smoothing": 0.1, "alpha": 1.3, "reduction": "sum"}):
        yield from step(lambda x: entmax_loss(x, target, impl=impl, **options), [x.clone()])  # noqa: B023
        yield from step(lambda x: entmax_loss(x, x.detach().softmax(-1), impl=impl, **options), [x.clone()])  # noqa: B023
        yield from step(
            lambda *leaves: linear_entmax_loss(*leaves, target, impl=impl, **options),  # noqa: B023
            [x.clone(), weight.clone()],
        )


def annealed():
    annealing = AlphaAnnealing(7)
    for _ in range(7):
        annealing.step()
        yield annealing.alpha.clone()


def inspected(impl):
    query, key, value = inputs()
    slopes = number([0.1, 0.4])
    with inspection.record() as calls:
        entmax_attention(query, key, value, impl=impl, alibi_slopes=slopes, alpha=number([1.2, 1.5]), is_causal=True)
    call = calls[0]
    rows = call.rows(1, 1)
    yield from (call.tau, call.keys_per_query, call.block_sparsity, call.block_sparsity_by_position, call.visible_tiles)
    yield call.key_density
    yield from (torch.tensor(call.visible_per_query, dtype=torch.float64), rows.crow_indices(), rows.col_indices())
    yield rows.values()
    no_query, key = (torch.zeros(1, 1, length, 4, dtype=FLOAT32) for length in (0, 3))
    yield inspection.attention_rows(no_query, key, impl=impl).values()


def made():
    yield from topic_inputs(1, 2, 130, 32, 4, wide_blocks=True)
    yield from iid_inputs(1, 2, 10, 8)


WORK = {
    "attention": lambda: attention("torch"),
    "reference": lambda: attention("reference"),
    "packed": lambda: packed("torch"),
    "layers": layers,
    "activations": lambda: activations("torch"),
    "losses": lambda: losses("torch"),
    "annealed": annealed,
    "inspected": lambda: inspected("torch"),
    "made": made,
}


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", WORK)
def test_the_default_dtype_changes_nothing(default_dtype, name, dtype):
    expected = list(WORK[name]())
    default_dtype(dtype)
    actual = list(WORK[name]())
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype, f"result {index}"
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), f"result {index}"
