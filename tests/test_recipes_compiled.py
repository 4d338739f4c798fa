"""Models of recipes as CUDA graphs and compiled: they train as single operations do."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import HAS_CUDA
from recipe_runs import a_run, silent
from safetensors.torch import load_file

from flash_entmax.programs.recipes import sequences, sweep, training
from flash_entmax.programs.recipes.recipe import parent_of
from flash_entmax.programs.recipes.runs import new_model
from flash_entmax.programs.recipes.settings import TRAINED
from flash_entmax.programs.recipes.sweep import RECIPES

ARMS = [(name, arm) for name in TRAINED for arm in RECIPES[name].arms]
COMPILED = [name for name in TRAINED if RECIPES[name].sizes["full"].compiled]


def train_from_the_start(run):
    """Trains the model that this one goes on from as well."""
    parent = parent_of(RECIPES[run.recipe], run)
    for each in (run,) if parent is None else (parent, run):
        sweep.train(each, silent)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "arm", "compiled"),
    [(*each, False) for each in ARMS] + [(*each, True) for each in ARMS if each[0] in COMPILED],
)
def test_a_graph_trains_as_single_operations_do(tmp_path, monkeypatch, name, arm, compiled):
    """But for the order of sums and for roundings, which Adam's division magnifies where a gradient is near zero."""
    graphed, eager = (a_run(tmp_path / way, name, arm, device="cuda") for way in ("graphed", "eager"))
    with monkeypatch.context() as patch:
        if compiled:
            torch._dynamo.reset()
            sizes = RECIPES[name].sizes
            patch.setitem(sizes, "toy", replace(sizes["toy"], compiled=sizes["full"].compiled))
        train_from_the_start(graphed)
    monkeypatch.setattr(training, "Graphed", training.Eager)
    train_from_the_start(eager)
    ours, truth = load_file(graphed.path), load_file(eager.path)
    start = {f"model.{key}": tensor.cpu() for key, tensor in new_model(RECIPES[name], eager).state_dict().items()}
    apart, moved = (
        torch.stack([(truth[key] - other[key]).square().sum() for key in truth]).sum().sqrt() for other in (ours, start)
    )
    assert apart <= 0.1 * moved


@pytest.mark.parametrize("arm", sequences.ARMS)
def test_blocks_are_traced_once_for_all_lengths(arm):
    """As `compiled="dynamic"` promises: one graph of a training's pass, one of a test's, and the same gradients."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    recipe, size = RECIPES["copy"], RECIPES["copy"].sizes["toy"]
    model = recipe.build(arm, size)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, dynamic=True, backend=keep)
    for length in (12, 9, 16):
        data = recipe.problems(length, 3, length, "cpu")
        for each in (model, compiled):
            each.zero_grad()
            recipe.loss(each, data).backward()
        ours, truth = ([weight.grad for weight in each.parameters()] for each in (compiled, model))
        torch.testing.assert_close(ours, truth)
        with torch.no_grad():
            torch.testing.assert_close(recipe.loss(compiled, data[1:]), recipe.loss(model, data[1:]))
    assert len(graphs) == 2
