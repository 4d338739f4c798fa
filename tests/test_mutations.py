"""Deliberate faults in plain PyTorch must turn the checks red: a check that no fault can fail proves nothing."""

import pytest
from cases import Case
from checks import check_everything
from key_parts import check_parts
from mutants import Mutant, changed_source, plant

from flash_entmax.backends.torch import attention, gradient, parts, score, tiles
from flash_entmax.core import intervals, threshold
from flash_entmax.core.call import Problem
from flash_entmax.testing import iid_inputs

ONE_KEY = "torch.tensor([[1], [0], [0]], dtype=torch.int32)"  # of (start, stop, position)
FAULTS = {
    "a reached tile is dropped": (
        attention, "reached_keys", "return ...",
        "tiles = ...\ntiles[:, -1] &= tiles[:, :-1].logical_not().flatten(1).all(-1, keepdim=True)\nreturn tiles",
    ),
    "a reached key is dropped": (
        attention, "reached_keys", "return ...",
        "keys = (...).flatten(1)\nkeys.scatter_(1, keys.int().argmax(1, keepdim=True), False)\n"
        "return keys.view(*group.block.shape, -1)",
    ),
    "keys with NaN are dropped": (
        attention, "reached_keys", "~(highest.view(...) <= 0)", "(highest.view(*group.block.shape, -1) > 0)",
    ),
    "a key is reached only if all rows of the tile reach it": (
        attention, "reached_keys", "(z + own_offset.unsqueeze(-1)).amax(1)", "(z + own_offset.unsqueeze(-1)).amin(1)",
    ),
    "the certificate is too small": (threshold, "certified_offset", "return ...", "return 0.7 * ..."),
    "every row sees one key too many": (score, "hide", "visibility.stop", "visibility.stop + 1"),
    "every causal limit is one too large": (Problem, "intervals", "position + 1", "position + 2"),
    "every causal limit is one too small": (Problem, "intervals", "position + 1", "position"),
    "the mask is aligned to the upper left": (Problem, "diagonal", "return ...", "return 0"),
    "one step only, as adasplash ships it": (threshold, "solve", "MAX_STEPS", "1"),
    "rows sum to 1 within 1e-3": (threshold, "tolerance", "return ...", "return 1e-3"),
    "dQ lacks the scale": (gradient, "gradients_of_heads", "dq * scale", "dq"),
    "dK is off by alpha - 1": (gradient, "gradients_of_heads", "dk * scale", "dk * scale * (alpha - 1)"),
    "dV is off by 1e-4": (gradient, "gradients_of_heads", "p.mT @ ...", "(1 + 1e-4) * (p.mT @ ...)"),
    "the gradients lack one key of 32": (attention, "solve_heads", "pack_keys(...)", "pack_keys(...) & ~1"),
    "dK and dV lack the first tile of rows": (
        tiles, "add_to_keys", "group.used.flatten()", "(group.used & (group.query_tile > 0).unsqueeze(-1)).flatten()",
    ),
    "unused blocks of scores are counted": (attention, "gathered", "blocks[inner.unused] = -torch.inf", "pass"),
    "unused blocks of keys take part": (score, "hide", "blocks[group.unused] = -torch.inf", "pass"),
    "delta is left out": (
        attention, "attention_forward", "return ...",
        "return whole._replace(value_mean=torch.zeros_like(whole.value_mean))",
    ),
    "delta comes from the output, as for softmax": (
        attention, "attention_forward", "return ...", "return whole._replace(value_mean=whole.output.clone())",
    ),
    "the backward keeps tau in one float": (
        score, "distances", "return ...", "return z.sub_((maximum - offset).unsqueeze(-1)).clamp_min_(0)",
    ),
    "u is p in the output": (attention, "outputs", "support_weight(...)", "probability(...)"),
    "u is p in the gradient": (gradient, "gradients_of_heads", "support_weight(...)", "probability(...)"),
    "only the first key head is read": (tiles, "block_places", "group.unit // problem.group", "0 * group.unit"),
    "windows start a key too early": (
        intervals, "intervals_of_rows", "return ...", f"return ... - {ONE_KEY}",
    ),
    "windows start a key too late": (
        intervals, "intervals_of_rows", "return ...", f"return ... + {ONE_KEY}",
    ),
    "masks hide whole tiles only": (tiles.TileVisibility, "mask", "torch.where(...)", "(kind > HIDDEN)[:, None, None]"),
    "all keys of a tile are masked as its first": (tiles.TileVisibility, "mask", "key % TILE", "0 * key"),
    "distances are one too long": (tiles.TileVisibility, "separations", "return ...", "return ... + 1"),
    "every head has the alpha of the first": (
        score, "by_head", "score.alpha.tolist()", "[score.alpha[0].item()] * problem.heads",
    ),
    "every head has the scale of the first": (
        score, "by_head", "score.scale.tolist()", "[score.scale[0].item()] * problem.heads",
    ),
    "the gradient of alpha is off by 1e-2": (
        gradient, "gradients_of_heads", "grad_alpha / ...", "1.01 * grad_alpha / ...",
    ),
    "the gradient of scale is off by 1e-3": (
        gradient, "gradients_of_heads", "(dq * ...).sum(-1)", "1.001 * (dq * ...).sum(-1)",
    ),
    "the gradient of slopes is off by 1e-3": (
        gradient, "gradients_of_heads", "(ds * ...).sum(-1)", "1.001 * (ds * ...).sum(-1)",
    ),
}  # fmt: skip

