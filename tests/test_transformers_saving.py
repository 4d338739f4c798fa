"""What is saved is what is loaded: attention and alpha, by a plain from_pretrained, bit for bit."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4")
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
    Trainer,
    TrainingArguments,
)
from transformers_models import CONFIGS, LENGTH, make, tokens

from flash_entmax.integrations import transformers as integration

HEADS = [1.2, 1.4, 1.6, 1.8]
ALPHAS = {
    "number": lambda: 1.3,
    "by layer": lambda: {0: 1.2, 1: 1.9},
    "tensor": lambda: torch.tensor(1.3),
    "tensor by head": lambda: torch.tensor(HEADS),
    "learned": lambda: nn.Parameter(torch.tensor(1.3)),
    "learned by head": lambda: nn.Parameter(torch.tensor(HEADS)),
}


def decoder(alpha=None):
    model = make("llama", model_class=AutoModelForCausalLM)
    if alpha is not None:
        integration.set_alpha(model, alpha)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def assert_loads_as(folder, model, ids):
    """Also when what was loaded is saved again."""
    for times in ("once", "twice"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == model.config._attn_implementation, times
        assert torch.equal(logits(loaded, ids), logits(model, ids)), times
        loaded.save_pretrained(folder)
    return loaded


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


def test_parts_of_a_model_keep_their_own_attention(tmp_path):
    """Here the text has entmax and the images have softmax; alpha is a number, then a weight of the whole."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 97, "eos_token_id": 2},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    attention = {"text_config": "entmax", "vision_config": "sdpa"}
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


# The Trainer


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        learning_rate=1e-3, seed=0, **options,
    )  # fmt: skip


def rows(count):
    torch.manual_seed(1)
    return [{"input_ids": row, "labels": row} for row in tokens(count, 20)]


def test_a_trainer_saves_the_alpha_of_its_step_and_resumes_there(tmp_path):
    ids, trained = tokens(2, 20), {}
    for name, checkpoint in (("whole", None), ("resumed", True)):
        model = decoder()
        callback = integration.AnnealAlpha(model, 1.1, 1.9, steps=8, shape="linear")
        options = arguments(tmp_path / "run", max_steps=4, save_steps=2)
        trainer = Trainer(model, options, train_dataset=rows(8), callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2") if checkpoint else None)
        trainer.save_model(tmp_path / name)
        assert model.model.entmax_alpha.value.item() == pytest.approx(1.5)
        trained[name] = logits(model, ids)
        assert_loads_as(tmp_path / name, model, ids)
    assert torch.equal(trained["whole"], trained["resumed"])
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert half.model.entmax_alpha.value.item() == pytest.approx(1.3)


@pytest.mark.parametrize("options", [{}, {"optim": "adamw_torch"}], ids=["default", "adamw_torch"])
def test_training_goes_on_from_the_folder_as_if_it_had_not_stopped(options, tmp_path):
    """With the model loaded from the checkpoint, and with one made as before."""
    ids, options = tokens(2, 20), arguments(tmp_path, max_steps=4, save_steps=2, **options)
    whole = decoder(ALPHAS["learned by head"]())
    Trainer(whole, options, train_dataset=rows(8)).train()
    folder = str(tmp_path / "checkpoint-2")
    for model in (AutoModelForCausalLM.from_pretrained(folder), decoder(ALPHAS["learned by head"]())):
        Trainer(model, options, train_dataset=rows(8)).train(resume_from_checkpoint=folder)
        for (name, weight), (other, trained) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(weight, trained), name
        assert torch.equal(logits(model, ids), logits(whole, ids))


def test_alpha_is_left_out_of_weight_decay(tmp_path):
    """As adoption.md says it."""

    class AlphaTrainer(Trainer):
        def get_decay_parameter_names(self, model):
            names = super().get_decay_parameter_names(model)
            return [name for name in names if not name.endswith("entmax_alpha.value")]

    model = decoder(nn.Parameter(torch.tensor(HEADS)))
    decayed = {}
    for kind in (Trainer, AlphaTrainer):
        groups = kind(model, arguments(tmp_path, weight_decay=0.1)).create_optimizer().param_groups
        weights = [weight for group in groups if group["weight_decay"] for weight in group["params"]]
        decayed[kind] = any(weight is model.model.entmax_alpha.value for weight in weights)
    assert decayed == {Trainer: True, AlphaTrainer: False}


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


def test_a_trainer_learns_alpha_and_saves_it(tmp_path):
    model, ids = decoder(nn.Parameter(torch.tensor(HEADS))), tokens(2, 20)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=rows(4))
    trainer.train()
    trainer.save_model(tmp_path)
    assert model.model.entmax_alpha.value.tolist() != torch.tensor(HEADS).tolist()
    assert_loads_as(tmp_path, model, ids)


# Loads that would be softmax


def test_a_process_that_registers_late_or_never(tmp_path):
    """The load of what was saved is an error; a model that was built before says what to do."""
    decoder(1.3).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LATE, str(tmp_path)], capture_output=True, text=True, check=True)
    loading, running, name = done.stdout.splitlines()
    assert 'Specified `attn_implementation="entmax"` is not supported' in loading
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
        assert "leave attn_implementation away" in text


# The config


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
