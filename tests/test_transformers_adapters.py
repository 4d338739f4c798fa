"""Alpha and the adapters of PEFT: it is trained, saved and loaded with an adapter that has it, and else says so."""

import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers_models import make, tokens

from flash_entmax.integrations import transformers as integration

HEADS = [1.2, 1.4, 1.6, 1.8]
STARTS = {"learned": lambda: nn.Parameter(torch.full((4,), 1.5)), "not learned": lambda: torch.tensor(1.5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model that has softmax."""
    path = tmp_path_factory.mktemp("base")
    model = make("llama", model_class=AutoModelForCausalLM)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(path)
    return path


def base(folder, alpha=None, attention="entmax"):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    if alpha is not None:
        integration.set_alpha(model, alpha)
    return model


def lora(*modules):
    return LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(modules) or None, init_lora_weights=False)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def assert_loads_as(model, ids, folder, path, start):
    """As an adapter, by PEFT and by Transformers, and merged."""
    model.save_pretrained(path)
    loaded = PeftModel.from_pretrained(base(folder, start()), path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    native = base(folder, start())
    report = native.load_adapter(path)
    if not report.missing_keys:  # Transformers 5.17 loads no modules_to_save, and reports their weights as missing
        assert torch.equal(logits(native, ids), logits(model, ids))
    merged = loaded.merge_and_unload()
    merged.save_pretrained(path / "merged")
    again = AutoModelForCausalLM.from_pretrained(path / "merged")
    assert torch.equal(logits(again, ids), logits(merged, ids))


def train(model, path, **options):
    torch.manual_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 20)]
    arguments = TrainingArguments(
        str(path), per_device_train_batch_size=2, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, **options).train()


def test_a_learned_alpha_is_saved_with_its_adapter(folder, tmp_path):
    start = STARTS["learned"]
    model, ids = get_peft_model(base(folder, start()), lora("entmax_alpha")), tokens(2, 20)
    train(model, tmp_path)
    held = model.get_base_model().model.entmax_alpha.value
    assert held.requires_grad
    assert (held - 1.5).abs().min() > 1e-3
    assert_loads_as(model, ids, folder, tmp_path, start)


def test_an_annealed_alpha_is_saved_with_its_adapter(folder, tmp_path):
    """The callback is made for the model before it has the adapter, or after."""
    model, ids = base(folder), tokens(2, 20)
    callback = integration.AnnealAlpha(model, 1.1, 1.9, steps=4, shape="linear")
    model = get_peft_model(model, lora("entmax_alpha"))
    train(model, tmp_path, callbacks=[callback])
    assert model.get_base_model().model.entmax_alpha.value.item() == pytest.approx(1.5)
    assert_loads_as(model, ids, folder, tmp_path, STARTS["not learned"])
    callback = integration.AnnealAlpha(model, 1.8, 1.9, steps=2)
    assert model.get_base_model().model.entmax_alpha.value.item() == pytest.approx(1.8)
    train(model, tmp_path, callbacks=[callback])
    assert model.get_base_model().model.entmax_alpha.value.item() == pytest.approx(1.9)
    learned = get_peft_model(base(folder, STARTS["learned"]()), lora("entmax_alpha"))
    with pytest.raises(ValueError, match="AnnealAlpha has no tensor to move: alpha of the model is a Parameter"):
        integration.AnnealAlpha(learned, steps=2)


def test_set_alpha_takes_a_model_with_an_adapter(folder):
    """A number; a tensor works, with a warning that no adapter saves it."""
    model, ids = get_peft_model(base(folder), lora()), tokens(1, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        integration.set_alpha(model, 1.9)
    number = logits(model, ids)
    alpha = nn.Parameter(torch.tensor([1.9]))
    with pytest.warns(
        UserWarning, match=r'will not save it: call set_alpha .*modules_to_save=\["entmax_alpha"\]'
    ) as by:
        integration.set_alpha(model, alpha)
    assert by[0].filename == __file__
    with pytest.warns(UserWarning, match="will not save it: call AnnealAlpha first") as by:
        integration.AnnealAlpha(get_peft_model(base(folder), lora()), steps=2)
    assert __file__ in {warning.filename for warning in by if "AnnealAlpha" in str(warning.message)}
    torch.testing.assert_close(logits(model, ids), number)
    model(ids, labels=ids).loss.backward()
    assert alpha.grad.abs() > 0


def test_alpha_of_an_adapter_is_not_replaced_beside_it(folder):
    model, ids = get_peft_model(base(folder, STARTS["learned"]()), lora("entmax_alpha")), tokens(1, 20)
    before = logits(model, ids)
    for alpha in (1.3, torch.tensor(1.3)):
        with pytest.raises(ValueError, match=r"belongs to an adapter, ModulesToSaveWrapper: .*entmax_alpha\.value"):
            integration.set_alpha(model, alpha)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("attention", ["sdpa", "entmax"])
def test_an_adapter_with_alpha_needs_a_model_with_a_place_for_it(folder, tmp_path, attention):
    get_peft_model(base(folder, STARTS["learned"]()), lora("entmax_alpha")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the adapter has an alpha, .*attn_implementation='entmax'"):
        PeftModel.from_pretrained(base(folder, attention=attention), tmp_path)
