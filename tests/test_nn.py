"""Modules: the attention layer against a plain one, its learned numbers, packed and padded inputs."""

import copy
import math

import pytest
import torch
from conftest import Backend
from torch.utils._python_dispatch import TorchDispatchMode

from flash_entmax import entmax, entmax_attention, inspection
from flash_entmax.backends.reference import entmax_rows
from flash_entmax.nn import AdaptiveTemperature, Entmax, EntmaxAttention, EntmaxLoss

WIDTH, HEADS, LENGTH = 24, 4, 37
CPU = Backend("torch", "cpu")


def layer_of(backend, **options) -> EntmaxAttention:
    """A layer in which no parameter is at its start, so that each matters; a temperature by little."""
    torch.manual_seed(0)
    layer = EntmaxAttention(WIDTH, HEADS, **options).to(backend.device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.add_((0.1 if name.startswith("temperature") else 0.3) * torch.randn_like(parameter))
    return layer


def inputs(backend, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(backend.device)


def plain(layer: EntmaxAttention, x, hidden=None):
    """The layer by its formulas, for one sequence (length, width), head by head and row by row, in float64."""
    layer, x = layer.double(), x.double()
    length, size, heads = x.shape[0], layer.head_dim, layer.num_heads
    query, key, value = (p(x).view(length, -1, size) for p in (layer.query, layer.key, layer.value))
    alpha = layer.alpha if torch.is_tensor(layer.alpha) else [layer.alpha] * heads
    mixed = []
    for h in range(heads):
        g = h // (heads // layer.num_key_heads)
        q, k = query[:, h], key[:, g]
        if layer.position == "rope":
            q, k = turned(q, layer.rope_base), turned(k, layer.rope_base)
        slope = {"alibi": 2.0 ** (-8 * (h + 1) / heads), "nape": 1 / (h - heads // 2 + 1) if h >= heads // 2 else 0}
        slope = slope.get(layer.position, 0)
        scores = q @ k.mT / math.sqrt(size)
        if layer.temperature is not None and slope == 0:
            beta = torch.nn.functional.softplus(layer.temperature.beta(x)[:, h])
            gamma = 2 * torch.tanh(layer.temperature.gamma(x)[:, h])
            place = torch.arange(length, dtype=x.dtype)
            scores = scores * (1 + beta * torch.log(place + 2.0) ** gamma)[:, None]
        if layer.softcap:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        scores = scores - slope * (i - j).abs()
        unseen = (j > i) if layer.is_causal else torch.zeros(length, length, dtype=torch.bool)
        left = layer.window_size[0]
        unseen = unseen | (j < i - left) if left >= 0 else unseen
        unseen = unseen if hidden is None else unseen | hidden
        z = ((alpha[h] - 1) * scores).masked_fill(unseen, -torch.inf)
        mixed.append(entmax_rows(z, alpha[h])[0] @ value[:, g])
    output = layer.out(torch.stack(mixed, 1).flatten(1))
    if layer.output_norm is None:
        return output
    size = (output.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    return layer.output_norm.weight * output / size


def turned(x, base):
    """Rotary embedding by complex numbers."""
    half = x.shape[1] // 2
    place, pair = (torch.arange(n, dtype=x.dtype) for n in (x.shape[0], half))
    angle = place[:, None] * base ** (-pair / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), 1)


LAYERS = {
    "plain": {"position": "none"},
    "rope, grouped": {"num_key_heads": 2, "bias": True},
    "alibi, learned": {"position": "alibi", "learn_alpha": True, "alpha": 1.4},
    "nape, adaptive": {"position": "nape", "temperature": "adaptive", "num_key_heads": 1},
    "rope, adaptive, learned": {"temperature": "adaptive", "learn_alpha": True},
    "encoder, window": {"is_causal": False, "window_size": (5, -1), "head_dim": 10},
    "sparsemax, softcap": {"alpha": 2.0, "softcap": 1.5, "position": "nape"},
    "output norm": {"output_norm": True, "bias": True, "num_key_heads": 2},
    "rope of another base": {"rope_base": 100.0},
}


@pytest.mark.parametrize("name", LAYERS)
def test_against_a_plain_layer(backend, name):
    """Output, and the gradients of the input and of every parameter."""
    layer, x = layer_of(backend, **LAYERS[name]), inputs(backend, 2, LENGTH, WIDTH)
    x.requires_grad_()
    output = layer(x, impl=backend.impl)
    grad = inputs(backend, *output.shape, seed=1)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(output, leaves, grad)
    layer = layer.cpu()
    expected = torch.stack([plain(layer, row) for row in x.cpu()])
    torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-4, atol=2e-5)
    theirs = torch.autograd.grad(expected, [x, *layer.parameters()], grad.double().cpu())
    names = ["input", *(name for name, _ in layer.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            one.double().cpu(), other.double().cpu(), rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", LAYERS)
def test_in_float64(name):
    """No angle, slope or temperature is rounded to float32 on the way."""
    layer, x = layer_of(CPU, **LAYERS[name]).double(), inputs(CPU, LENGTH, WIDTH).double()
    torch.testing.assert_close(layer(x[None], impl="torch")[0], plain(layer, x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["rope, grouped", "nape, adaptive"])
def test_packed_sequences_are_separate(backend, name):
    """Positions, and the temperature that depends on them, start anew in each sequence."""
    layer = layer_of(backend, **LAYERS[name])
    lengths = [5, 0, 20, 1, 9]
    x = inputs(backend, sum(lengths), WIDTH)
    cu_seq = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=backend.device)
    packed = layer(x, cu_seq=cu_seq, max_seq=20, impl=backend.impl)
    alone = torch.cat([layer(part[None], impl=backend.impl)[0] for part in x.split(lengths) if len(part)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_an_output_norm(backend):
    """Outputs of one size at every length. Without it the layer has the weights that it had, in the same order."""
    layer = EntmaxAttention(WIDTH, HEADS, alpha=1.0, position="none", output_norm=True).to(backend.device)
    for length in (1, LENGTH):
        sizes = layer(inputs(backend, 2, length, WIDTH), impl=backend.impl).square().mean(-1)
        torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=1e-3, atol=1e-3)
    without = EntmaxAttention(WIDTH, HEADS)
    assert list(without.state_dict()) == [f"{name}.weight" for name in ("query", "key", "value", "out")]
    assert set(layer.state_dict()) - set(without.state_dict()) == {"output_norm.weight"}
    with pytest.raises(TypeError, match="output_norm must be True or False, got 'rms'"):
        EntmaxAttention(WIDTH, HEADS, output_norm="rms")


def test_padding(backend):
    layer, x = layer_of(backend, is_causal=False), inputs(backend, 2, LENGTH, WIDTH)
    lengths = torch.tensor([20, LENGTH], device=backend.device)
    mask = torch.arange(LENGTH, device=backend.device) < lengths[:, None]
    by_length, by_mask = layer(x, key_lengths=lengths, impl=backend.impl), layer(x, key_mask=mask, impl=backend.impl)
    torch.testing.assert_close(by_length, by_mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_length[0, :20], layer(x[:1, :20], impl=backend.impl)[0], rtol=1e-4, atol=1e-5)


def test_the_adaptive_temperature_starts_without_length(backend):
    """W and b are 0 at first: beta = ln 2 and gamma = 0, at every position; other heads have the factor 1."""
    temperature = AdaptiveTemperature(WIDTH, 2).to(backend.device)
    position = torch.arange(50.0, device=backend.device)
    factor = temperature(inputs(backend, 3, 50, WIDTH), position, HEADS)
    assert factor.shape == (3, 50, HEADS)
    torch.testing.assert_close(factor[..., :2], torch.full_like(factor[..., :2], 1 + math.log(2)))
    assert (factor[..., 2:] == 1).all()


def test_a_learned_alpha_starts_where_told_and_moves(backend):
    layer = EntmaxAttention(WIDTH, HEADS, learn_alpha=True, alpha=1.3).to(backend.device)
    torch.testing.assert_close(layer.alpha, torch.full((HEADS,), 1.3, device=backend.device))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    x = inputs(backend, 2, LENGTH, WIDTH)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x, impl=backend.impl).square().sum().backward()
        optimizer.step()
    assert (layer.alpha != 1.3).all()
    assert ((layer.alpha > 1.01) & (layer.alpha < 2)).all()
    again = EntmaxAttention(WIDTH, HEADS, learn_alpha=True).to(backend.device)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x, impl=backend.impl), layer(x, impl=backend.impl))


def test_other_dtypes_and_devices(backend):
    """16 bits round no slope and no alpha; a layer made on the meta device starts as any other."""
    options = {"position": "nape", "temperature": "adaptive", "learn_alpha": True, "alpha": 1.3}
    layer = EntmaxAttention(WIDTH, HEADS, device="meta", **options).to_empty(device=backend.device)
    layer.reset_parameters()
    torch.testing.assert_close(layer.alpha, torch.full((HEADS,), 1.3, device=backend.device))
    assert all((parameter == 0).all() for parameter in layer.temperature.parameters())
    x = inputs(backend, 2, LENGTH, WIDTH)
    half = copy.deepcopy(layer).to(torch.float16)
    with torch.no_grad():
        output = half(x.half(), impl=backend.impl)
        torch.testing.assert_close(output.float(), layer(x, impl=backend.impl), rtol=2e-2, atol=4e-3)
        assert half.alpha.dtype == torch.float32


@pytest.mark.parametrize(("position", "slope"), [("nape", 1 / 3), ("alibi", 2 ** (-8 / 6))])
def test_slopes_are_not_rounded_to_16_bits(position, slope):
    """6 heads have slopes that 16 bits do not hold."""
    half, x = EntmaxAttention(60, 6, position=position).bfloat16(), torch.randn(1, 9, 60).bfloat16()
    with inspection.record() as calls, torch.no_grad():
        half(x)
    assert (calls[0].problem.score.alibi_slopes - slope).abs().min() < 1e-7


def test_positions_are_not_rounded_to_16_bits():
    """bfloat16 holds whole numbers up to 256."""
    torch.manual_seed(0)
    half, x = EntmaxAttention(60, 6, head_dim=10).bfloat16(), torch.randn(1, 600, 60).bfloat16()
    with torch.no_grad():
        half.query.weight.mul_(3)
        half.key.weight.mul_(3)
        error = (half(x).float() - copy.deepcopy(half).float()(x.float())).abs().mean()
    assert error < 0.01


def test_a_temperature_is_not_rounded_to_16_bits():
    temperature, x = AdaptiveTemperature(8, 2), torch.randn(1, 3, 8).bfloat16()
    for parameter in temperature.parameters():
        torch.nn.init.normal_(parameter)
    half, position = temperature.bfloat16(), torch.tensor([1000, 1001, 1003])
    found, beta, gamma = half(x, position, 2), half.beta(x).float(), half.gamma(x).float()
    expected = 1 + torch.nn.functional.softplus(beta) * (position + 2.0).log()[:, None] ** (2 * gamma.tanh())
    torch.testing.assert_close(found, expected)


def test_an_alpha_for_one_call(backend):
    layer, x = layer_of(backend, learn_alpha=True), inputs(backend, 2, LENGTH, WIDTH)
    fixed = layer_of(backend, learn_alpha=True)
    fixed.alpha_parameter.logit.data.fill_(math.log(0.79 / 0.2))
    given = layer(x, alpha=torch.tensor(1.8, device=backend.device), impl=backend.impl)
    torch.testing.assert_close(given, fixed(x, impl=backend.impl), rtol=1e-4, atol=1e-5)


def test_compiled(backend):
    torch._dynamo.reset()
    layer = layer_of(backend, **LAYERS["nape, adaptive"])
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (20, 31):
        x = inputs(backend, 2, length, WIDTH)
        torch.testing.assert_close(
            compiled(x, impl=backend.impl), layer(x, impl=backend.impl), rtol=1e-4, atol=1e-5
        )  # fmt: skip


def test_activation_module(backend):
    x = inputs(backend, 3, 8, 5)
    assert torch.equal(Entmax(1.7, 1)(x), entmax(x, 1.7, 1))
    learned = Entmax(1.25, learn_alpha=True).to(backend.device)
    torch.testing.assert_close(learned(x), entmax(x, 1.25), rtol=1e-5, atol=1e-6)
    learned(x).square().sum().backward()
    assert learned.alpha_parameter.logit.grad != 0
    learned.alpha = 1.7
    assert torch.equal(learned(x), entmax(x, 1.7)), "a number in place of what was learned"
    assert not list(learned.parameters())
    assert "dim=1" in repr(Entmax(1.7, 1))


def test_a_layer_is_the_call(backend):
    """Without a position, the layer is projections around entmax_attention."""
    layer, x = layer_of(backend, position="none", num_key_heads=2), inputs(backend, 2, LENGTH, WIDTH)
    heads = (p(x).view(2, LENGTH, -1, layer.head_dim).transpose(1, 2) for p in (layer.query, layer.key, layer.value))
    mixed = entmax_attention(*heads, is_causal=True, impl=backend.impl)
    expected = layer.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, impl=backend.impl), expected, rtol=1e-5, atol=1e-6)


class Copies(TorchDispatchMode):
    """Elements that PyTorch copies from one layout to another."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("position", ["none", "rope"])
def test_a_layer_copies_no_layout(backend, position):
    """The gradients of query, key and value are stored as these are, so that the projections take them as they come."""
    layer = EntmaxAttention(64, 4, position=position).to(backend.device)
    x = inputs(backend, 2, LENGTH, 64).requires_grad_()
    output = layer(x, impl=backend.impl)
    with Copies() as copies:
        output.backward(output.detach())
    assert copies.elements < x.numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, or head_dim given, got 24, 5"),
        ({"num_key_heads": 3}, "num_heads must be a multiple of num_key_heads, got 4 and 3"),
        ({"position": "sinus"}, "position must be one of 'rope', 'alibi', 'nape', 'none', got 'sinus'"),
        ({"temperature": "hot"}, "temperature must be one of 'fixed', 'adaptive', got 'hot'"),
        ({"head_dim": 5}, "position='rope' needs an even head_dim, got 5"),
        ({"position": "alibi", "temperature": "adaptive"}, "temperature='adaptive' is for heads without slopes"),
        ({"alpha": 2.5}, r"alpha must be 1 \(softmax\), or from 1\.0001 to 2 \(sparsemax\), got 2\.5"),
        ({"alpha": 2.0, "learn_alpha": True}, "a learned alpha must start between 1.01 and 2.0, got 2.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        EntmaxAttention(WIDTH, **{"num_heads": HEADS} | options)


def test_a_loss_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="alpha must not be 1"):
        EntmaxLoss(1.0)


def test_wrong_input():
    layer = EntmaxAttention(WIDTH, HEADS)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, 24\), got \(3, 24\)"):
        layer(torch.ones(3, WIDTH))
    with pytest.raises(ValueError, match=r"x must have shape \(tokens, 24\), got \(2, 3, 24\)"):
        layer(torch.ones(2, 3, WIDTH), cu_seq=torch.tensor([0, 3]), max_seq=3)
    with pytest.raises(ValueError, match="cu_seq and max_seq must be given together"):
        layer(torch.ones(3, WIDTH), cu_seq=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="packed sequences have no padding"):
        layer(torch.ones(3, WIDTH), cu_seq=torch.tensor([0, 3]), max_seq=3, key_lengths=torch.tensor([3]))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        layer([1.0])
