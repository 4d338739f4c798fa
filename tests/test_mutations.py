"""Deliberate faults must turn the checks red: a check that no fault can fail proves nothing.

A mutation patches one function of one implementation. To add one for the kernels, append a Mutation whose `impl` is
"triton" and whose patch replaces an attribute of a kernel module.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from checks import check_everything

from flash_entmax import tiled
from flash_entmax.problem import Problem


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
    return lambda scores, visible: hide(scores, (visible + 1).clamp_max(scores.shape[-1]))


def sees_one_key(more):
    def mutate(visible):
        return lambda problem, device: (visible(problem, device) + more * problem.is_causal).clamp(
            0, problem.key_length
        )

    return mutate


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
    def mutant(problem, q, k, maximum, offset, tiles):
        tau = maximum - offset
        return distances(problem, q, k, tau, torch.zeros_like(offset), tiles)

    return mutant


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
    Mutation("the forward sees one key too many", tiled, "hide", scores_one_key_too_many),
    Mutation("every causal limit is one too large", Problem, "visible", sees_one_key(1)),
    Mutation("every causal limit is one too small", Problem, "visible", sees_one_key(-1)),
    Mutation("the mask is aligned to the upper left", Problem, "diagonal", aligns_to_the_upper_left),
    Mutation("one step only, as adasplash ships it", tiled, "MAX_STEPS", lambda _: 1),
    Mutation("rows sum to 1 within 1e-3", tiled, "tolerance", lambda _: lambda like: 1e-3),
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
    Mutation("the backward reads the first key head only", tiled.Group, "keys", reads_the_first_key_head),
]


def torch_mutations():
    return [pytest.param(mutation, id=mutation.name) for mutation in MUTATIONS]


def test_checks_pass_without_a_fault(backend):
    check_everything(backend.impl, backend.device)


@pytest.mark.parametrize("mutation", torch_mutations())
def test_fault_is_seen(mutation, monkeypatch):
    original = vars(mutation.owner)[mutation.attribute]
    monkeypatch.setattr(mutation.owner, mutation.attribute, mutation.mutate(original))
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check_everything(mutation.impl, "cuda" if mutation.impl == "triton" and torch.cuda.is_available() else "cpu")
    assert caught.type is AssertionError, f"a crash, not a failed check: {caught.value}"
