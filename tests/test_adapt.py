"""A softmax model taken to entmax: the functions for a loop of one's own."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers_models import make, tokens

from flash_entmax import inspection
from flash_entmax.adapt import ENTMAX, alpha_schedule, attention_by_part, distillation_loss, evaluate, softmax_teacher
from flash_entmax.integrations.transformers.config import IMPLEMENTATIONS


def decoder():
    return make("llama", alpha=1.5, model_class=AutoModelForCausalLM)


def softmax_logits(model, ids):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(ids).logits
    model.set_attn_implementation("entmax")
    return logits


def test_shares_of_the_steps():
    """Two steps held, five that move, and the rest at the end; a ramp without any share is one step."""
    schedule = alpha_schedule(10, hold=0.2, ramp=0.5, end=1.25)
    values = [schedule.alpha.item(), *(schedule.step() for _ in range(10))]
    assert values[:3] == pytest.approx([1.01] * 3)
    assert values[2] < values[3] < values[6] < 1.25
    assert values[7:] == pytest.approx([1.25] * 4)
    assert alpha_schedule(10, ramp=0.0).last_step == 1
    assert alpha_schedule(3, hold=0.5, ramp=0.5).last_step <= 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"hold": "0.1"}, TypeError, "hold must be a share of the steps, a number from 0 to 1, got '0.1'"),
        ({"hold": 0.7, "ramp": 0.4}, ValueError, "together at most 1, got 0.7 and 0.4"),
        ({"ramp": -0.1}, ValueError, "together at most 1, got 0.0 and -0.1"),
        ({"end": 2.5}, ValueError, r"end must be in \[1.01, 2\]"),
    ],
)
def test_wrong_schedules(options, error, message):
    with pytest.raises(error, match=message):
        alpha_schedule(**{"steps": 10} | options)


def test_the_divergence_from_the_teacher():
    logits, theirs = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    p, q = theirs.softmax(-1), logits.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    theirs.requires_grad_()
    logits.requires_grad_()
    loss = distillation_loss(logits, theirs)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(logits.grad, (q - p).detach() / 15)
    assert theirs.grad is None
    assert distillation_loss(logits.bfloat16(), theirs.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"got \(3, 5, 7\) and \(5, 7\)"):
        distillation_loss(logits, theirs[0])
    with pytest.raises(TypeError, match="teacher_logits must be a floating-point tensor, got None"):
        distillation_loss(logits, None)


def test_a_teacher_is_the_softmax_model_whatever_is_trained():
    model, ids = decoder(), tokens(2, 20)
    expected = softmax_logits(model, ids)
    teacher = softmax_teacher(model)
    assert torch.equal(teacher(ids), expected)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(teacher(ids), expected)
    assert not torch.equal(softmax_logits(model, ids), expected)
    with pytest.raises(TypeError, match="softmax_teacher takes a model of Transformers, got Linear"):
        softmax_teacher(torch.nn.Linear(2, 2))
    assert set(ENTMAX) == set(IMPLEMENTATIONS)
    for attention in ENTMAX:
        with pytest.raises(ValueError, match=f"attention must be one of softmax, .* got '{attention}'"):
            softmax_teacher(model, attention)


def test_a_model_with_adapters_is_its_own_teacher():
    peft = pytest.importorskip("peft")
    model, ids = decoder(), tokens(2, 20)
    expected = softmax_logits(model, ids)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    teacher, ours = softmax_teacher(model.train()), model(ids).logits
    torch.testing.assert_close(teacher(ids), expected)
    assert model.training
    assert torch.equal(model(ids).logits, ours), "adapters and entmax are on again"
    assert not torch.allclose(ours, expected, atol=1e-3)


def test_each_module_is_left_in_its_mode():
    """A part that is frozen stays in evaluation mode, where the model trains."""
    model, ids = decoder().train(), tokens(1, 20)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, [ids])
    assert [module.training for module in model.modules()] == modes


def test_attention_by_part():
    """What a teacher gives back where text and images have attention of their own."""
    parts = {"text_config": SimpleNamespace(_attn_implementation="entmax"), "of_nothing": None}
    config = SimpleNamespace(_attn_implementation="sdpa", sub_configs=dict.fromkeys(parts), **parts)
    assert attention_by_part(config) == {"": "sdpa", "text_config": "entmax"}
    assert attention_by_part(decoder().config) == "entmax"


def test_a_teacher_that_rules_a_token_out():
    logits, theirs = torch.randn(3, 5), torch.randn(3, 5)
    theirs[:, 2] = -torch.inf
    expected = (theirs.softmax(-1) * (theirs.log_softmax(-1) - logits.log_softmax(-1)))[:, [0, 1, 3, 4]].sum(-1).mean()
    torch.testing.assert_close(distillation_loss(logits, theirs), expected)
    logits[:, 2] = -torch.inf
    assert distillation_loss(logits, theirs).isfinite()


def test_evaluation_is_of_all_windows():
    model, windows = decoder().train(), [tokens(2, 70), tokens(1, 70)]
    found = evaluate(model, iter(windows))
    assert model.training
    model.eval()
    with torch.no_grad(), inspection.record(model) as calls:
        losses = [
            cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            for ids in windows
        ]
    assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert [layer.name for layer in found.layers] == [call.name for call in calls[:2]]
    for number, layer in enumerate(found.layers):
        same = calls[number::2]
        assert layer.keys_per_query == pytest.approx(sum(c.keys_per_query.mean().item() for c in same) / 2)
        assert layer.tile_density == pytest.approx(1 - sum(c.block_sparsity.mean().item() for c in same) / 2)
        assert layer.key_density == pytest.approx(sum(c.key_density.mean().item() for c in same) / 2)
    assert found.keys_per_query == pytest.approx(sum(layer.keys_per_query for layer in found.layers) / 2)
    model.set_attn_implementation("sdpa")
    dense = evaluate(model, windows)
    assert dense.layers == ()
    assert dense.key_density != dense.key_density


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        ([], ValueError, "at least one window, got none"),
        ([torch.zeros(2, 5)], TypeError, "must be an int64 tensor of ids, got Tensor"),
        (torch.zeros(2, 5).long(), TypeError, r"windows must be a list of tensors .*, got a tensor \(2, 5\)"),
        ([tokens(2, 1)], ValueError, r"with at least 2 tokens, got \(2, 1\)"),
    ],
)
def test_wrong_windows(windows, error, message):
    with pytest.raises(error, match=message):
        evaluate(torch.nn.Identity(), windows)
