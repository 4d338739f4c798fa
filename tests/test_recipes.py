"""Recipes at toy size: what they write, how they go on after an interruption, and what their measures mean."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature

import pytest
import torch
from recipe_runs import a_run, silent
from safetensors import SafetensorError
from safetensors.torch import load_file

from flash_entmax.programs.cli import main
from flash_entmax.programs.recipes import max_retrieval, mixture, report, sweep, training
from flash_entmax.programs.recipes.language_model import RECIPE as LANGUAGE_MODEL
from flash_entmax.programs.recipes.recipe import BranchedRecipe, Measure, Recipe, ScoredRecipe, WatchedRecipe
from flash_entmax.programs.recipes.runs import new_model
from flash_entmax.programs.recipes.settings import NAMES, SIZES, TRAINED, settings_for
from flash_entmax.programs.recipes.sweep import RECIPES

OPTIONAL = {"score": ScoredRecipe, "watch": WatchedRecipe}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All recipes, run once by the command line."""
    out = tmp_path_factory.mktemp("recipes")
    assert main(["recipe", "all", "--size", "toy", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_every_recipe_has_what_the_protocol_names():
    """Every attribute, and methods that take the same arguments by the same names."""
    assert tuple(RECIPES) == TRAINED
    for name, recipe in RECIPES.items():
        assert isinstance(recipe, Recipe)
        assert recipe.name == name
        assert set(recipe.sizes) == set(SIZES)
        methods = dict.fromkeys(("build", "batch", "validate", "measure"), Recipe)
        methods |= {method: kind for method, kind in OPTIONAL.items() if isinstance(recipe, kind)}
        for method, kind in methods.items():
            expected = list(signature(getattr(kind, method)).parameters)[1:]
            assert list(signature(getattr(recipe, method)).parameters) == expected, (name, method)
        for size in recipe.sizes.values():
            assert isinstance(recipe, ScoredRecipe) or not size.checkpoints
            assert isinstance(recipe, WatchedRecipe) or not size.watched
        if isinstance(recipe, BranchedRecipe):
            assert set(recipe.arms) >= {*recipe.parents, *recipe.parents.values()}
            assert not set(recipe.parents) & set(recipe.parents.values())


@pytest.mark.parametrize("name", TRAINED)
def test_every_arm_is_trained_and_measured(written, name):
    results, recipe = json.loads((written / f"{name}-toy.json").read_text()), RECIPES[name]
    assert set(results["chosen"]) == set(recipe.arms)
    for arm, keys in results["chosen"].items():
        assert len(keys) == recipe.sizes["toy"].seeds
        for key in keys:
            assert arm in key
            assert results["runs"][key]["validation"] > 0
            for measure in recipe.measures:
                assert results["measures"][key][measure.key]
    for measure in recipe.measures:
        assert (written / f"{name}-toy-{measure.key}.png").stat().st_size > 10_000
    assert {"device", "torch", "flash_entmax", "date", "size"} <= set(results["conditions"])


@pytest.mark.parametrize(("count", "shown"), [(6, [0, 1, 2, 3, 4, 5]), (12, [1, 3, 5, 7, 9, 11]), (7, [0, 2, 4, 6])])
def test_a_table_has_some_of_many_places(count, shown):
    assert report.some(list(range(count)), 6) == shown


def test_what_is_there_is_not_made_again(written, monkeypatch, capsys):
    monkeypatch.setattr(training, "fit", None)
    monkeypatch.setattr(max_retrieval.RECIPE, "measure", None)
    assert main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(written)]) == 0
    assert "4 models, 4 done" in capsys.readouterr().out


def test_sparsity_and_captured_inputs(written):
    found = json.loads((written / "sparsity-toy.json").read_text())["models"]
    assert {key.partition(" |")[0] for key in found} == {arm for arm in LANGUAGE_MODEL.arms if "entmax" in arm.lower()}
    for by_length in found.values():
        for length, numbers in by_length.items():
            keys = torch.tensor(numbers["keys_per_query"])
            assert keys.shape == (2, 2)
            assert ((keys >= 1) & (keys <= (int(length) + 1) / 2)).all()
    tensors = load_file(written / "language-model-toy" / "inputs-128.safetensors")
    assert set(tensors) == {f"layer{n}.{name}" for n in (0, 1) for name in ("query", "key", "value")}
    assert all(tensor.shape == (1, 2, 128, 16) for tensor in tensors.values())


def test_captured_inputs_can_be_timed(written, tmp_path, capsys):
    path = str(written / "language-model-toy" / "inputs-128.safetensors")
    assert main(["bench", "--inputs", path, "--device", "cpu", "--parts", "speed", "--out", str(tmp_path)]) == 0
    assert "layer1" in capsys.readouterr().out


