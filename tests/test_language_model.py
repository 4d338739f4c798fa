"""The recipe of the language model: facts, an alpha that moves, compiled blocks, losses and recall."""

import math
from dataclasses import replace

import pytest
import torch
from recipe_runs import a_run, silent
from safetensors.torch import load_file

from flash_entmax import inspection
from flash_entmax.nn.alpha import AlphaParameter
from flash_entmax.programs.demo.model import Transformer
from flash_entmax.programs.demo.train import parameter_groups
from flash_entmax.programs.errors import CommandError
from flash_entmax.programs.recipes import language_model, planted, sweep, watched


def test_a_planted_fact_stands_in_its_slots_and_nowhere_else():
    data = torch.full((1, 48), ord("x"))
    slots = torch.tensor([[[0, 2], [5, 3]]])
    places = planted.plant(data, slots, torch.Generator().manual_seed(0))
    text = bytes(data[0].tolist())
    first, second = text[:8], text[40:]
    assert text == first + 8 * b"x" + first + second + 8 * b"x" + second
    assert (first + second).islower()
    assert first != second
    assert places.tolist() == [[[20, 21, 22, 23], [28, 29, 30, 31]]]


def test_every_fact_of_the_test_stands_once_before_it_is_asked_for():
    size = language_model.RECIPE.sizes["full"]
    for multiple in size.multiples:
        length = multiple * size.context
        slots = planted.slots_of_test(3, length, size.asked, torch.Generator().manual_seed(0))
        first, again = slots.unbind(-1)
        facts = len(planted.DEPTHS) * size.asked
        assert slots.shape == (3, facts, 2)
        assert all(len(set(row.flatten().tolist())) == 2 * facts for row in slots)
        assert (first < length // 8 - facts).all()
        assert (again >= length // 8 - facts).all()
        assert (again < length // 8).all()
        assert first[0, 0] == 0
        assert first[0, -1] == length // 8 - facts - 1


def test_a_model_that_looks_up_finds_every_fact(tmp_path):
    """One that copies what followed the same four bytes finds all, one that knows nothing finds none."""
    run, size = a_run(tmp_path, "language-model", "softmax, RoPE"), language_model.RECIPE.sizes["toy"]

    def looks_up(data, _):
        logits = torch.zeros(*data.shape, 256)
        for row, text in enumerate(bytes(line.tolist()) for line in data):
            for end in range(4, len(text) + 1):
                before = text.find(text[end - 4 : end])
                logits[row, end - 1, text[min(before + 4, len(text) - 1)]] = 100.0
        return logits

    for multiple in size.multiples:
        found, loss = language_model.recall(looks_up, run, size, multiple * size.context)
        assert found == dict.fromkeys(map(str, planted.DEPTHS), 100.0)
        assert loss < 1e-6
        found, loss = language_model.recall(lambda data, _: torch.zeros(*data.shape, 256), run, size, 256)
        assert found == dict.fromkeys(map(str, planted.DEPTHS), 0.0)
        assert loss == pytest.approx(math.log(256))


@pytest.mark.parametrize(
    ("arm", "held", "rests"),
    [("ASEntmax, NAPE", 20, 50), ("ASEntmax from softmax, NAPE", 60, 85), ("softmax, RoPE", 0, 0)],
)
def test_alpha_is_held_then_moves_then_rests(tmp_path, arm, held, rests):
    """Held from 0, or from the branch; a batch without alpha takes that of the model."""
    run = a_run(tmp_path, "language-model", arm, steps=100)
    alphas = [language_model.moving_alpha(step, run) for step in range(100)]
    numbers = [alpha.item() for alpha in alphas[:rests]]
    assert all(alpha is None for alpha in alphas[rests:])
    assert numbers[: held + 1] == pytest.approx([1.01] * len(numbers[: held + 1]))
    assert numbers == sorted(numbers)
    assert len(set(numbers[held:])) == rests - held
    assert not numbers or 1.4 < numbers[-1] < 1.5
    for step in (0, 99):
        batch = language_model.RECIPE.batch(step, run, language_model.RECIPE.sizes["toy"])
        assert len(batch) == (1 if alphas[step] is None else 2)


def test_an_arm_goes_on_from_its_parent(tmp_path, monkeypatch):
    """From its weights and the optimizer's state after the branch: with alpha 1 it ends as its parent does.

    A model whose temperature the parent does not have starts with its own.
    """
    parent = a_run(tmp_path, "language-model", "softmax, NAPE", steps=10)
    sweep.train(parent, silent)
    expected = weights_of(parent)
    for arm in ("entmax 1.5 from softmax, NAPE", "ASEntmax from softmax, NAPE"):
        run = replace(parent, arm=arm)
        sweep.train(run, silent)
        assert any(not torch.equal(weights_of(run)[name], expected[name]) for name in expected)
        assert set(weights_of(run)) >= set(expected)
    assert list(watched.noted(language_model.RECIPE, run)) == ["5", "10"]
    assert list(watched.own(run)) == ["10"]
    with pytest.raises(CommandError, match=r"watched.json is not there"):
        watched.noted(language_model.RECIPE, replace(run, seed=9))
    run.path.unlink()
    monkeypatch.setitem(language_model.ARMS, run.arm, language_model.ARMS["softmax, NAPE"])
    sweep.train(run, silent)
    for name, weight in weights_of(run).items():
        assert torch.equal(weight, expected[name]), name
    run.path.unlink()
    parent.branch_path.unlink()
    with pytest.raises(CommandError, match=r"branch.safetensors is not there, and the results say that softmax, NAPE"):
        sweep.train(run, silent)


def weights_of(run):
    return load_file(run.path)


def test_the_temperature_does_not_decay_and_starts_near_one():
    model = language_model.RECIPE.build("ASEntmax, NAPE", language_model.RECIPE.sizes["toy"])
    decaying, others = parameter_groups(model)
    assert decaying["weight_decay"] > others["weight_decay"] == 0.0
    decaying = {id(parameter) for parameter in decaying["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and name != "embed.weight"
        assert (id(parameter) in decaying) == (is_matrix and "temperature" not in name), name
    temperature = model.blocks[0].attention.temperature
    x = torch.randn(1, 500, 32)
    torch.testing.assert_close(
        temperature(x, torch.arange(500), 2), torch.tensor([1.05, 1.0]).expand(1, 500, 2), atol=1e-3, rtol=0
    )


def test_alpha_is_that_of_every_layer():
    """A model at a moving alpha is the model that has it."""
    data = torch.arange(40)[None]
    moving, fixed = (Transformer(2, 32, 2, alpha=alpha, position="nape") for alpha in (1.5, 1.2))
    for block in moving.blocks:
        torch.nn.init.normal_(block.attention.out.weight)
    fixed.load_state_dict(moving.state_dict())
    torch.testing.assert_close(moving(data, torch.tensor(1.2)), fixed(data))
    assert not torch.allclose(moving(data), fixed(data))


def test_the_first_layer_may_have_its_own_alpha():
    """Whatever the alpha of the others: it is softmax in the first layer and nowhere else."""
    data = torch.arange(40)[None]
    model = Transformer(2, 32, 2, alpha=1.5, first_layer_alpha=1.0, position="nape", zero_branches=False)
    with inspection.record(model) as calls:
        ours = model(data, torch.tensor(1.2))
    (call,) = calls  # softmax is not recorded
    torch.testing.assert_close(call.problem.score.alpha, torch.full((2,), 1.2))
    model.first_layer_alpha, model.blocks[1].attention.alpha_parameter = None, AlphaParameter(1.2, None)
    model.blocks[0].attention.alpha_parameter = AlphaParameter(1.0, None)
    torch.testing.assert_close(model(data), ours)


def test_compiled_blocks_train_as_others_do(tmp_path, monkeypatch):
    """All arms in one process, with alpha and without, as a worker meets them: torch.compile keeps all of their graphs,
    and no part of a block is left out of them.
    """
    torch._dynamo.reset()
    compile_blocks = Transformer.compile
    monkeypatch.setattr(Transformer, "compile", lambda *given, **o: compile_blocks(*given, backend="aot_eager", **o))
    compiled = {"toy": replace(language_model.RECIPE.sizes["toy"], compiled=True)}
    for arm in language_model.ARMS:
        theirs = a_run(tmp_path / "theirs", "language-model", arm)
        expected = sweep.train(theirs, silent)["validation"]
        with monkeypatch.context() as patch:
            patch.setattr(language_model.RECIPE, "sizes", compiled)
            actual = sweep.train(a_run(tmp_path / "ours", "language-model", arm), silent)["validation"]
        assert actual == pytest.approx(expected, rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > len({repr(a) for a in language_model.ARMS.values()})


def test_losses_are_of_the_byte_that_follows():
    """A model that knows each byte's successor has none, wherever the window begins."""
    data = torch.arange(40).repeat(2, 1)
    losses = language_model.next_byte_losses(lambda data, _: 100.0 * torch.nn.functional.one_hot(data + 1, 256), data)
    assert losses.shape == (2, 39)
    assert losses.abs().max() < 1e-6
