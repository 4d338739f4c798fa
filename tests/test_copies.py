"""Copies of a model: each attends with the alpha of the model, however it was set and however the copy was made."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flash_entmax.anneal import AlphaAnnealing
from flash_entmax.nn import Entmax, EntmaxAttention

WIDTH, HEADS = 16, 2


class Model(nn.Module):
    """Two layers and an activation, which may be given an alpha from outside."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EntmaxAttention(WIDTH, HEADS, **options) for _ in range(2))
        self.activation = Entmax(learn_alpha=options.get("learn_alpha", False))

    def forward(self, x, alpha=None):
        for layer in self.layers:
            x = x + layer(x, alpha=alpha)
        return self.activation(x, alpha=alpha)


def model_of(kind) -> Model:
    """Not with the alpha that it is made with."""
    torch.manual_seed(0)
    model = Model(learn_alpha=kind == "learned")
    for index, module in enumerate((*model.layers, model.activation)):
        if kind == "learned":
            module.alpha_parameter.logit.data.add_(1.0 + index)
        else:
            module.alpha = 1.7 + 0.1 * index
    return model


def averaged(use_buffers):
    return lambda model: AveragedModel(model, use_buffers=use_buffers)


def loaded(assign):
    def load(model):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        other = Model(learn_alpha=model.activation.alpha_parameter.logit is not None)
        for mine, theirs in zip((*other.layers, other.activation), (*model.layers, model.activation), strict=True):
            if theirs.alpha_parameter.logit is None:
                mine.alpha = theirs.alpha  # an option, which the state does not hold
        other.load_state_dict(state, assign=assign)
        return other

    return load


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "average": averaged(False),
    "average of buffers": averaged(True),
    "state": loaded(False),
    "state, assigned": loaded(True),
}


@pytest.mark.parametrize("kind", ["number", "learned", "annealed"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_the_same(name, kind):
    model, x = model_of(kind), torch.randn(2, 20, WIDTH)
    alpha = AlphaAnnealing(10).alpha if kind == "annealed" else None
    copied = COPIES[name](model)
    assert torch.equal(copied(x, alpha=alpha), model(x, alpha=alpha))
    assert not torch.equal(copied(x, alpha=alpha), copied(x, alpha=torch.tensor(1.4))), "alpha matters"


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_weights_is_where_annealing_is(use_buffers):
    """As it moves, of weights that stay, the average computes what the model does."""
    model, annealing, x = Model(), AlphaAnnealing(3, 1.01, 2.0), torch.randn(2, 20, WIDTH)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    outputs = []
    for _ in range(3):
        annealing.step()
        average.update_parameters(model)
        outputs.append(average(x, alpha=annealing.alpha))
        torch.testing.assert_close(outputs[-1], model(x, alpha=annealing.alpha))
    assert not torch.equal(outputs[0], outputs[-1])


def test_an_average_of_weights_averages_a_learned_alpha():
    model = model_of("learned")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    before = model.activation.alpha_parameter.logit.item()
    model.activation.alpha_parameter.logit.data.sub_(1.0)
    average.update_parameters(model)
    assert average.module.activation.alpha_parameter.logit.item() == pytest.approx(before - 0.5)


def test_a_learned_alpha_is_replaced_as_any_parameter():
    model, other, x = model_of("learned"), Model(learn_alpha=True), torch.randn(2, 20, WIDTH)
    state = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(other, state, (x,)), model(x))
    without = {name: tensor for name, tensor in state.items() if not name.endswith("logit")}
    assert not torch.equal(torch.func.functional_call(other, without, (x,)), model(x))


def test_a_state_with_a_learned_alpha_is_not_loaded_without():
    learned, fixed = model_of("learned").state_dict(), model_of("number").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*alpha_parameter\.logit"):
        Model().load_state_dict(learned)
    with pytest.raises(RuntimeError, match=r"Missing key.*alpha_parameter\.logit"):
        Model(learn_alpha=True).load_state_dict(fixed)


def with_the_old_name(state) -> dict:
    return {name.replace("alpha_parameter.", "power."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_the_old_name_of_alpha_loads(assign):
    """Its key was ``power.logit``."""
    model, x = model_of("learned"), torch.randn(2, 20, WIDTH)
    state = with_the_old_name(model.state_dict())
    assert "activation.power.logit" in state
    other = Model(learn_alpha=True)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), model(x))
    assert "activation.power.logit" in state, "the caller's state is as it was"
    assert other.state_dict().keys() == model.state_dict().keys()


def test_a_state_with_the_old_name_of_alpha_is_not_loaded_where_it_has_no_place():
    state = model_of("learned").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*alpha_parameter\.logit"):
        Model().load_state_dict(with_the_old_name(state))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*power\.logit"):
        Model(learn_alpha=True).load_state_dict(state | with_the_old_name(state))


@pytest.mark.parametrize("given", [AlphaAnnealing(3).alpha, nn.Parameter(torch.tensor(1.5))])
@pytest.mark.parametrize("module", [Entmax(), EntmaxAttention(WIDTH, HEADS)], ids=["Entmax", "EntmaxAttention"])
def test_a_tensor_is_no_option_of_a_module(module, given):
    """As an attribute, a copy of the module would keep the number that it is today."""
    with pytest.raises(TypeError, match=r"alpha must be a number, got (Tensor|Parameter): pass a tensor to each call"):
        module.alpha = given
    assert module.alpha == 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.011, 1.05, 1.3, 1.5, 1.8, 1.99])
def test_what_16_bits_make_of_a_learned_alpha(alpha, dtype):
    """Nothing: a layer of 16 bits has an alpha of 32, and so has one that is cast. An optimizer keeps its parameter."""
    made = EntmaxAttention(WIDTH, HEADS, learn_alpha=True, alpha=alpha, dtype=dtype)
    cast = EntmaxAttention(WIDTH, HEADS, learn_alpha=True, alpha=alpha)
    logit = cast.alpha_parameter.logit
    cast = nn.Sequential(cast).to(dtype)[0]
    assert cast.alpha_parameter.logit is logit
    for layer in (made, cast):
        assert layer.query.weight.dtype == dtype
        assert layer.alpha_parameter.logit.dtype == torch.float32
        torch.testing.assert_close(layer.alpha, torch.full((HEADS,), alpha), rtol=1e-6, atol=0)


def test_a_learned_alpha_moves_in_a_layer_of_16_bits():
    layer = EntmaxAttention(WIDTH, HEADS, learn_alpha=True, alpha=1.9).bfloat16()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0)
    before = layer.alpha.detach()
    layer(torch.randn(2, 20, WIDTH, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    moved = (layer.alpha - before).abs()
    assert ((moved > 5e-5) & (moved < 5e-4)).all()


def test_a_layer_of_float64_has_an_alpha_of_float64():
    layer = EntmaxAttention(WIDTH, HEADS, learn_alpha=True, alpha=1.3, dtype=torch.float64)
    torch.testing.assert_close(layer.alpha, torch.full((HEADS,), 1.3, dtype=torch.float64), rtol=1e-12, atol=0)
