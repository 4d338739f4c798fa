"""Loads that are not the model that was saved: as softmax, by another entmax, or without alpha."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from torch import nn
from transformers import AutoModelForCausalLM
from transformers_models import ALPHAS, HEADS, assert_loads_as, decoder, logits, tokens

from flash_entmax.integrations import transformers as integration


def test_a_process_that_registers_late_or_never(tmp_path):
    """The load of what was saved is an error; a model that was built before says what to do."""
    decoder(1.3).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LATE, str(tmp_path)], capture_output=True, text=True, check=True)
    loading, before, running, name = done.stdout.splitlines()
    assert 'Specified `attn_implementation="entmax"` is not supported' in loading
    assert before == "None"  # saved as softmax
    assert "LlamaAttention belongs to a model that was built before register()" in running
    assert "call register(model)" in running
    assert name == "entmax15"


LATE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from flash_entmax.integrations.transformers import register

def attempt(do):
    try:
        do()
    except (ValueError, RuntimeError) as error:
        print(error)

attempt(lambda: LlamaForCausalLM.from_pretrained(sys.argv[1]))
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
model, ids = LlamaForCausalLM(config), torch.ones(1, 5, dtype=torch.long)
register()
model.set_attn_implementation("entmax15")
print(config.to_dict().get("attn_implementation"))
attempt(lambda: model(ids))
register(model)
model(ids)
print(config.to_dict()["attn_implementation"])
"""


@pytest.mark.parametrize("kind", ALPHAS)
def test_an_explicit_load_as_softmax_warns(kind, tmp_path):
    """And a weight that has no place is reported by Transformers; what is saved then is softmax."""
    decoder(ALPHAS[kind]()).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="saved with attn_implementation='entmax' and is loaded with 'sdpa', .*softmax"
    ):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="sdpa", output_loading_info=True
        )
    held = isinstance(ALPHAS[kind](), torch.Tensor)
    assert report["unexpected_keys"] == ({"model.entmax_alpha.value"} if held else set())
    loaded.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    if held:
        with pytest.raises(ValueError, match="'entmax' needs an alpha"):
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")(tokens(1, 20))


def test_alpha_that_is_missing_in_the_weights_is_not_made_up(tmp_path):
    model = decoder(nn.Parameter(torch.tensor(HEADS)))
    weights = {name: weight for name, weight in model.state_dict().items() if "alpha" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.entmax_alpha.value"}
    message = r"alpha of LlamaForCausalLM is missing in the weights .*call set_alpha\(model, alpha\)"
    for found in (copy.deepcopy(loaded), loaded):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                found(tokens(1, 20))
    loaded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(1, 20))
    integration.set_alpha(loaded, nn.Parameter(torch.tensor(HEADS)))
    assert torch.equal(logits(loaded, tokens(1, 20).fill_(5)), logits(model, tokens(1, 20).fill_(5)))


def test_an_alpha_far_out_of_its_range_is_loaded(tmp_path):
    """Weight decay takes it there."""
    model, ids = decoder(nn.Parameter(torch.tensor(HEADS))), tokens(1, 20)
    with torch.no_grad():
        model.model.entmax_alpha.value.copy_(torch.tensor([0.4, -1.0, 5.0, 0.0]))
    model.save_pretrained(tmp_path)
    assert_loads_as(tmp_path, model, ids)


def test_weights_are_assigned_to_a_model_without_numbers(tmp_path):
    model = decoder(nn.Parameter(torch.tensor(HEADS)))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.model.entmax_alpha.value, model.model.entmax_alpha.value)


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
@pytest.mark.parametrize("kind", ["tensor", "learned by head"])
def test_an_alpha_among_the_weights_is_dropped_by_attention_that_has_its_own(name, kind, tmp_path):
    """With a warning; the folder that is saved then declares no weight that it lacks."""
    ids = tokens(1, 20)
    decoder(ALPHAS[kind]()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"{tmp_path} was saved with an alpha among its weights, .*'{name}'.* dropped"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    loaded.save_pretrained(tmp_path)
    assert "held_by" not in (tmp_path / "config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_loads_as(tmp_path, loaded, ids)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")
    with pytest.raises(ValueError, match="'entmax' needs an alpha"):
        again(ids)


def test_each_folder_that_loads_as_softmax_is_named(tmp_path):
    """With Python's own filter, which shows a warning of the same words once."""
    for name in ("one", "other"):
        decoder(1.3).save_pretrained(tmp_path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for name in ("one", "other"):
            AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="sdpa")
    said = [str(warning.message) for warning in caught if "which is softmax" in str(warning.message)]
    assert len(said) == 2
    for name, text in zip(("one", "other"), said, strict=True):
        assert str(tmp_path / name) in text
        assert "leave out attn_implementation" in text
