"""A plain call reaches what computes it directly; whoever has a say in a call finds the operator."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from conftest import HAS_CUDA
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flash_entmax import entmax_attention
from flash_entmax.core.registration import function_of
from flash_entmax.operators import attention as ops
from flash_entmax.operators.eager import is_eager


class Own(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


x = torch.ones(2)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_plain_call_is_eager(mode):
    with mode():
        assert is_eager((x, None, torch.nn.Parameter(x)))


MODES = {
    "dispatch": lambda: FlopCounterMode(display=False),
    "function": FunctionMode,
    "device": lambda: torch.device("cpu"),
    "forward": forward_ad.dual_level,
    "profiler": torch.profiler.profile,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_call_in_a_mode_is_not(mode):
    with MODES[mode]():
        assert not is_eager((x,))
    assert is_eager((x,))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_a_call_inside_of_torch_func_is_not(transform):
    seen = []
    transform(lambda t: (seen.append(is_eager((t,))), seen.append(is_eager((x,))), t.sum())[-1])(x)
    assert seen == [False, False]


def test_a_call_that_is_traced_is_not():
    seen = []
    torch.fx.experimental.proxy_tensor.make_fx(lambda t: (seen.append(is_eager((t,))), t * 2)[1])(x)
    assert seen == [False]
    compiled = torch.compile(lambda t: t + (1 if is_eager((t,)) else 2), backend="eager", fullgraph=True)
    assert compiled(x)[0] == 3


TENSORS = {
    "subclass": lambda: x.as_subclass(Own),
    "meta": lambda: x.to("meta"),
    "negated": lambda: torch._neg_view(x),
    "zero": lambda: torch._efficientzerotensor(2),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_call_with_another_kind_of_tensor_is_not(kind):
    assert not is_eager((x, TENSORS[kind]()))


def heads(**options) -> torch.Tensor:
    tensors = (torch.ones(1, 2, 5, 4) for _ in range(3))
    return entmax_attention(*tensors, **options)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ({"softcap": 0}, {"softcap": False}, "softcap"),
        ({"alpha": 2}, {"alpha": True}, "alpha"),
        ({"is_causal": True}, {"is_causal": 1}, "is_causal"),
        ({"window_size": (-1, 0)}, {"window_size": (-1, False)}, "window_size"),
        ({"is_causal": True}, {"is_causal": 1.0}, "is_causal"),
    ],
)
def test_an_option_of_another_type_is_refused_after_an_equal_one(right, wrong, message):
    heads(**right)
    heads(**right)
    with pytest.raises(TypeError, match=message):
        heads(**wrong)


def test_autocast_is_seen_by_a_call_like_one_without_it():
    assert heads().dtype == heads().dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads().dtype == torch.bfloat16


class Operators(TorchDispatchMode):
    """Lets a call see that it is watched, and counts attention's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "flash_entmax":
            self.names.append(function)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("options", [{}, {"alpha": torch.tensor([1.3, 1.7], requires_grad=True)}], ids=["", "learned"])
def test_both_ways_agree_bit_for_bit(options):
    inputs = [torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3)]
    wanted = (*inputs, *options.values())

    def results():
        output = entmax_attention(*inputs, is_causal=True, impl="torch", **options)
        return output, *torch.autograd.grad(output.square().sum(), wanted)

    direct = results()
    with Operators() as mode:
        dispatched = results()
    assert mode.names == [ops.attention, ops.attention_backward]
    assert all(map(torch.equal, direct, dispatched))


def test_a_plain_call_passes_the_dispatcher_by(monkeypatch):
    """The functions are found where the operators are not called."""

    def refuse(*_):
        raise AssertionError("dispatched")

    functions = {operator: function_of(operator) for operator in (ops.attention, ops.attention_backward)}
    assert all(function is not operator for operator, function in functions.items())
    library = torch.library.Library("flash_entmax", "IMPL")
    try:
        for operator in functions:
            library.impl(operator, refuse, "CPU")
        inputs = [torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3)]
        output = entmax_attention(*inputs, impl="torch")
        torch.autograd.grad(output.sum(), inputs)
        with pytest.raises(AssertionError, match="dispatched"), Operators():
            entmax_attention(*inputs, impl="torch")
    finally:
        library._destroy()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_batches_of_gradients_find_the_operator(impl):
    """autograd's own batching, which is older than torch.func, hides in plain tensors."""
    if impl == "triton" and (HAS_CUDA or not find_spec("triton")):
        pytest.skip("needs Triton's interpreter")
    inputs = [torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3)]
    output = entmax_attention(*inputs, impl=impl)
    vectors = torch.randn(3, *output.shape)
    batched = torch.autograd.grad(output, inputs, vectors, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(output, inputs, vector, retain_graph=True) for vector in vectors]
    for together, *apart in zip(batched, *single, strict=True):
        torch.testing.assert_close(together, torch.stack(apart))