def test_captured_inputs_are_what_the_model_attends_with(written):
    """Attention of the captured tensors, through the rest of the layer, is the layer's own output."""
    from flash_entmax import entmax_attention
    from flash_entmax.programs.recipes import sparsity
    from flash_entmax.programs.recipes.runs import trained_model

    settings = settings_for(written, "toy", "cpu", None, None)
    run = sparsity.first(sparsity.trained(settings), *sparsity.CAPTURED)
    model, outputs = trained_model(LANGUAGE_MODEL, run), []
    model.blocks[1].attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(sparsity.held_out(run, 1, 128))
        tensors = load_file(written / "language-model-toy" / "inputs-128.safetensors")
        mixed = entmax_attention(*(tensors[f"layer1.{name}"] for name in ("query", "key", "value")), is_causal=True)
        attention = model.blocks[1].attention
        ours = attention.output_norm(attention.out(mixed.transpose(1, 2).flatten(-2)))
    torch.testing.assert_close(ours, outputs[0])


def test_models_that_are_not_trained_are_named(tmp_path, capsys):
    def recipe(*words):
        return main(["recipe", *words, "--size", "toy", "--device", "cpu", "--out", str(tmp_path)])

    assert recipe("language-model", "--arms", "softmax, NAPE", "--seeds", "1") == 0
    assert recipe("sparsity") == 1
    assert "no model with entmax is trained" in capsys.readouterr().err
    arms = "softmax, NAPE", "entmax 1.5 from softmax, NAPE"
    assert recipe("language-model", "--arms", *arms, "--seeds", "1") == 0
    assert recipe("sparsity") == 0
    assert "no inputs are written: they are of 'entmax 1.5, RoPE' or" in capsys.readouterr().out
    assert (tmp_path / "sparsity-toy.json").exists()
    assert recipe("training-speed") == 1
    assert "no model 'entmax 1.5, RoPE' or 'entmax 1.5 from softmax, RoPE' is trained" in capsys.readouterr().err


def test_training_speed_is_of_whole_steps(written):
    found = json.loads((written / "training-speed-toy.json").read_text())["bytes_per_second"]
    assert list(found) == ["entmax 1.5, trained", "entmax 1.5, before training", "softmax, SDPA"]
    assert all(speed > 0 for by_length in found.values() for speed in by_length.values())


def test_mixtures_of_every_arm(written):
    found = json.loads((written / "mixture-toy.json").read_text())["found"]
    assert set(found) == set(mixture.DATA)
    for arms in found.values():
        assert set(arms) == {*mixture.ALPHAS, mixture.PEER}
        assert all(0 < score <= 100 for arm in arms.values() for score in arm["agreement"])
        assert all(rise <= 1e-12 for arm in mixture.ALPHAS for rise in arms[arm]["rises"])
        assert min(arms["EM"]["support"]) > max(arms["alpha 2"]["support"]) >= 1
    assert (written / "mixture-toy.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "arm"), [("max-retrieval", "ASEntmax"), ("reverse", "entmax 1.5"), ("language-model", "ASEntmax, NAPE")]
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, name, arm):
    whole, cut = a_run(tmp_path / "whole", name, arm), a_run(tmp_path / "cut", name, arm)
    sweep.train(whole, silent)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)

    def interrupt(step, of):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.train(cut, interrupt)
    assert not cut.path.exists()
    steps = []
    sweep.train(cut, lambda step, of: steps.append(step))
    assert steps == [4, 5, 6]  # the fourth was made, but not yet saved
    assert not list(cut.folder.glob("*unfinished*"))
    first, second = load_file(whole.path), load_file(cut.path)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_another_seed_is_another_model(tmp_path):
    first, second = a_run(tmp_path), a_run(tmp_path, seed=1)
    sweep.train(first, silent)
    sweep.train(second, silent)
    assert first.path != second.path
    assert any(not torch.equal(t, load_file(second.path)[key]) for key, t in load_file(first.path).items())


