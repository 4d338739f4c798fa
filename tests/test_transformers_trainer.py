"""A Trainer learns alpha, saves it, and goes on from there."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers_models import ALPHAS, HEADS, assert_loads_as, decoder, logits, tokens

from flash_entmax.integrations import transformers as integration


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


def test_a_trainer_learns_alpha_and_saves_it(tmp_path):
    model, ids = decoder(nn.Parameter(torch.tensor(HEADS))), tokens(2, 20)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=rows(4))
    trainer.train()
    trainer.save_model(tmp_path)
    assert model.model.entmax_alpha.value.tolist() != torch.tensor(HEADS).tolist()
    assert_loads_as(tmp_path, model, ids)
