"""A backend is a module that offers the functions of `Backend`, and a line of the table: nothing else knows it."""

import inspect
from collections import Counter
from types import ModuleType

import pytest
import torch
from cases import make_case

from flash_entmax import entmax, entmax_attention, entmax_loss, linear_entmax_loss
from flash_entmax.backends import BACKENDS, Backend
from flash_entmax.backends import torch as torch_backend
from flash_entmax.testing import iid_inputs

FUNCTIONS = {name: own for name, own in vars(Backend).items() if inspect.isfunction(own) and name[0] != "_"}


def toy_backend() -> ModuleType:
    """What plain PyTorch computes, counted in `calls`. "auto" takes it only where `is_default_for` is replaced."""
    toy = ModuleType("toy")
    toy.calls = Counter()
    for name in FUNCTIONS:
        setattr(toy, name, counted(name, toy.calls))
    toy.is_default_for = lambda device: False
    return toy


def counted(name: str, calls: Counter):
    def function(*arguments):
        calls[name] += 1
        return getattr(torch_backend, name)(*arguments)

    return function


@pytest.fixture
def toy():
    """In the table, as its first line: "auto" asks it first."""
    before, backend = dict(BACKENDS), toy_backend()
    BACKENDS.clear()
    BACKENDS.update({"toy": backend, **before})
    yield backend
    BACKENDS.clear()
    BACKENDS.update(before)


def test_a_backend_of_the_table_serves_attention(toy):
    leaves = tuple(tensor.requires_grad_() for tensor in iid_inputs(1, 2, 30, 8))
    results = {}
    for impl in ("toy", "torch"):
        output, support = entmax_attention(*leaves, impl=impl, return_support=True)
        results[impl] = output, *support[:4], support.keys, *torch.autograd.grad(output.square().sum(), leaves)
    assert all(map(torch.equal, results["toy"], results["torch"]))
    stages = {"attention_forward", "attention_support", "attention_backward"}
    assert set(toy.calls) == {"obstacle", "tile_size", *stages}


def test_a_backend_of_the_table_serves_forward_mode(toy):
    tensors = iid_inputs(1, 2, 30, 8)

    def tangent(impl):
        return torch.func.jvp(lambda *qkv: entmax_attention(*qkv, impl=impl), tensors, tensors)[1]

    assert torch.equal(tangent("toy"), tangent("torch"))
    assert toy.calls["attention_tangent"] == 1


def entmax_of(x, impl):
    return entmax(x, 1.3, impl=impl)


def loss_of(x, impl):
    return entmax_loss(x, torch.tensor([3, 0, 5, 1]), impl=impl)


def linear_loss_of(x, impl):
    return linear_entmax_loss(x, torch.linspace(-1, 1, 72).view(8, 9), torch.tensor([3, 0, 5, 1]), impl=impl)


@pytest.mark.parametrize(
    ("call", "functions"),
    [
        (entmax_of, {"entmax", "entmax_backward"}),
        (loss_of, {"loss", "loss_backward"}),
        (linear_loss_of, {"loss", "loss_backward"}),
    ],
)
def test_a_backend_of_the_table_serves_rows(toy, call, functions):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = {}
    for impl in ("toy", "torch"):
        output = call(x, impl)
        results[impl] = output, *torch.autograd.grad(output.square().sum(), x)
    assert all(map(torch.equal, results["toy"], results["torch"]))
    assert functions == set(toy.calls) - {"obstacle"}


CALLS = {
    "attention": lambda impl: entmax_attention(*iid_inputs(1, 1, 5, 4), impl=impl),
    "entmax": lambda impl: entmax_of(torch.zeros(4, 9), impl),
    "loss": lambda impl: loss_of(torch.zeros(4, 9), impl),
    "linear loss": lambda impl: linear_loss_of(torch.zeros(4, 9), impl),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_an_obstacle_is_quoted_and_nothing_runs(toy, call):
    toy.obstacle = lambda dtype, device: f"toys are broken for {dtype}"
    with pytest.raises(ValueError, match=r"impl='toy' cannot run here: toys are broken for torch\.float32"):
        call("toy")
    assert not toy.calls


@each_call
def test_auto_takes_a_backend_that_is_a_default_and_has_no_obstacle(toy, call):
    call("auto")
    assert not toy.calls, "it is no default"
    toy.is_default_for, toy.obstacle = (lambda device: True), (lambda *_: "toys are broken")
    call("auto")
    assert not toy.calls, "it has an obstacle"
    toy.obstacle = lambda *_: ""
    call("auto")
    assert toy.calls


@each_call
def test_an_unknown_impl_is_refused_with_all_names(toy, call):
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'toy', 'triton', 'torch'.*, got 'top'"):
        call("top")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shipped_backends_offer_every_function(backend, name):
    """With the arguments of the protocol, by name and in order."""
    expected = [argument for argument in inspect.signature(FUNCTIONS[name]).parameters if argument != "self"]
    assert list(inspect.signature(getattr(BACKENDS[backend.impl], name)).parameters) == expected


def test_the_protocol_has_functions():
    assert {"obstacle", "attention_forward", "sums_at", "loss_backward"} <= set(FUNCTIONS)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 70), (70, 0)])
def test_an_empty_call_reaches_no_tile(backend, queries, keys):
    case = make_case(backend, length=queries, key_length=keys)
    stages = BACKENDS[backend.impl]
    shape, _ = stages.reach_shapes(case.problem, case.query.dtype)
    reached_keys = torch.zeros(shape, dtype=torch.int32, device=backend.device)
    tiles = stages.reached_tiles(case.problem, case.query.dtype, reached_keys)
    assert tiles.shape[:2] == (1, 2)
    assert not tiles.any()
