"""The attention layer on parts of sequences: ranks compute what one process computes."""

import re

import pytest
import torch
from rank_layers import WIDTH, copied_and_shown, in_layers, layer_of, outcome, refused_layer
from rank_pool import Failure

pytestmark = pytest.mark.xdist_group("distributed")
LENGTH = 48
WAYS = [(method, layout) for method in ("gather", "heads") for layout in ("balanced", "contiguous")]
CASES = {  # options of the layer, and of its call
    "rope, grouped": ({"num_key_heads": 2, "bias": True}, {}),
    "alibi, learned": ({"position": "alibi", "learn_alpha": True, "alpha": 1.4}, {}),
    "nape, adaptive": ({"position": "nape", "temperature": "adaptive"}, {"key_lengths": torch.tensor([40, 7])}),
    "an alpha for one call": ({}, {"alpha": torch.tensor(1.7, dtype=torch.float64)}),
    "both ways, a window": (
        {"is_causal": False, "window_size": (9, 4), "softcap": 1.5},
        {"key_mask": torch.arange(2 * LENGTH).view(2, -1) % 7 > 2},
    ),
    "packed": ({"temperature": "adaptive", "output_norm": True}, {"cu_seq": torch.tensor([0, 11, 11, 30, 45])}),
}


def whole(parts: list[dict], name: str) -> torch.Tensor:
    """What the ranks have of a sequence in one; of a parameter, the sum of their shares of its gradient."""
    if name not in ("output", "x"):
        return sum(part[name] for part in parts)
    order = torch.cat([part["positions"] for part in parts]).argsort()
    return torch.cat([part[name] for part in parts], -2)[..., order, :]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_layers_compute_what_one_process_computes(pool, name, size):
    """Outputs, gradients of inputs, and shares of the gradients of all parameters."""
    options, call = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shape = (LENGTH, WIDTH) if "cu_seq" in call else (2, LENGTH, WIDTH)
    x, grad_output = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    longest = {"max_seq": LENGTH} if "cu_seq" in call else {}
    expected = outcome(layer_of(**options), x, grad_output, call | longest)
    ways = WAYS if size == 2 else WAYS[:1]
    for parts in zip(*pool.run(size, in_layers, options, x, grad_output, call, ways), strict=True):
        assert parts[0].keys() - {"positions"} == expected.keys()
        for key, tensor in expected.items():
            tolerance = 1e-12 * max(1.0, tensor.abs().max().item())
            torch.testing.assert_close(
                whole(parts, key), tensor, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", ["rope, grouped", "nape, adaptive"])
def test_a_compiled_layer_is_one_graph(pool, name):
    """The same bits as those of the layer as it is."""
    options, call = CASES[name]
    x, grad_output = torch.randn(2, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers, plain = (
        pool.run(2, in_layers, options, x, grad_output, call, WAYS[:1], is_compiled) for is_compiled in (True, False)
    )
    for (own,), (expected,) in zip(answers, plain, strict=True):
        assert all(torch.equal(own[key], expected[key]) for key in expected)


def test_a_copy_of_a_layer_shares_its_group(pool):
    for is_shared, shown in pool.run(2, copied_and_shown):
        assert is_shared
        assert "context_parallel=2 ranks" in shown


REFUSED = {
    "cache": "a cache holds whole sequences",
    "cached": "a cache holds whole sequences",
    "max_seq": "without max_seq, got 3",
    "nested": "context_parallel takes no nested tensors",
    "odd on one rank": r"must divide into 4 chunks of one length, .* got length 6: pad it",
    "group": r"group must be a torch.distributed.ProcessGroup .*, got 'world'",
    "at a time": "heads_at_a_time is for method 'gather', got method 'heads'",
    "flag": "check_ranks must be True or False, got 'no'",
    "method": "method must be 'gather' or 'heads', got 'ring'",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layer_with_a_group_refuses(pool, case):
    for answer in pool.answers(2, refused_layer, case):
        assert isinstance(answer, Failure), answer
        assert answer.of[0] in ("ValueError", "TypeError")
        assert re.search(REFUSED[case], answer.of[1]), answer.of[1]