def test_the_rate_of_the_lowest_mean_validation_loss_is_chosen(tmp_path):
    runs = {
        rate: [replace(a_run(tmp_path), learning_rate=rate, seed=seed) for seed in (0, 1)] for rate in (1.0, 2.0, 3.0)
    }
    losses = {1.0: (0.1, 0.9), 2.0: (0.4, 0.5), 3.0: (0.1, float("inf"))}
    found = {run.key: {"validation": losses[rate][run.seed]} for rate, own in runs.items() for run in own}
    assert sweep.best_rate(found, runs) == 2.0


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3]),
        (1e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
        (16e-3, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
        (1.0, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
    ],
)
def test_the_grid_grows_where_its_end_is_best(tmp_path, monkeypatch, best, rates):
    """Twice at most, for the arm that needs it; what is trained is the arm's own grid once, and the best rate with all
    seeds."""
    name, trained = "reverse", []
    own = {"learning_rates": (1e-3, 2e-3, 4e-3), "softmax_rates": (2e-3, 4e-3, 8e-3)}
    toy = replace(RECIPES[name].sizes["toy"], **own, extensions=2, seeds=2, checkpoints=0)

    def train(run, show):
        trained.append(run)
        wanted = best if run.arm == "softmax" else 4e-3 if "softmax" in run.arm else 2e-3
        return {"validation": abs(math.log(run.learning_rate / wanted)), "seconds": 0.0}

    monkeypatch.setitem(RECIPES[name].sizes, "toy", toy)
    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "measure", lambda run, show: {"exact": {"1": 0.0}, "tokens": {"1": 0.0}})
    assert main(["recipe", name, "--size", "toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"{name}-toy.json").read_text())
    entmax = [1e-3, 2e-3, 4e-3]
    others = {"softmax, pre-norm": [2e-3, 4e-3, 8e-3], "entmax 1.5": entmax, "ASEntmax": entmax}
    assert results["rates"] == {"softmax": rates} | others
    wanted = {"softmax, pre-norm": 4e-3, "entmax 1.5": 2e-3, "ASEntmax": 2e-3}
    assert results["best"] == {"softmax": min(max(best, rates[0]), rates[-1])} | wanted
    assert "best_checkpoints" not in results
    softmax = [(run.learning_rate, run.seed) for run in trained if run.arm == "softmax"]
    assert sorted(softmax) == sorted([*((rate, 0) for rate in rates), (results["best"]["softmax"], 1)])


def test_processes_share_the_work(tmp_path, capsys):
    assert (
        main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--workers", "2", "--out", str(tmp_path)])
        == 0
    )
    assert "2 at a time" in capsys.readouterr().out
    results = json.loads((tmp_path / "max-retrieval-toy.json").read_text())
    assert len(results["measures"]) == 4


def test_the_answer_of_max_retrieval_is_the_class_of_the_largest():
    items, _, answer = max_retrieval.problems(30, 8, 0, "cpu")
    assert items.shape == (8, 30, 11)
    largest = items[..., -1].argmax(1)
    assert torch.equal(items[torch.arange(8), largest, :-1].argmax(-1), answer)


@pytest.mark.parametrize("name", TRAINED)
def test_arms_start_from_the_same_weights(tmp_path, name):
    first, *others = (new_model(RECIPES[name], a_run(tmp_path, name, arm)).state_dict() for arm in RECIPES[name].arms)
    shared = set(first).intersection(*others) - {"growth"}
    assert all(name in shared or name == "growth" or "output_norm" in name for name in first)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in shared)


def test_a_broken_checkpoint_is_not_measured(tmp_path):
    run = a_run(tmp_path)
    sweep.train(run, silent)
    run.path.write_bytes(run.path.read_bytes()[:100])
    with pytest.raises(SafetensorError):
        sweep.measure(run, silent)
    unfinished = run.path.with_suffix(".unfinished.safetensors")
    run.path.rename(unfinished)
    steps = []
    sweep.train(run, lambda step, of: steps.append(step))
    assert steps[0] == 1


def test_a_model_that_is_there_is_not_trained_again(tmp_path):
    run, steps = a_run(tmp_path), []
    first = sweep.train(run, silent)
    again = sweep.train(run, lambda step, of: steps.append(step))
    assert not steps
    assert again["validation"] == first["validation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparsity"], "language-model comes first"),
        (["sort", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["language-model", "--text", "/nowhere"], "--text /nowhere: no such file or folder"),
        (["sort", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["sort", "--rates", "1e-3", "0"], "--rates must be positive and finite, got 0.001 0"),
        (
            ["sort", "--text", "."],
            "--text is an option of adapt, language-model, ruler, sparsity, training-speed, got sort",
        ),
        (["sort", "--rates", "inf"], "--rates must be positive and finite, got inf"),
        (["sort", "--arms", "SSMax"], "sort has no arm 'SSMax' (--arms), but 'softmax, pre-norm', 'softmax'"),
        (["sort", "max-retrieval", "--arms", "softmax", "SSMax"], "sort has no arm 'SSMax'"),
        (["language-model", "--arms", "ASEntmax from softmax, NAPE"], "goes on from 'softmax, NAPE': name that arm"),
        (["mixture", "--arms", "EM"], "--arms is an option of max-retrieval, sort"),
    ],
)
def test_what_cannot_run_says_why(tmp_path, capsys, arguments, message):
    assert main(["recipe", *arguments, "--size", "toy", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_some_arms_other_rates_and_more_seeds(tmp_path):
    """Nothing else is trained, and the rates do not grow. What is asked for later is added."""
    command = ["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(tmp_path)]
    rates = ["--rates", "1e-3", "2e-3"]
    assert main([*command, *rates, "--arms", "SSMax", "softmax", "--seeds", "2"]) == 0
    results = json.loads((tmp_path / "max-retrieval-toy.json").read_text())
    assert list(results["best"]) == list(results["chosen"]) == ["softmax", "SSMax"]
    assert set(map(tuple, results["rates"].values())) == {(1e-3, 2e-3)}
    assert all(len(keys) == 2 for keys in results["chosen"].values())
    assert len(results["runs"]) == 2 * (2 + 1)
    assert len(results["measures"]) == 2 * 2
    assert main([*command, *rates, "--arms", "softmax", "entmax 1.5"]) == 0
    more = json.loads((tmp_path / "max-retrieval-toy.json").read_text())
    assert list(more["chosen"]) == ["softmax", "entmax 1.5"]
    assert all(more["runs"][key] == numbers for key, numbers in results["runs"].items())
    assert len(more["runs"]) == len(results["runs"]) + 2


def test_results_of_other_conditions_are_not_mixed(written, capsys):
    results = written / "max-retrieval-toy.json"
    kept = results.read_text()
    results.write_text(kept.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    assert main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(written)]) == 1
    assert "take another --out" in capsys.readouterr().err
    results.write_text(kept.replace('"tests": 64', '"tests": 63'))
    assert main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(written)]) == 1
    assert "has results of tests 63, and this is 64" in capsys.readouterr().err
    code = json.loads(kept)["conditions"]["code"]
    results.write_text(kept.replace(code, "0123456789abcdef"))
    assert main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(written)]) == 1
    assert f"results of code '0123456789abcdef', and this is '{code}'" in capsys.readouterr().err
    for broken in ("{", '{"conditions": null}'):
        results.write_text(broken)
        assert main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(written)]) == 1
        assert "cannot be read" in capsys.readouterr().err
    results.unlink()
    assert main(["recipe", "max-retrieval", "--size", "toy", "--device", "cpu", "--out", str(written)]) == 1
    assert "models without their max-retrieval-toy.json" in capsys.readouterr().err
    results.write_text(kept)


