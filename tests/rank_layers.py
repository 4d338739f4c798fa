"""What the ranks of tests/test_context_parallel.py do: each function runs on every rank, with its group first."""

import copy

import torch
from torch import distributed

from flash_entmax.distributed import ContextParallel, positions, shard
from flash_entmax.nn import EntmaxAttention

WIDTH, HEADS = 24, 4


def layer_of(**options) -> EntmaxAttention:
    """A float64 layer in which no parameter is at its start; the same one on every rank."""
    torch.manual_seed(0)
    layer = EntmaxAttention(WIDTH, HEADS, **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.add_((0.1 if name.startswith("temperature") else 0.3) * torch.randn_like(parameter))
    return layer


def outcome(layer, x, grad_output, options) -> dict:
    """Output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    output = layer(x, **options)
    output.backward(grad_output)
    return {"output": output.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def in_layers(group, options: dict, x, grad_output, call: dict, ways, is_compiled: bool = False) -> list[dict]:
    """Own positions, and the outcome on the own parts, for each (method, layout)."""
    answers = []
    for method, layout in ways:
        layer = layer_of(**options, context_parallel=ContextParallel(group, method, layout))
        if is_compiled:
            torch._dynamo.reset()
            layer.compile(backend="aot_eager", fullgraph=True)
        own = [shard(whole, -2, group, layout) for whole in (x, grad_output)]
        own_call = dict(call)
        if "key_mask" in call:
            own_call["key_mask"] = shard(call["key_mask"], 1, group, layout)
        answers.append({"positions": positions(x.shape[-2], group, layout), **outcome(layer, *own, own_call)})
    return answers


def copied_and_shown(group) -> tuple[bool, str]:
    """A copy shares the group; what the layer says of itself."""
    layer = layer_of(context_parallel=group)
    return copy.deepcopy(layer).context_parallel is layer.context_parallel, repr(layer)


def refused_layer(group, case: str) -> None:
    """A call that a layer with a group refuses."""
    layer, x = layer_of(context_parallel=group), torch.zeros(1, 4, WIDTH, dtype=torch.float64)
    calls = {
        "cache": lambda: layer.new_cache(1, 4),
        "cached": lambda: layer(x, cache=layer_of().new_cache(1, 4)),
        "max_seq": lambda: layer(x[0], cu_seq=torch.tensor([0, 3]), max_seq=3),
        "nested": lambda: layer(torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged)),
        "odd on one rank": lambda: layer(x[:, : 4 - distributed.get_rank(group)]),
        "group": lambda: layer_of(context_parallel="world"),
        "at a time": lambda: ContextParallel(group, method="heads", heads_at_a_time=1),
        "flag": lambda: ContextParallel(group, check_ranks="no"),
        "method": lambda: ContextParallel(group, "ring"),
    }
    calls[case]()
