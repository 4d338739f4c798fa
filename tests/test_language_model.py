"""The recipe of the language model: facts, an alpha that moves, compiled blocks, losses and recall."""

import math
from dataclasses import replace

import pytest
import torch
from recipe_runs import a_run, silent

from flash_entmax.programs.demo.model import Transformer
from flash_entmax.programs.recipes import language_model, planted, sweep


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

    def looks_up(data):
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
        found, loss = language_model.recall(lambda data: torch.zeros(*data.shape, 256), run, size, 256)
        assert found == dict.fromkeys(map(str, planted.DEPTHS), 0.0)
        assert loss == pytest.approx(math.log(256))


def test_alpha_moves_over_the_first_half(tmp_path):
    run, size = a_run(tmp_path, "language-model", "ASEntmax, NAPE", steps=9), language_model.RECIPE.sizes["toy"]
    alphas = [alpha.item() for step in range(4) for _, alpha in [language_model.RECIPE.batch(step, run, size)]]
    assert alphas[0] == pytest.approx(1.01)
    assert alphas == sorted(alphas)
    assert 1.4 < alphas[-1] < 1.5
    assert len(language_model.RECIPE.batch(4, run, size)) == 1
    assert len(language_model.RECIPE.batch(0, replace(run, arm="softmax, RoPE"), size)) == 1


def test_alpha_is_that_of_every_layer():
    """A model at a moving alpha is the model that has it."""
    data = torch.arange(40)[None]
    moving, fixed = (Transformer(2, 32, 2, alpha=alpha, position="nape") for alpha in (1.5, 1.2))
    for block in moving.blocks:
        torch.nn.init.normal_(block.attention.out.weight)
    fixed.load_state_dict(moving.state_dict())
    torch.testing.assert_close(moving(data, torch.tensor(1.2)), fixed(data))
    assert not torch.allclose(moving(data), fixed(data))


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
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > len(language_model.ARMS)


def test_losses_are_of_the_byte_that_follows():
    """A model that knows each byte's successor has none, wherever the window begins."""
    data = torch.arange(40).repeat(2, 1)
    losses = language_model.next_byte_losses(lambda data, _: 100.0 * torch.nn.functional.one_hot(data + 1, 256), data)
    assert losses.shape == (2, 39)
    assert losses.abs().max() < 1e-6
