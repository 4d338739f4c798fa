"""Deliberate faults must turn the checks red: a check that no fault can fail proves nothing.

A mutation patches one function of one implementation. To add one for the kernels, append a Mutation whose `impl` is
"triton" and whose patch replaces an attribute of a kernel module.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from checks import check_everything

from flash_entmax import functional
from flash_entmax.backends.torch import attention as tiled
from flash_entmax.core import threshold
from flash_entmax.core.call import Problem
from flash_entmax.core.visibility import HIDDEN


@dataclass(frozen=True)
class Mutation:
    name: str
    owner: object
    attribute: str
    mutate: Callable  # from the original to its faulty replacement
    impl: str = "torch"


def drops_a_tile(survivors):
    def mutant(*args):
        live = survivors(*args)
        live[..., -1] &= live[..., :-1].logical_not().all(-1)
        return live

    return mutant


def overtakes_nan(_):
    def mutant(block_maxima, maximum, offset):
        return (block_maxima - maximum.unsqueeze(-1) + offset.unsqueeze(-1) > 0).any(2)

    return mutant


def asks_every_row(_):
    def mutant(block_maxima, maximum, offset):
        return (block_maxima - maximum.unsqueeze(-1) + offset.unsqueeze(-1) > 0).all(2)

    return mutant


def scores_one_key_too_many(hide):
    return lambda z, scope, group: hide(z, scope._replace(stop=scope.stop + 1), group)


def sees_one_key(more):
    def mutate(intervals):
        def mutant(problem, device):
            start, stop, position = intervals(problem, device).unbind(1)
            return torch.stack((start, (stop + more * problem.is_causal).clamp(0, problem.key_length), position), 1)

        return mutant

    return mutate


def starts_a_key(later):
    """In every interval that is not plain."""

    def mutate(intervals):
        def mutant(*args):
            found = intervals(*args)
            return None if found is None else found + found.new_tensor([later, 0, 0]).view(3, 1)

        return mutant

    return mutate


def forgets_the_bits(mask):
    return lambda scope, kind: mask(scope, kind) | (kind > HIDDEN)[:, None, None]


def counts_distance_from_the_next_key(separations):
    return lambda scope, group: separations(scope, group) + 1


def takes_the_first_number(by_head):
    def mutant(problem, modifiers):
        if modifiers.alpha is not None:
            first = (modifiers.alpha[:1], modifiers.scale[:1])
            modifiers = modifiers._replace(alpha=first[0].expand(problem.heads), scale=first[1].expand(problem.heads))
        return by_head(problem, modifiers)

    return mutant


def changes_parameter(row, factor):
    """One of alpha, scale and slopes."""

    def change(problem, gradient):
        gradient = gradient.clone()
        gradient[row : row + 1] *= factor
        return gradient

    return changes_gradient("parameters", change)


def aligns_to_the_upper_left(_):
    return property(lambda problem: 0)


def changes_gradient(name, change):
    def mutate(backward):
        def mutant(problem, *args):
            gradients = backward(problem, *args)
            return gradients._replace(**{name: change(problem, getattr(gradients, name))})

        return mutant

    return mutate


def forgets_delta(attention):
    def mutant(*args):
        solution = attention(*args)
        return solution._replace(value_mean=torch.zeros_like(solution.value_mean))

    return mutant


def takes_the_output_for_the_value_mean(attention):
    def mutant(*args):
        solution = attention(*args)
        return solution._replace(value_mean=solution.output.clone())

    return mutant


def keeps_tau_in_one_float(distances):
    return lambda z, maximum, offset: distances(z, maximum - offset, torch.zeros_like(offset))


def forgets_the_last_live_tile(attention):
    def mutant(*args):
        solution = attention(*args)
        return solution._replace(live=solution.live & ~1)

    return mutant


def reads_the_first_key_head(_):
    return lambda group, problem: (torch.zeros_like(group.unit).unsqueeze(-1), group.key_tile)


MUTATIONS = [
    Mutation("a surviving tile is dropped", tiled, "survivors", drops_a_tile),
    Mutation("tiles with NaN are dropped", tiled, "survivors", overtakes_nan),
    Mutation("a tile lives only if all its rows need it", tiled, "survivors", asks_every_row),
    Mutation("the certificate is too small", tiled, "certified_offset", lambda f: lambda *args: 0.7 * f(*args)),
    Mutation("every row sees one key too many", tiled, "hide", scores_one_key_too_many),
    Mutation("every causal limit is one too large", Problem, "intervals", sees_one_key(1)),
    Mutation("every causal limit is one too small", Problem, "intervals", sees_one_key(-1)),
    Mutation("the mask is aligned to the upper left", Problem, "diagonal", aligns_to_the_upper_left),
    Mutation("one step only, as adasplash ships it", threshold, "MAX_STEPS", lambda _: 1),
    Mutation("rows sum to 1 within 1e-3", threshold, "tolerance", lambda _: lambda like: 1e-3),
    Mutation("dQ lacks the scale", tiled, "attention_backward", changes_gradient("query", lambda p, g: g / p.scale)),
    Mutation(
        "dK is off by alpha - 1", tiled, "attention_backward", changes_gradient("key", lambda p, g: g * (p.alpha - 1))
    ),
    Mutation("dV is off by 1e-4", tiled, "attention_backward", changes_gradient("value", lambda p, g: g * (1 + 1e-4))),
    Mutation("dK lacks a tile of queries", tiled, "attention", forgets_the_last_live_tile),
    Mutation("delta is left out", tiled, "attention", forgets_delta),
    Mutation("delta comes from the output, as for softmax", tiled, "attention", takes_the_output_for_the_value_mean),
    Mutation("the backward keeps tau in one float", tiled, "distances", keeps_tau_in_one_float),
    Mutation("u is p", tiled, "support_weight", lambda _: tiled.probability),
    Mutation("only the first key head is read", tiled.Group, "keys", reads_the_first_key_head),
    Mutation("windows start a key too early", functional, "intervals", starts_a_key(-1)),
    Mutation("windows start a key too late", functional, "intervals", starts_a_key(1)),
    Mutation("masks hide whole tiles only", tiled.Scope, "mask", forgets_the_bits),
    Mutation("distances are one too long", tiled.Scope, "separations", counts_distance_from_the_next_key),
    Mutation("every head has the numbers of the first", tiled, "by_head", takes_the_first_number),
    Mutation("the gradient of alpha is off by 1e-2", tiled, "attention_backward", changes_parameter(0, 1.01)),
    Mutation("the gradient of scale is off by 1e-3", tiled, "attention_backward", changes_parameter(1, 1.001)),
    Mutation("the gradient of slopes is off by 1e-3", tiled, "attention_backward", changes_parameter(2, 1.001)),
]


def torch_mutations():
    return [pytest.param(mutation, id=mutation.name) for mutation in MUTATIONS]


def test_checks_pass_without_a_fault():
    check_everything("torch", "cpu")


@pytest.mark.parametrize("mutation", torch_mutations())
def test_fault_is_seen(mutation, monkeypatch):
    original = vars(mutation.owner)[mutation.attribute]
    monkeypatch.setattr(mutation.owner, mutation.attribute, mutation.mutate(original))
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_everything(mutation.impl, "cuda" if mutation.impl == "triton" and torch.cuda.is_available() else "cpu")
    assert caught.type is AssertionError, f"a crash, not a failed check: {caught.value}"
