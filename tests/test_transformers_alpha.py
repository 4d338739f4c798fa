"""Alpha of a model of Transformers: what it may be, how the layers find it, and that it follows the model."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModel, AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from transformers_models import (
    CONFIGS,
    assert_loads_as,
    assert_same,
    decoder,
    logits,
    make,
    tokens,
    with_implementation,
)

from flash_entmax.integrations import transformers as integration
from flash_entmax.integrations.transformers.alpha import alpha_of

HEADS = [1.2, 1.4, 1.6, 1.8]


def learned(model_class=AutoModel, name="llama"):
    model = make(name, model_class=model_class)
    integration.set_alpha(model, nn.Parameter(torch.tensor(HEADS)))
    return model


def output(model, ids):
    with torch.no_grad():
        return model(ids).last_hidden_state


def test_a_learned_alpha_of_all_layers():
    """One parameter of the model, by head, with its exact gradient."""
    model, ids = make("bert").double(), tokens(2, 20)
    alpha = nn.Parameter(torch.tensor(HEADS, dtype=torch.float64))
    before = len(list(model.parameters()))
    integration.set_alpha(model, alpha)
    assert [name for name, parameter in model.named_parameters() if parameter is alpha] == ["entmax_alpha.value"]
    assert len(list(model.parameters())) == before + 1

    def loss():
        return model(ids).last_hidden_state.sin().sum()

    gradient = torch.autograd.grad(loss(), alpha)[0]
    with torch.no_grad():
        for head in range(4):
            sides = []
            for step in (1e-6, -1e-6):
                alpha[head] += step
                sides.append(loss())
                alpha[head] -= step
            assert gradient[head].item() == pytest.approx((sides[0] - sides[1]).item() / 2e-6, rel=1e-3)
    integration.set_alpha(model, 1.5)
    assert len(list(model.parameters())) == before
    assert torch.equal(output(model, ids), with_implementation(model, "entmax15", lambda: output(model, ids)))


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
@pytest.mark.parametrize("kind", [torch.Tensor.clone, nn.Parameter])
def test_a_tensor_is_the_number_that_it_holds(kind, shape):
    model, ids = make("llama", 1.3), tokens(1, 20)
    number = output(model, ids)
    integration.set_alpha(model, kind(torch.full(shape, 1.3)))
    assert_same(output(model, ids), number, tolerance=1e-5)
    assert model.entmax_alpha.value.dim() == (0 if kind is not nn.Parameter and shape == () else 1)


def test_alpha_by_layer():
    model, ids = make("bert", 1.5), tokens(1, 20)
    first = output(model, ids)
    integration.set_alpha(model, {0: 1.9, 1: 1.5})
    second = output(model, ids)
    assert (first - second).abs().max() > 1e-2
    assert_same(second, with_implementation(model, "oracle", lambda: output(model, ids)))


def test_a_model_with_a_head_holds_alpha_in_its_base_model():
    model = learned(AutoModelForCausalLM)
    assert [name for name in model.state_dict() if "alpha" in name] == ["model.entmax_alpha.value"]


# What follows the model


def test_functional_call_replaces_alpha_and_has_its_gradient():
    model, ids = learned(), tokens(1, 20)
    other = torch.full((4,), 1.9, requires_grad=True)
    hidden = torch.func.functional_call(model, {"entmax_alpha.value": other}, (ids,)).last_hidden_state
    gradient = torch.autograd.grad(hidden.sin().sum(), other)[0]
    integration.set_alpha(model, nn.Parameter(torch.full((4,), 1.9)))
    assert torch.equal(hidden, model(ids).last_hidden_state)
    wanted = torch.autograd.grad(model(ids).last_hidden_state.sin().sum(), model.entmax_alpha.value)[0]
    assert torch.equal(gradient, wanted)
    assert gradient.abs().min() > 0


def test_assigned_weights_replace_alpha():
    model, other, ids = learned(), learned(), tokens(1, 20)
    with torch.no_grad():
        other.entmax_alpha.value.fill_(1.9)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(output(model, ids), output(other, ids))
    model(ids).last_hidden_state.sum().backward()
    assert model.entmax_alpha.value.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_alpha(copied):
    """Before the first pass and after it, as the first takes a check away; a layer alone keeps its owner."""
    model, ids = learned(), tokens(1, 20)
    early = copied(model)
    before = output(model, ids)
    late = copied(model)
    for twin in (early, late):
        assert torch.equal(output(twin, ids), before)
        twin(ids).last_hidden_state.sum().backward()
        assert twin.entmax_alpha.value.grad.abs().sum() > 0
        with torch.no_grad():
            twin.entmax_alpha.value.fill_(1.9)
        assert not torch.equal(output(twin, ids), before)
    assert torch.equal(output(model, ids), before)
    assert model.entmax_alpha.value.grad is None
    layer = copy.deepcopy(model.layers[0].self_attn)
    assert layer.entmax_owner.model is model


def test_an_average_of_models_follows_an_alpha_that_moves():
    model, ids, alpha = make("llama"), tokens(1, 20), torch.tensor(1.1)
    integration.set_alpha(model, alpha)
    average = AveragedModel(model)
    alpha.fill_(1.9)
    average.update_parameters(model)
    assert torch.equal(output(average.module, ids), output(model, ids))


def test_a_layer_that_comes_later_finds_alpha():
    model, ids = learned(), tokens(1, 20)
    wanted = output(model, ids)
    twin = copy.deepcopy(make("llama", 1.5).layers[1])
    twin.load_state_dict(model.layers[1].state_dict())
    twin.self_attn.config = model.config
    model.layers[1] = twin
    assert torch.equal(output(model, ids), wanted)


@pytest.mark.parametrize("kind", [torch.Tensor.clone, nn.Parameter])
def test_alpha_is_moved_but_not_narrowed(kind):
    """And it is the tensor that was given, which may be changed in place."""
    model, alpha = make("llama"), kind(torch.tensor([1.3]))
    integration.set_alpha(model, alpha)
    model.to(torch.bfloat16)
    assert model.entmax_alpha.value is alpha
    assert alpha.dtype == torch.float32
    assert alpha.item() == torch.tensor(1.3).item()
    model.double()
    assert model.entmax_alpha.value is alpha
    assert alpha.dtype == torch.float64
    assert model.to("meta").entmax_alpha.value.is_meta


def test_models_made_of_several_devices_get_alpha_where_they_are():
    model, ids = make("llama"), tokens(1, 20)
    integration.set_alpha(model, torch.tensor(1.5))
    alpha = alpha_of(model.layers[0].self_attn, torch.device("meta"))
    assert alpha.is_meta
    assert output(model, ids).isfinite().all()


# Compiled, exported, without numbers


def test_a_learned_alpha_in_a_compiled_model():
    torch._dynamo.reset()
    model, ids = learned(), tokens(2, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradient(run):
        return torch.autograd.grad(run(ids, use_cache=False).last_hidden_state.sin().sum(), model.entmax_alpha.value)[0]

    assert_same(gradient(compiled), gradient(model))
    with torch.no_grad():
        model.entmax_alpha.value.fill_(1.9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(gradient(compiled), gradient(model))


def test_a_learned_alpha_is_exported_as_a_weight():
    model, ids = learned(name="bert"), tokens(1, 20)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), strict=False)
        assert "entmax_alpha.value" in program.state_dict
        assert_same(program.module()(ids).last_hidden_state, output(model, ids))


def test_shapes_of_a_model_without_numbers():
    """As for estimates of memory; a saved model is one that has its alpha from the config."""
    config = learned(AutoModelForCausalLM).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        assert model(tokens(1, 5).to("meta")).logits.shape == (1, 5, 97)
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        assert model(torch.ones(1, 5, dtype=torch.long)).logits.shape == (1, 5, 97)


def test_a_model_without_numbers_takes_an_alpha_without_numbers():
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(CONFIGS["llama"]), attn_implementation="entmax")
    with pytest.raises(ValueError, match="on the device of the model, meta, got cpu"):
        integration.set_alpha(model, torch.tensor(1.5))
    for kind in (torch.Tensor.clone, nn.Parameter):
        integration.set_alpha(model, kind(torch.empty(4, device="meta")))
        assert model(tokens(1, 5).to("meta")).last_hidden_state.shape == (1, 5, 32)


# What is refused

REFUSED = {
    "number": (2.5, ValueError, r"1 \(softmax\), or from 1\.0001 to 2 \(sparsemax\), got 2\.5"),
    "text": ("1.5", TypeError, "a number, a tensor with one for each head, or a dict of .* each layer, got '1.5'"),
    "list": ([1.5, 1.5], TypeError, "a tensor with one for each head, or a dict of numbers for each layer, got list"),
    "truth": (True, TypeError, "got True"),
    "tensor out of range": (torch.tensor(5.0), ValueError, r"a tensor alpha must be in \[1\.01, 2\], got 5\.0"),
    "tensor below": (torch.tensor([1.2, 1.0, 1.5, 1.5]), ValueError, r"in \[1\.01, 2\], got \[1\.2"),
    "not a number": (torch.tensor(float("nan")), ValueError, "got nan"),
    "integers": (torch.tensor(2), TypeError, r"floating-point tensor, got torch\.int64"),
    "heads": (torch.full((3,), 1.5), ValueError, r"shape of \(\), \(1,\), \(4,\) \(heads\), got \(3,\)"),
    "dimensions": (torch.full((4, 1), 1.5), ValueError, r"got \(4, 1\)"),
    "device": (torch.tensor(1.5, device="meta"), ValueError, "on the device of the model, cpu, got meta"),
    "layers": ({0: 1.5}, ValueError, r"must have the layers \[0, 1\] of the model, got \[0\]"),
    "layer": (
        {0: 1.5, 1: 3.0},
        ValueError,
        r"alpha\[1\] must be 1 \(softmax\), or from 1\.0001 to 2 \(sparsemax\), got 3",
    ),
    "tensors by layer": ({0: 1.5, 1: torch.tensor(1.5)}, TypeError, r"alpha\[1\] must be a number"),
    "names of layers": ({"0": 1.5, "1": 1.5}, TypeError, "must be the indices of layers, got '0'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_alpha_may_not_be(name):
    alpha, error, message = REFUSED[name]
    model, ids = learned(), tokens(1, 20)
    before = output(model, ids)
    with pytest.raises(error, match=message):
        integration.set_alpha(model, alpha)
    assert torch.equal(output(model, ids), before)


def test_layers_without_an_index_take_no_alpha_of_their_own():
    """Whisper numbers the layers of its decoder alone."""
    small = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    small |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "vocab_size": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration._from_config(
        WhisperConfig(**small, **ends, max_source_positions=16), attn_implementation="entmax"
    )
    with pytest.raises(ValueError, match=r"got \[0, 1\], and 2 WhisperAttention have none: set one number"):
        integration.set_alpha(model, {0: 1.5, 1: 1.5})
    assert getattr(model.config, "entmax_alpha", None) is None
    integration.set_alpha(model, 1.5)
    text = torch.ones(1, 4, dtype=torch.long)
    assert model(input_features=torch.randn(1, 8, 32), decoder_input_ids=text).logits.isfinite().all()


def test_the_ends_of_the_range_are_taken():
    model = make("llama")
    for end in (1.01, 2.0):
        integration.set_alpha(model, torch.tensor(end))


def test_models_that_have_no_alpha():
    model, ids = make("llama"), tokens(1, 20)
    with pytest.raises(ValueError, match="'entmax' needs an alpha: set entmax_alpha of the LlamaConfig"):
        model(ids)
    for wrong in ([1.5, 1.6], "1.5"):
        with pytest.raises(
            TypeError, match=r"config\.entmax_alpha must be a number, or a dict of numbers by layer, got"
        ):
            make("llama", wrong)(ids)
    with pytest.raises(ValueError, match=r"or from 1\.0001 to 2 \(sparsemax\), got 2\.5"):
        make("llama", 2.5)(ids)
    for name in ("eager", "entmax15"):
        other = AutoModel.from_config(copy.deepcopy(CONFIGS["bert"]), attn_implementation=name)
        message = rf"'entmax', got '{name}': call model\.set_attn_implementation\('entmax'\) first"
        with pytest.raises(ValueError, match=f"set_alpha needs .*{message}"):
            integration.set_alpha(other, 1.5)
        with pytest.raises(ValueError, match=f"AnnealAlpha needs .*{message}"):
            integration.AnnealAlpha(other, steps=2)


@pytest.mark.parametrize("alpha", [1.9, {0: 1.9}, torch.tensor(1.9)], ids=["number", "by layer", "tensor"])
def test_a_layer_alone_gets_no_alpha(alpha):
    """Its config is that of all layers."""
    model = make("llama", 1.5)
    for part in (model.layers[0], model.layers[0].self_attn):
        message = (
            rf"whole model of Transformers, got {type(part).__name__}: use set_alpha\(model, {{layer index: alpha}}\)"
        )
        with pytest.raises(ValueError, match=message):
            integration.set_alpha(part, alpha)
    assert model.config.entmax_alpha == 1.5


def test_a_module_around_a_model_is_taken():
    model = make("llama", 1.5)
    integration.set_alpha(nn.Sequential(model), 1.9)
    assert model.config.entmax_alpha == 1.9


@pytest.mark.parametrize("other", ["llama", None, 1.5])
def test_what_is_no_model(other):
    with pytest.raises(TypeError, match=f"set_alpha takes a model of Transformers, got {other!r}"):
        integration.set_alpha(other, 1.5)
    with pytest.raises(TypeError, match=f"AnnealAlpha takes a model of Transformers, got {other!r}"):
        integration.AnnealAlpha(other, steps=2)
    with pytest.raises(TypeError, match=f"register takes models of Transformers, got {other!r}"):
        integration.register(other)


def test_numbers_of_numpy_are_saved_as_numbers():
    model, ids = make("llama"), tokens(1, 20)
    for alpha, saved in ((np.float32(1.5), 1.5), ({0: np.float64(1.2), 1: np.int64(2)}, {"0": 1.2, "1": 2.0})):
        integration.set_alpha(model, alpha)
        assert json.loads(model.config.to_json_string())["entmax_alpha"] == saved
        assert output(model, ids).isfinite().all()


def test_a_tensor_in_the_config_says_where_it_belongs():
    model = make("llama", 1.5)
    model.config.entmax_alpha = torch.tensor(1.5)
    with pytest.raises(
        TypeError, match=r"config\.entmax_alpha holds numbers, got Tensor: use set_alpha\(model, tensor\)"
    ):
        model(tokens(1, 5))


def test_an_alpha_that_would_not_be_saved():
    """An attribute of a layer; and a weight that the config declares, and no module has."""
    model, ids = make("llama", 1.5), tokens(1, 20)
    model.layers[1].self_attn.entmax_alpha = 1.9
    with pytest.raises(ValueError, match=r"LlamaAttention has an attribute entmax_alpha.*\{layer index: alpha\}"):
        model(ids)
    model = learned()
    del model.entmax_alpha
    with pytest.raises(ValueError, match="alpha is a weight of LlamaModel, but LlamaAttention is in none"):
        model(ids)
    model.config.entmax_alpha = {"0": 1.5}
    with pytest.raises(ValueError, match="no alpha for the layer_idx 1 of LlamaAttention"):
        model(ids)


@pytest.mark.parametrize("given", [None, (1.2, 1.5)])
def test_a_learned_alpha_is_clamped_to_the_range_that_is_saved(given, tmp_path):
    """What an optimizer moves too far is at the end of the range, with gradient 0; so it is in the folder."""
    model = decoder()
    integration.set_alpha(model, nn.Parameter(torch.tensor([1.3, 1.4, 1.4, 1.4])), given)
    own, ids = model.model.entmax_alpha.value, tokens(1, 12)
    with torch.no_grad():
        own[0] = 7.0
    model(ids).logits.square().sum().backward()
    assert own.grad[0] == 0
    assert (own.grad[1:] != 0).all()
    limited = decoder(torch.tensor([given[1] if given else 2.0, 1.4, 1.4, 1.4]))
    torch.testing.assert_close(logits(model, ids), logits(limited, ids))
    model.save_pretrained(tmp_path)
    assert_loads_as(tmp_path, model, ids)


def test_a_tensor_that_is_not_learned_is_refused_outside():
    model = decoder(torch.tensor(1.3))
    model.model.entmax_alpha.value.fill_(7.0)
    with pytest.raises(ValueError, match=r"a tensor alpha must be in \[1\.01, 2\], got 7"):
        model(tokens(1, 12))
    with pytest.raises(ValueError, match="alpha_range is for a Parameter, which is learned, got alpha"):
        integration.set_alpha(model, 1.5, (1.2, 1.5))
    with pytest.raises(ValueError, match=r"alpha_range must be within \[1\.01, 2\], got \(1, 2\)"):
        integration.set_alpha(model, nn.Parameter(torch.tensor(1.5)), (1, 2))
    with pytest.raises(ValueError, match=r"alpha must start within alpha_range, \(1\.6, 1\.8\), got 1\.5"):
        integration.set_alpha(model, nn.Parameter(torch.tensor(1.5)), (1.6, 1.8))