def test_missing_extras_are_named(monkeypatch, tmp_path, capsys):
    from flash_entmax.programs import errors as command

    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "safetensors" else find_spec(name))
    for name, extra in (("sort", "recipes"), ("adapt", "adapt"), ("ruler", "adapt")):
        assert main(["recipe", name, "--out", str(tmp_path)]) == 1
        wanted = f"flash-entmax recipe: needs safetensors: pip install '.[{extra}]', from a clone\n"
        assert capsys.readouterr().err == wanted


def test_names_are_those_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["recipe", "juggling"])
    said = capsys.readouterr().err
    assert all(name in said for name in ("juggling", *NAMES, "all"))


def test_means_and_spreads_are_over_seeds():
    results = {
        "chosen": {"a": ["a | 0", "a | 1"]},
        "measures": {"a | 0": {"m": {"8": 1.0}}, "a | 1": {"m": {"8": 3.0}}},
    }
    measure = Measure("m", "title", "place")
    table = report.table(measure, results)
    assert list(table.columns[1].cells) == ["2.0 ± 1.4"]
    assert table.columns[1].header == "8"
    assert "2 seeds" in table.title
    results["chosen"]["a"].pop()
    assert list(report.table(measure, results).columns[1].cells) == ["1.0"]


def test_a_picture_without_any_finite_number(tmp_path):
    results = {
        "conditions": {"recipe": "sort"},
        "chosen": {"a": ["a | 0"], "b": ["b | 0"]},
        "measures": {key: {"m": {"8": math.inf, "16": math.inf}} for key in ("a | 0", "b | 0")},
    }
    report.draw(Measure("m", "title", "place"), results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_a_training_that_failed_is_reported(tmp_path, monkeypatch, capsys):
    """Weights that are no numbers have an infinite loss, are still measured, and leave no deviation."""
    monkeypatch.setitem(RECIPES["reverse"].sizes, "toy", replace(RECIPES["reverse"].sizes["toy"], seeds=2))
    fit = training.fit

    def fail(model, *rest):
        if "seed-1" in rest[4].name:
            model.embed.weight.data.fill_(math.nan)
        fit(model, *rest)

    monkeypatch.setattr(training, "fit", fail)
    assert main(["recipe", "reverse", "--size", "toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "inf ± nan" in capsys.readouterr().out
    results = json.loads((tmp_path / "reverse-toy.json").read_text())
    for keys in results["chosen"].values():
        assert results["runs"][keys[0]]["validation"] < results["runs"][keys[1]]["validation"] == math.inf
        assert results["measures"][keys[1]]["exact"]["1"] == 0.0
