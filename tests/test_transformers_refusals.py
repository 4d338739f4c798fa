"""What the attention and the models refuse: options that entmax does not have, and models that would not use it."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    DebertaV2Config,
    DogeConfig,
    FalconConfig,
    FNetConfig,
    GPTNeoConfig,
    MambaConfig,
    ViTConfig,
)
from transformers.masking_utils import causal_mask_function
from transformers_models import SMALL, make, tokens

from flash_entmax.integrations import transformers as integration


def call(module=None, mask=None, lengths=(5, 5), **options):
    query, key = (torch.randn(1, 2, length, 8) for length in lengths)
    return integration.attention(module or torch.nn.Module(), query, key, key, mask, **{"alpha": 1.5} | options)


REFUSED = {
    "dropout": ({"dropout": 0.1}, "attention dropout is not supported, got 0.1: set it to 0 in the config"),
    "sinks": ({"s_aux": torch.ones(2)}, "s_aux was passed, got Tensor: attention sinks"),
    "position bias": ({"position_bias": torch.ones(1)}, "position_bias was passed, got Tensor"),
    "probabilities": ({"output_attentions": True}, "flash_entmax.inspection"),
    "paged cache": ({"cache": object()}, "continuous batching"),
    "unknown": ({"indices": torch.ones(1)}, r"indices is not known to this attention.*HARMLESS.add\('indices'\)"),
    "lengths": ({"lengths": (5, 7)}, "a causal mask for 5 queries and 7 keys"),
    "other lengths": ({"mask": integration.Mask(5, 6)}, "the mask is for 5 queries and 6 keys, but the layer has 5"),
    "both ways": (
        {"module": SimpleNamespace(is_causal=True), "mask": integration.Mask(5, 5, (-1, 0)), "is_causal": False},
        r"set config\.is_causal = False",
    ),
    "padded and packed": (
        {"mask": integration.Mask(5, 5, key_mask=torch.ones(1, 5) > 0), "cu_seq_lens_q": torch.tensor([0, 5])},
        "cu_seq_lens_q packs sequences without padding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(**options)
    assert call(position_ids=torch.arange(5), indices=None, output_attentions=False)[0].shape == (1, 5, 2, 8)


def test_models_that_ask_for_what_is_refused():
    ids = tokens(1, 10)
    with pytest.raises(ValueError, match="output_attentions"):
        make("bert", 1.5)(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        make("bert", 1.5, _output_attentions=True)(ids)
    with pytest.raises(ValueError, match=r"attn_pdrop.*by model"):
        make("gpt2", 1.5, attn_pdrop=0.2).train()(ids)


def test_transformers_is_missing_or_too_old(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("transformers.__version__", "5.3.0")
        with pytest.raises(ImportError, match=r"needs transformers 5\.17 or later, got 5\.3\.0: pip install"):
            integration.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[transformers\]", from a clone'):
        integration.register()


# Models that would not use entmax

TINY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
OF_OTHER_CODE = {
    "DebertaV2Model": DebertaV2Config(**TINY, intermediate_size=32),
    "BloomModel": BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4),
    "FalconModel": FalconConfig(**TINY),
    "GPTNeoModel": GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=1, attention_types=[[["global"], 1]]),
}
WITHOUT_ATTENTION = {
    "MambaModel": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1),
    "FNetModel": FNetConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1),
}


@pytest.mark.parametrize("name", OF_OTHER_CODE)
def test_models_that_never_ask_for_an_attention_function(name):
    """They are refused when they are built: by what their class says, and by their code."""
    with pytest.raises(ValueError, match=f"{name} cannot run attn_implementation='entmax15': .*Use .*'eager'"):
        AutoModel.from_config(OF_OTHER_CODE[name], attn_implementation="entmax15")
    assert AutoModel.from_config(OF_OTHER_CODE[name], attn_implementation="eager")(tokens(1, 5))


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_models_that_make_no_call(name):
    model, ids = AutoModel.from_config(WITHOUT_ATTENTION[name], attn_implementation="sparsemax"), tokens(1, 5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{name} ran without a call .*attn_implementation='sparsemax' has no"):
            model(ids)
    model.config._attn_implementation = "eager"
    assert model(ids).last_hidden_state.isfinite().all()


def test_a_part_without_attention_may_run_alone():
    """Only of the outermost model is it known that it should attend."""
    inner = AutoModel.from_config(WITHOUT_ATTENTION["FNetModel"], attn_implementation="entmax15")
    outer = make("llama", 1.5)
    outer.extra = inner
    assert outer(tokens(1, 5)).last_hidden_state.isfinite().all()
    assert inner(tokens(1, 5)).last_hidden_state.isfinite().all()


def test_a_model_whose_layers_alone_are_compiled_is_seen_to_call():
    torch._dynamo.reset()
    model, ids = make("bert", 1.5), tokens(1, 20)

    class OwnAttention(type(model.encoder.layer[0].attention.self)):
        """A class of which no call was seen."""

    for layer in model.encoder.layer:
        layer.attention.self.__class__ = OwnAttention
        layer.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert model(ids).last_hidden_state.isfinite().all()


def test_a_model_with_a_forward_of_its_own_is_seen_not_to_call():
    """Also after another of its class has called."""
    ids = tokens(1, 5)
    assert make("qwen3", 1.5)(ids)
    model = make("qwen3", 1.5)
    for layer in model.layers:
        layer.self_attn.forward = lambda hidden_states, **options: (hidden_states, None)
    with pytest.raises(RuntimeError, match="Qwen3Model ran without a call of its attention function"):
        model(ids)


def test_a_model_that_computes_with_its_mask_says_so():
    model = AutoModelForCausalLM.from_config(DogeConfig(**SMALL), attn_implementation="entmax15")
    with pytest.raises(AttributeError, match=r"computes with its attention mask .*'eager' or 'sdpa'"):
        model(tokens(1, 5))


COMPUTATIONS = {
    "attribute": lambda mask: mask.dtype,
    "method": lambda mask: mask.to(torch.float32),
    "index": lambda mask: mask[:, :, :, :3],
    "first": lambda mask: mask[0],
    "sum": lambda mask: mask + 1,
    "sum from the right": lambda mask: 1.0 - mask,
    "scores": lambda mask: torch.ones(1, 1, 5, 5) + mask,
    "scores in place": lambda mask: torch.ones(1, 1, 5, 5).add_(mask),
    "function": lambda mask: torch.where(mask, 0.0, -1.0),
    "list": lambda mask: torch.cat([mask, mask]),
    "fill": lambda mask: torch.ones(1, 1, 5, 5).masked_fill(mask, 0.0),
    "inversion": lambda mask: ~mask,
    "comparison": lambda mask: mask == 0,
    "comparison with a tensor": lambda mask: torch.ones(5) != mask,
    "order": lambda mask: mask < 0,
    "product": lambda mask: mask * 2,
    "attention": lambda mask: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 5, 8), mask),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_mask_is_no_tensor(name):
    mask = integration.mask(batch_size=1, q_length=5, kv_length=5, mask_function=causal_mask_function)
    with pytest.raises((TypeError, AttributeError), match=r"computes with its attention mask .*'eager' or 'sdpa'"):
        COMPUTATIONS[name](mask)


def test_a_mask_can_be_passed_on():
    mask = integration.mask(batch_size=1, q_length=5, kv_length=5, mask_function=causal_mask_function)
    assert mask == integration.Mask(5, 5, (-1, 0))
    assert mask != integration.Mask(5, 6, (-1, 0))
    assert mask is not None
    assert mask != None  # noqa: E711
    assert not hasattr(mask, "dtype")
    assert mask._replace(key_length=6).shape == (1, 1, 5, 6)
    assert len({mask, mask}) == 1


def test_a_model_without_numbers_of_layers_has_one_alpha():
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = AutoModel.from_config(config, attn_implementation="entmax")
    with pytest.raises(
        ValueError, match=r"the layers of this model have no numbers: give one alpha for all, got \[0, 1"
    ):
        integration.set_alpha(model, {0: 1.5, 1: 1.2})
