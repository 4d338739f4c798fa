"""What is saved is what is loaded: attention and alpha, by a plain from_pretrained, bit for bit."""

import copy
import json
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    OPTConfig,
)
from transformers_models import ALPHAS, CONFIGS, HEADS, LENGTH, assert_loads_as, decoder, logits, make, tokens

from flash_entmax.integrations import transformers as integration


@pytest.mark.parametrize("kind", ALPHAS)
def test_alpha_is_saved_and_found_again(kind, tmp_path):
    alpha, ids = ALPHAS[kind](), tokens(2, 20)
    model = decoder(alpha)
    model.save_pretrained(tmp_path)
    loaded = assert_loads_as(tmp_path, model, ids)
    if isinstance(alpha, torch.Tensor):
        held = loaded.model.entmax_alpha.value
        assert held.dtype == torch.float32
        assert isinstance(held, nn.Parameter) == held.requires_grad == isinstance(alpha, nn.Parameter)
        with torch.no_grad():  # the layers ask for it
            held.fill_(1.9)
        assert not torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_attention_is_saved_without_a_pass_and_after_a_change(name, tmp_path):
    """By name alone; a model that goes back to softmax is saved as that."""
    torch.manual_seed(0)
    ids = tokens(2, 20)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    assert_loads_as(tmp_path, model, ids)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_other_decoders(name, tmp_path):
    ids = tokens(2, LENGTH)
    model = make(name, model_class=AutoModelForCausalLM)
    integration.set_alpha(model, nn.Parameter(torch.tensor(HEADS)))
    model.save_pretrained(tmp_path)
    assert_loads_as(tmp_path, model, ids)


def test_models_with_other_heads_find_alpha(tmp_path):
    model, ids = decoder(nn.Parameter(torch.tensor(HEADS))), tokens(2, 20)
    model.save_pretrained(tmp_path / "decoder")
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path / "decoder").eval()
        assert torch.equal(base(ids).last_hidden_state, hidden)
        base.save_pretrained(tmp_path / "base")
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(classifier.model(ids).last_hidden_state, hidden)


def clip_config() -> CLIPConfig:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPConfig(
        text_config=small | {"vocab_size": 97, "eos_token_id": 2},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )


def test_parts_of_a_model_take_the_alpha_of_the_whole(tmp_path):
    """Where they have no other."""
    config = clip_config()
    config.entmax_alpha, config.text_config.entmax_alpha = 1.7, 1.3
    model = CLIPModel._from_config(config, attn_implementation="entmax").eval()
    assert (model.config.text_config.entmax_alpha, model.config.vision_config.entmax_alpha) == (1.3, 1.7)
    inputs = {"input_ids": tokens(2, 20), "pixel_values": torch.randn(2, 3, 16, 16)}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = CLIPModel.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits_per_text, model(**inputs).logits_per_text)


def test_parts_of_a_model_keep_their_own_attention(tmp_path):
    """Here the text has entmax and the images have softmax; alpha is a number, then a weight of the whole."""
    torch.manual_seed(0)
    config, attention = clip_config(), {"text_config": "entmax", "vision_config": "sdpa"}
    model = CLIPModel._from_config(config, attn_implementation=attention).eval()
    inputs = {"input_ids": tokens(2, 20), "pixel_values": torch.randn(2, 3, 16, 16)}
    for alpha in (1.3, nn.Parameter(torch.tensor(1.8))):
        integration.set_alpha(model, alpha)
        model.save_pretrained(tmp_path)
        loaded = CLIPModel.from_pretrained(tmp_path).eval()
        assert loaded.config.text_config._attn_implementation == "entmax"
        assert loaded.config.vision_config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits_per_text, model(**inputs).logits_per_text)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", ["tensor", "learned by head"])
