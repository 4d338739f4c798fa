"""A recorded call by itself: which keys each query sees, its copies, and where its numbers stand."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flash_entmax import entmax_attention, inspection
from flash_entmax.testing import iid_inputs


@pytest.mark.parametrize("square", [1, 7, 40])
@pytest.mark.parametrize("name", ["causal", "key mask", "block mask by head", "window"])
def test_what_each_query_sees(name, square):
    """By all masks, as numbers and as squares of a map."""
    query, key, value = iid_inputs(2, 2, 90, 8)
    mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) < 0.4
    by_head = torch.rand(2, 90, 90, generator=torch.Generator().manual_seed(1)) < 0.02
    block_mask = create_block_mask(lambda b, h, q, k: by_head[h, q, k], None, 2, 90, 90, device="cpu")
    visible = torch.ones(2, 2, 90, 90, dtype=torch.bool)
    options, seen = {
        "causal": ({"is_causal": True}, visible.tril()),
        "key mask": ({"is_causal": True, "key_mask": mask}, visible.tril() & mask[:, None, None]),
        "block mask by head": ({"block_mask": block_mask}, visible & by_head),
        "window": ({"window_size": (5, 2)}, visible.tril(2).triu(-5)),
    }[name]
    with inspection.record() as calls:
        entmax_attention(query, key, value, **options)
    (call,) = calls
    assert call.mask_heads == (2 if "head" in name else 1)
    counts = seen.sum(-1).double()
    assert call.visible_per_query == pytest.approx((counts.sum() / (counts > 0).sum()).item())
    for head in range(2):
        found, exact = call.visibility(1, head), seen[1, head]
        assert torch.equal(found.sizes(), exact.sum(-1))
        pairs = torch.nn.functional.pad(exact, (0, -90 % square, 0, -90 % square))
        shown = pairs.unflatten(0, (-1, square)).unflatten(2, (-1, square)).any(3).any(1)
        assert torch.equal(found.hidden(90, square), ~shown)


def test_copies_of_a_recorded_call():
    """They count writes to their own inputs, and know of those before."""
    query, key, value = iid_inputs(1, 1, 20, 8)
    key.mul_(2)
    with inspection.record() as calls:
        entmax_attention(query, key, value)
    copies = copy.deepcopy(calls[0]), pickle.loads(pickle.dumps(calls[0]))
    key.add_(1)
    late = copy.deepcopy(calls[0])
    for copied in copies:
        assert copied.rows().shape == (20, 20)
        copied.inputs[1].add_(1)
    for spoiled in (*copies, late):
        with pytest.raises(RuntimeError, match=r"query or key of 'call 0' was written to after the call"):
            spoiled.rows()


def test_numbers_stand_where_the_tensors_are():
    """Not on the default device."""
    query, key, value = iid_inputs(1, 1, 20, 8)
    with inspection.record() as calls, torch.device("meta"):
        entmax_attention(query, key, value, key_mask=torch.ones(1, 20, dtype=torch.bool, device="cpu"))
        found = calls[0].rows(), calls[0].live_keys, calls[0].visible_keys, calls[0].key_sparsity
    assert {tensor.device.type for tensor in found} == {"cpu"}


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (1, 0)])
def test_a_call_without_queries(batch, queries):
    query, key, value = (torch.ones(batch, 2, length, 8) for length in (queries, 9, 9))
    for options in ({}, {"key_mask": torch.ones(batch, 9, dtype=torch.bool)}):
        with inspection.record() as calls:
            entmax_attention(query, key, value, **options)
        for call in calls:
            assert math.isnan(call.visible_per_query)
            if batch:
                assert call.visibility(0, 0).sizes().tolist() == []
