"""Alpha that moves while the Trainer trains."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers_models import make, tokens

from flash_entmax.integrations import transformers as integration


def train(folder, callback, model, **options):
    torch.manual_seed(1)
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True, learning_rate=1e-3, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(6, 20)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer.state.log_history


def test_annealing_while_the_trainer_trains(tmp_path, capsys):
    """With gradient checkpoints the same losses as without; alpha is in the logs, and right after a pause."""
    losses = {}
    for checkpointing in (False, True):
        model = make("llama", model_class=AutoModelForCausalLM)
        callback = integration.AnnealAlpha(model, 1.1, 1.9, steps=4, shape="linear")
        assert model.model.entmax_alpha.value.item() == pytest.approx(1.1)
        logs = train(tmp_path, callback, model, gradient_checkpointing=checkpointing)
        losses[checkpointing] = [entry["loss"] for entry in logs if "loss" in entry]
        assert [entry["entmax_alpha"] for entry in logs] == pytest.approx([1.3, 1.5, 1.7, 1.7])
        assert "'entmax_alpha': '1.5'" in capsys.readouterr().out
        assert model.model.entmax_alpha.value is callback.annealing.alpha
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert len(losses[True]) == 3
    assert all(0 < loss < 100 for loss in losses[True])
    callback.on_train_begin(None, SimpleNamespace(global_step=2), None)
    assert callback.annealing.alpha.item() == pytest.approx(1.5)


def test_an_alpha_that_was_replaced_is_not_moved_in_silence(tmp_path):
    model = make("llama", model_class=AutoModelForCausalLM)
    callback = integration.AnnealAlpha(model, steps=4)
    integration.set_alpha(model, 1.5)
    with pytest.raises(ValueError, match="AnnealAlpha has no tensor to move: alpha of the model is in its config"):
        train(tmp_path, callback, model)


def test_another_model_than_the_one_that_is_trained(tmp_path):
    """Also one of the same class; the alpha of neither moves."""
    one, other = (make("llama", model_class=AutoModelForCausalLM) for _ in range(2))
    callback = integration.AnnealAlpha(one, 1.1, 1.9, steps=4)
    for trained in (other, make("gpt2", model_class=AutoModelForCausalLM)):
        integration.set_alpha(trained, torch.tensor(1.5))
        message = f"made for another LlamaForCausalLM than the {type(trained).__name__} that is trained"
        with pytest.raises(ValueError, match=message):
            train(tmp_path, callback, trained)
        assert held(trained).item() == 1.5
    assert held(one).item() == pytest.approx(1.1)


def held(model):
    return model.base_model.entmax_alpha.value


def test_the_model_may_be_trained_in_a_wrapper():
    model = make("llama", model_class=AutoModelForCausalLM)
    callback = integration.AnnealAlpha(model, 1.1, 1.9, steps=4, shape="linear")
    callback.on_train_begin(None, SimpleNamespace(global_step=2), None, model=torch.nn.Sequential(model))
    assert held(model).item() == pytest.approx(1.5)


def test_weights_that_are_assigned_are_moved(tmp_path):
    model = make("llama", model_class=AutoModelForCausalLM)
    callback = integration.AnnealAlpha(model, 1.1, 1.9, steps=4, shape="linear")
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    train(tmp_path, callback, model)
    assert model.model.entmax_alpha.value.item() == pytest.approx(1.7)