def test_alpha_has_the_same_place_however_it_came(name, kind, tmp_path):
    """Optimizers save their state by the order of parameters. Behind the first part, whose dtype is the model's."""
    model = make(name)
    integration.set_alpha(model, ALPHAS[kind]())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert [of for of, _ in loaded.named_parameters()] == [of for of, _ in model.named_parameters()]
    assert next(of for of, _ in loaded.named_children()) != "entmax_alpha"
    assert [type(part) for part in loaded.modules()] == [type(part) for part in model.modules()]


def test_alpha_follows_the_only_part_of_a_model(tmp_path):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        attention_dropout=0.0,
    )  # fmt: skip
    model, ids = AutoModel.from_config(config, attn_implementation="entmax"), tokens(2, 20)
    integration.set_alpha(model, ALPHAS["learned by head"]())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for found in (model, loaded):
        assert [name for name, _ in found.named_children()] == ["decoder", "entmax_alpha"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).last_hidden_state, model.eval()(ids).last_hidden_state)


def test_a_model_stays_bfloat16_from_save_to_save(tmp_path):
    decoder(ALPHAS["learned by head"]()).save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tokens(2, 20)
    wanted = logits(model, ids)
    for _ in range(3):
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.entmax_alpha.value.dtype == torch.float32
        assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_alpha_keeps_its_digits_in_models_of_other_dtypes(dtype, tmp_path):
    alpha, ids = torch.tensor(HEADS, dtype=torch.promote_types(dtype, torch.float32)), tokens(2, 20)
    decoder(1.5).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    integration.set_alpha(model, alpha)
    model.save_pretrained(tmp_path)
    loaded = assert_loads_as(tmp_path, model, ids)
    assert loaded.dtype == dtype
    assert loaded.model.entmax_alpha.value.dtype == alpha.dtype
    assert torch.equal(loaded.model.entmax_alpha.value, alpha)


def test_a_new_model_of_a_saved_config_starts_as_that_model_did(tmp_path):
    model = decoder(nn.Parameter(torch.tensor(HEADS)))
    with torch.no_grad():
        model.model.entmax_alpha.value.fill_(1.9)
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert fresh.model.entmax_alpha.value.tolist() == torch.tensor(HEADS).tolist()
    assert logits(fresh, tokens(1, 20)).isfinite().all()


# The config


def test_a_number_stands_in_the_config_before_the_model_is_built(tmp_path):
    model, ids = decoder(1.7), tokens(1, 20)
    wanted = logits(model, ids)
    model.set_attn_implementation("sdpa")
    model.config.entmax_alpha = None
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.entmax_alpha = 1.7
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="entmax")
    assert torch.equal(logits(loaded, ids), wanted)


def test_what_a_folder_declares(tmp_path):
    declared = {}
    for kind, alpha in ALPHAS.items():
        decoder(alpha()).save_pretrained(tmp_path)
        declared[kind] = integration.saved_attention(AutoConfig.from_pretrained(tmp_path))
    assert declared == {
        "number": ("entmax", 1.3),
        "by layer": ("entmax", "by layer, 1.2 to 1.9"),
        "tensor": ("entmax", "a tensor, one for all heads, among the weights"),
        "tensor by head": ("entmax", "a tensor, one for each of 4 heads, among the weights"),
        "learned": ("entmax", "learned, one for all heads, among the weights"),
        "learned by head": ("entmax", "learned, one for each of 4 heads, among the weights"),
    }
    model = decoder(1.3)
    model.set_attn_implementation("sparsemax")
    model.save_pretrained(tmp_path)
    assert integration.saved_attention(AutoConfig.from_pretrained(tmp_path)) == ("sparsemax", 2.0)
    assert integration.saved_attention(CONFIGS["bert"]) is None


def test_a_softmax_model_is_saved_as_ever_but_for_one_key(tmp_path):
    """A null where no entmax attention is: what was written before register() is not known at that time."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key for key in written if "attn" in key or "entmax" in key} == {"attn_implementation"}
    assert written["attn_implementation"] is None
    assert "attn" not in (tmp_path / "generation_config.json").read_text()
