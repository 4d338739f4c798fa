"""The recipes sort, reverse and copy: their blocks, their problems, what is measured, and which checkpoint is kept."""

import json
import math
from itertools import pairwise

import pytest
import torch
from recipe_runs import a_run, silent
from safetensors.torch import load_file

from flash_entmax.programs.cli import main
from flash_entmax.programs.demo.model import Block, Transformer
from flash_entmax.programs.demo.train import pace
from flash_entmax.programs.errors import CommandError
from flash_entmax.programs.recipes import checkpoints, sequences, sweep, training
from flash_entmax.programs.recipes.runs import new_model, trained_model

TASK, SIZE = sequences.COPY, sequences.COPY.sizes["toy"]
ANSWERS = {"sort": sorted, "reverse": lambda source: source[::-1], "copy": list}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_sequences(name):
    data = sweep.RECIPES[name].problems(5, 3, 0, "cpu")
    assert data.shape == (3, 11)
    for row in data.tolist():
        assert row[5] == sequences.SEPARATOR
        assert row[6:] == ANSWERS[name](row[:5])


def test_a_sequence_counts_if_all_of_its_tokens_are_right(monkeypatch, tmp_path):
    """One wrong token costs a whole answer, and one of the tokens."""

    def all_but_one(model, data):
        answer = data[:, data.shape[1] // 2 + 1 :].clone()
        answer[0, -1] = (answer[0, -1] + 1) % sequences.VOCABULARY
        return torch.nn.functional.one_hot(answer, sequences.VOCABULARY + 1).float()

    monkeypatch.setattr(TASK, "logits", all_but_one)
    found = TASK.measure(None, a_run(tmp_path, "copy"), SIZE)
    assert found["exact"] == dict.fromkeys(("1", "1.5", "2"), 100.0 * (1 - 1 / SIZE.tests))
    for place, length in (("1", 4), ("1.5", 6), ("2", 8)):
        assert found["tokens"][place] == pytest.approx(100.0 * (1 - 1 / (length * SIZE.tests)))


def test_logits_of_a_sequence_are_those_of_its_answer():
    """From the separator on, each from the token before it."""
    data = sequences.SORT.problems(5, 3, 0, "cpu")
    echo = lambda data: torch.nn.functional.one_hot(data, sequences.VOCABULARY + 1)  # noqa: E731
    seen = sequences.SORT.logits(echo, data).argmax(-1)
    assert (seen[:, 0] == sequences.SEPARATOR).all()
    assert torch.equal(seen[:, 1:], data[:, 6:-1])


def test_problems_of_tests_are_not_those_of_training():
    drawn = [
        TASK.problems(16, 64, seed, "cpu")
        for seed in (0, training.TEST_SEED, training.VALIDATION_SEED, training.SCORE_SEED)
    ]
    assert not any(torch.equal(one, other) for n, one in enumerate(drawn) for other in drawn[:n])


def test_the_norms_are_all_that_tells_the_softmax_arms_apart(tmp_path):
    plain, normed = (
        new_model(TASK, a_run(tmp_path, "copy", arm)).state_dict() for arm in ("softmax, pre-norm", "softmax")
    )
    norms = {f"blocks.{n}.{name}.weight" for n in (0, 1) for name in ("attention.output_norm", "mlp_output_norm")}
    assert set(normed) - set(plain) == norms
    assert all(torch.equal(tensor, normed[name]) for name, tensor in plain.items())


def test_a_block_is_its_formula():
    """RMSNorms in front of and behind attention and a gated MLP, and not behind the sum."""
    block, x = Block(16, 2, sandwich_norm=True, gated_mlp=True).double(), torch.randn(2, 5, 16).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)

    def norm(rows, weight):
        return weight * rows / (rows.square().mean(-1, keepdim=True) + torch.finfo(rows.dtype).eps).sqrt()

    attention, inner = block.attention, norm(x, block.attention_norm.weight)
    block.attention.output_norm, gain = None, attention.output_norm.weight
    mixed = x + norm(attention(inner), gain)
    block.attention.output_norm = torch.nn.RMSNorm(16).double()
    block.attention.output_norm.weight = gain
    inner = norm(mixed, block.mlp_norm.weight)
    gates = torch.nn.functional.gelu(inner @ block.gate.weight.T)
    mlp = (gates * (inner @ block.widen.weight.T)) @ block.narrow.weight.T
    torch.testing.assert_close(block(x), mixed + norm(mlp, block.mlp_output_norm.weight))


def test_norms_behind_branches_that_start_at_zero_are_refused():
    with pytest.raises(ValueError, match="zero_branches=True has no use with sandwich_norm=True"):
        Transformer(1, 16, 2, sandwich_norm=True)


@pytest.mark.parametrize("arm", sequences.ARMS)
def test_projections_start_small(tmp_path, arm):
    """As normal(0, 0.02), the gates of the MLPs among them."""
    weights = new_model(TASK, a_run(tmp_path, "copy", arm)).state_dict()
    matrices = [name for name, weight in weights.items() if weight.dim() == 2 and "temperature" not in name]
    assert "blocks.0.gate.weight" in matrices
    for name in set(matrices) - {"embed.weight"}:
        assert 0.018 < weights[name].std() < 0.022, name


