"""Every public call on tensors without data: of the meta device, and PyTorch's fake ones. Shapes, and no value read."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flash_entmax import (
    entmax,
    entmax_attention,
    entmax_attention_varlen,
    entmax_loss,
    linear_entmax_loss,
    register_flop_formulas,
)
from flash_entmax.nn import EntmaxAttention


def drawn(*shape, device):
    return torch.randn(*shape, device=device, requires_grad=True)


def attention(device, alpha, impl, **options):
    shapes = (2, 4, 100, 16), (2, 2, 100, 16), (2, 2, 100, 8)
    return entmax_attention(*(drawn(*shape, device=device) for shape in shapes), alpha=alpha, impl=impl, **options)


def masked(device, alpha, impl):
    return attention(
        device, alpha, impl, key_lengths=torch.tensor([3, 4], device=device), window_size=(9, 2),
        key_mask=torch.ones(2, 100, dtype=torch.bool, device=device), alibi_slopes=torch.ones(4, device=device),
        query_positions=torch.arange(100, device=device),
    )  # fmt: skip


def packed(device, alpha, impl):
    query, key, value = (drawn(100, heads, 16, device=device) for heads in (4, 2, 2))
    cu_seq = torch.tensor([0, 40, 100], device=device)
    return entmax_attention_varlen(query, key, value, cu_seq, None, 60, 60, alpha=alpha, is_causal=True, impl=impl)


def layer(device, alpha, impl):
    module = EntmaxAttention(32, 4, position="nape", temperature="adaptive", learn_alpha=True, device=device)
    cu_seq = torch.tensor([0, 40, 100], device=device)
    return module(drawn(100, 32, device=device), cu_seq=cu_seq, max_seq=60, impl=impl)


ATTENTION = {"causal": lambda *call: attention(*call, is_causal=True), "masked": masked, "packed": packed}


def losses(device):
    target = torch.zeros(7, dtype=torch.int64, device=device)
    yield entmax_loss(drawn(7, 50, device=device), target, label_smoothing=0.1)
    yield entmax_loss(drawn(7, 50, device=device), torch.ones(7, 50, device=device) / 50)
    yield linear_entmax_loss(*(drawn(n, 16, device=device) for n in (7, 50)), target, bias=drawn(50, device=device))
    for alpha in (1, 1.3, torch.tensor(1.4, device=device)):
        yield entmax(drawn(7, 50, device=device), alpha)


@pytest.fixture(params=["meta", "fake"])
def device(request):
    if request.param == "meta":
        yield "meta"
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield "cpu"


def is_without_data(tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("alpha", [1.5, 1, "learned"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(device, name, alpha, impl):
    alpha = torch.full((4,), 1.5, device=device, requires_grad=True) if alpha == "learned" else alpha
    output = ATTENTION[name](device, alpha, impl)
    assert output.shape == ((100, 4, 16) if name == "packed" else (2, 4, 100, 8))
    assert is_without_data(output)
    output.sum().backward()


def test_layer_support_activations_and_losses(device):
    layer(device, 1.5, "auto").sum().backward()
    output, support = attention(device, 1.5, "auto", return_support=True)
    assert support.tiles.shape == (2, 4, 2, 2)
    for result in (output, *losses(device)):
        assert is_without_data(result)
        result.sum().backward()


def test_flops_of_packed_sequences_without_data():
    register_flop_formulas()
    counts = []
    for device in ("meta", "cpu"):
        with FlopCounterMode(display=False) as counter:
            packed(device, 1.5, "torch")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 4 * 100 * 100 * (16 + 16)