FAULTS_OF_PARTS = {
    "the maximum of a part lacks its first keys": (parts, "row_maxima", "z.amax(-1)", "z[Ellipsis, 5:].amax(-1)"),
    "the maximum of a part that no row sees is -inf": (parts, "row_maxima", "torch.where(...)", "z.amax(-1)"),
    "F of a part adds up u": (parts, "sums_at", "probability(...)", "support_weight(...)"),
    "sum u of a part adds up p": (parts, "sums_at", "support_weight(...)", "probability(...)"),
    "the output of a part is weighted by u": (parts, "output_at", "probability(...)", "support_weight(...)"),
    "parts of all heads read the first tiles of keys": (
        tiles, "block_places", "(group.unit // problem.group).unsqueeze(-1) * blocks + group.block",
        "0 * group.unit.unsqueeze(-1) + 0 * group.block",
    ),
}  # fmt: skip


def test_checks_pass_without_a_fault():
    check_everything("torch", "cpu")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS[fault]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check_everything("torch", "cpu")


def check_causal_parts() -> None:
    inputs = iid_inputs(1, 2, 70, 16, key_length=150, key_heads=1)
    check_parts(Case(*inputs, alpha=1.3, is_causal=True), "torch", (40, 140))


def test_parts_pass_without_a_fault():
    check_causal_parts()


@pytest.mark.parametrize("fault", FAULTS_OF_PARTS)
def test_fault_of_parts_is_seen(fault, monkeypatch, tmp_path):
    plant(Mutant(*FAULTS_OF_PARTS[fault]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check_causal_parts()


def test_a_mutant_takes_the_place_of_every_import_until_it_is_undone(monkeypatch, tmp_path):
    original = threshold.certified_offset
    with monkeypatch.context() as patch:
        plant(Mutant(threshold, "certified_offset", "return ...", "return 0.7 * ..."), patch, tmp_path)
        assert attention.certified_offset is threshold.certified_offset is not original
    assert attention.certified_offset is threshold.certified_offset is original


SOURCE = "def f(a, b):\n    return g(a,\n        b, a)\n"


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("return ...", "return 2 * ...", "return 2 * g(a, b, a)"),
        ("g(a, ...)", "g(0, ...)", "return g(0, b, a)"),
        ("b", "c.d", "return g(a, c.d, a)"),
        ("return ...", "a += 1; return ...", "a += 1\n    return g(a, b, a)"),
    ],
)
def test_a_mutant_is_its_change(old, new, changed):
    assert changed_source(SOURCE, Mutant(None, "f", old, new)) == f"def f(a, b):\n    {changed}\n"


@pytest.mark.parametrize("old", ["a", "c", "g(b, ...)", "g(a, b)", "return a"])
def test_a_change_that_does_not_apply_once_is_an_error(old):
    with pytest.raises(ValueError, match="times, not 1"):
        changed_source(SOURCE, Mutant(None, "f", old, "0"))