def test_the_scores_of_asentmax_start_as_those_of_entmax(tmp_path):
    """But for a factor of 1.05, at every position."""
    layer = new_model(TASK, a_run(tmp_path, "copy", "ASEntmax")).blocks[1].attention
    factor = layer.temperature(torch.randn(3, 200, 32), torch.arange(200), layer.num_heads)
    torch.testing.assert_close(factor[..., 0], torch.full((3, 200), 1.05), atol=1e-3, rtol=0)
    assert (factor[..., 1] == 1).all()


def test_each_arm_has_its_own_rates():
    size = TASK.sizes["full"]
    assert {size.rates_of(arm) for arm in TASK.arms if "softmax" in arm} == {size.softmax_rates}
    assert {size.rates_of(arm) for arm in TASK.arms if "entmax" in arm.lower()} == {size.learning_rates}
    assert max(size.learning_rates) < min(size.softmax_rates)


def test_nothing_decays(tmp_path, monkeypatch):
    seen = []

    class Watched(training.Eager):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.extend(self.optimizer.param_groups)

    monkeypatch.setattr(training, "Eager", Watched)
    sweep.train(a_run(tmp_path, "copy"), silent)
    assert {group["weight_decay"] for group in seen} == {0.0}
    assert {group["betas"] for group in seen} == {(0.9, 0.99)}


def test_the_rate_rises_over_the_share_of_the_warm_up():
    assert [pace(0.03, 0.06), pace(0.06, 0.06)] == pytest.approx([0.5, 1.0])
    assert pace(1.0, 0.06) == pytest.approx(0.05)
    assert all(pace(step / 100) == pace(step / 100, 0.05) for step in range(1, 101))


@pytest.mark.parametrize(("steps", "count"), [(6, 2), (10, 10), (25, 10), (2500, 10), (3, 10)])
def test_checkpoints_are_evenly_spaced(steps, count):
    due = [step for step in range(1, steps + 1) if checkpoints.is_due(step, steps, count)]
    assert due[-1] == steps
    assert len(due) == min(steps, count)
    assert max(due[0], *(b - a for a, b in pairwise(due))) <= math.ceil(steps / count)
    assert not any(checkpoints.is_due(step, steps, 0) for step in range(1, steps + 1))


def scores(monkeypatch, *numbers) -> None:
    """The recipe gives its checkpoints these, one by one."""
    numbers = iter(numbers)
    monkeypatch.setattr(TASK, "score", lambda model, run, size: next(numbers))


@pytest.mark.parametrize(("given", "step"), [((10.0, 30.0), 6), ((30.0, 10.0), 3), ((20.0, 20.0), 3)])
def test_the_first_of_the_best_checkpoints_is_kept(tmp_path, monkeypatch, given, step):
    scores(monkeypatch, *given)
    run = a_run(tmp_path, "copy", "entmax 1.5")
    found = sweep.train(run, silent)
    assert found["checkpoint"] == {"step": step, "score": max(given)}
    last, best = trained_model(TASK, run), trained_model(TASK, run, checkpoints.path_of(run))
    assert torch.equal(last.predict.weight, best.predict.weight) == (step == 6)


def test_an_interrupted_training_keeps_the_same_checkpoint(tmp_path, monkeypatch):
    whole, cut = (a_run(tmp_path / way, "copy", "ASEntmax") for way in ("whole", "cut"))
    found = sweep.train(whole, silent)["checkpoint"]
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)

    def interrupt(step, of):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.train(cut, interrupt)
    assert checkpoints.kept(cut)["step"] == 3
    assert sweep.train(cut, silent)["checkpoint"] == found
    kept, known = (load_file(checkpoints.path_of(run)) for run in (cut, whole))
    assert kept.keys() == known.keys()
    assert all(torch.equal(kept[name], known[name]) for name in known)


def test_a_lost_checkpoint_is_missed_in_words(tmp_path):
    run = a_run(tmp_path, "copy")
    sweep.train(run, silent)
    checkpoints.path_of(run).unlink()
    with pytest.raises(CommandError, match=r"best\.safetensors is not there, and .* is: move both away"):
        sweep.train(run, silent)


def test_both_ways_to_choose_are_reported(tmp_path, monkeypatch, capsys):
    """The means of last checkpoints, and the best checkpoint of each arm, which here is the first one."""
    scores(monkeypatch, *(40.0, 30.0) * len(TASK.arms))
    assert main(["recipe", "copy", "--size", "toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens right, %, by times the longest source in training: one seed" in shown
    assert "seed 0, step 20" in shown
    results = json.loads((tmp_path / "copy-toy.json").read_text())
    assert results["best_checkpoints"] == {arm: keys[0] for arm, keys in results["chosen"].items()}
    for arm, key in results["best_checkpoints"].items():
        assert results["runs"][key]["checkpoint"] == {"step": 20, "score": 40.0}
        run = sweep.runs_of(TASK, sweep.RecipeSettings(tmp_path, "toy", "cpu"), arm, 3e-3, 1)[0]
        model = trained_model(TASK, run, checkpoints.path_of(run))
        with torch.no_grad():
            assert results["best_measures"][key] == TASK.measure(model, run, SIZE)


def test_the_best_checkpoint_of_an_arm_is_of_any_rate_and_seed(tmp_path):
    runs = [a_run(tmp_path, "copy", seed=seed) for seed in range(3)]
    found = {run.key: {"checkpoint": {"score": score}} for run, score in zip(runs, (5.0, 7.0, 7.0), strict=True)}
    assert sweep.best_checkpoint(found, runs) is runs[1]
