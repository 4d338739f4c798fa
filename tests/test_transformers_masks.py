"""What Transformers says about a mask, read into options of the attention: each mask shows what sdpa sees."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from transformers import masking_utils as masks
from transformers_models import LENGTH, assert_same, make, padding, tokens, with_implementation

from flash_entmax.backends.reference import visible_mask
from flash_entmax.core.call import Problem, ScoreOptions, VisibilityArgs
from flash_entmax.core.visibility import Visibility
from flash_entmax.integrations import transformers as integration
from flash_entmax.integrations.transformers import masks as transformers_masks

CAUSAL, WINDOW = masks.causal_mask_function, masks.sliding_window_causal_mask_function(10)
GROUPS = torch.tensor([0] * 20 + [1] * 30 + [2] * 25).expand(2, -1)
UNSORTED = torch.tensor([0] * 20 + [1] * 30 + [0] * 25).expand(2, -1)
MIXED = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0)).expand(2, -1)
READABLE = {
    "causal": (CAUSAL, (LENGTH, LENGTH, 0, 0)),
    "decoding": (CAUSAL, (1, LENGTH, LENGTH - 1, 0)),
    "chunk": (CAUSAL, (20, LENGTH, LENGTH - 20, 0)),
    "room": (CAUSAL, (20, LENGTH, 30, 0)),
    "counted": (CAUSAL, (20, LENGTH, torch.tensor(30), 0)),
    "window": (WINDOW, (LENGTH, LENGTH, 0, 0)),
    "window that reaches all keys": (WINDOW, (10, 10, 0, 0)),
    "window that lacks one key": (WINDOW, (11, 11, 0, 0)),
    "window, cached": (WINDOW, (5, 14, 80, 71)),
    "window, room": (WINDOW, (5, 70, 3, 0)),
    "bidirectional": (masks.bidirectional_mask_function, (20, LENGTH, 0, 0)),
    "both sides": (masks.sliding_window_bidirectional_mask_function(10), (LENGTH, LENGTH, 0, 0)),
    "packed": (masks.and_masks(CAUSAL, masks.packed_sequence_mask_function(GROUPS)), (LENGTH, LENGTH, 0, 0)),
    "packed window": (masks.and_masks(WINDOW, masks.packed_sequence_mask_function(GROUPS)), (LENGTH, LENGTH, 0, 0)),
}
UNREADABLE = {
    "chunks": (masks.chunked_causal_mask_function(16, torch.tensor([0, 3])), (LENGTH, LENGTH, 0, 0)),
    "blocks": (masks.or_masks(CAUSAL, masks.blockwise_overlay(GROUPS)), (LENGTH, LENGTH, 0, 0)),
    "either window": (masks.or_masks(WINDOW, CAUSAL), (5, 20, 15, 0)),
    "strictly causal": (lambda batch, head, query, key: key < query, (LENGTH, LENGTH, 0, 0)),
    "strided": (lambda batch, head, query, key: (query - key) % 3 == 0, (LENGTH, LENGTH, 0, 0)),
    "anticausal": (lambda batch, head, query, key: query + 3 <= 2 * key, (LENGTH, LENGTH, 0, 0)),
    "by position": (lambda batch, head, query, key: MIXED[batch, key] <= MIXED[batch, query], (LENGTH, LENGTH, 0, 0)),
    "own columns": (masks.packed_sequence_mask_function(UNSORTED), (LENGTH, LENGTH, 0, 0)),
}


def seen_by(mask: integration.Mask, batch: int) -> torch.Tensor:
    """(batch, query length, key length): what the options of a mask let the attention see."""
    lengths, rows = (mask.query_length, mask.key_length), batch
    boundaries = mask.boundaries
    if boundaries is not None:
        lengths, rows = (batch * lengths[0], batch * lengths[1]), 1
    visibility = Visibility(
        False, mask.window, mask.positions, key_mask=mask.key_mask, block_mask=mask.block_mask, cu_seq_q=boundaries,
        cu_seq_k=boundaries, known_intervals=mask.intervals,
    )  # fmt: skip
    query, key = (torch.zeros(rows, 1, length, 8) for length in lengths)
    problem = Problem.of(
        query.shape, key.shape, ScoreOptions(1.5, 1.0), VisibilityArgs(None, None, None, False, lengths[1])
    )
    visible, _ = visible_mask(problem, visibility, query.device)
    if boundaries is not None:  # the blocks of the rows; nothing else may be seen
        blocks = visible[0, 0].unflatten(0, (batch, -1)).unflatten(2, (batch, -1))
        assert not any(blocks[i, :, j].any() for i in range(batch) for j in range(batch) if i != j)
        return torch.stack([blocks[i, :, i] for i in range(batch)])
    return visible.expand(batch, -1, -1, -1)[:, 0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", READABLE | UNREADABLE)
def test_a_mask_shows_what_sdpa_sees(name, padded):
    function, (queries, keys, query_offset, key_offset) = (READABLE | UNREADABLE)[name]
    attention_mask = None
    if padded:  # shorter than the keys, as while a static cache has room
        attention_mask = torch.rand(2, key_offset + keys - 3, generator=torch.Generator().manual_seed(1)) > 0.3
    options = {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": query_offset, "kv_offset": key_offset,
        "mask_function": function, "attention_mask": attention_mask, "device": "cpu",
    }  # fmt: skip
    ours = integration.mask(**options)
    theirs = masks.sdpa_mask(**options, allow_is_causal_skip=False)[:, 0]
    assert seen_by(ours, 2).tolist() == theirs.tolist()
    if not padded:
        assert (ours.block_mask is None) == (name in READABLE)


def test_functions_of_ones_own_are_not_read():
    """Here the tables do not belong together: what each says alone could be read."""
    function = masks.and_masks(masks.packed_sequence_mask_function(GROUPS), UNREADABLE["by position"][0])
    options = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": function, "use_vmap": True}
    theirs = masks.sdpa_mask(**options, allow_is_causal_skip=False)[:, 0]
    assert seen_by(integration.mask(**options), 2).tolist() == theirs.tolist()


def test_a_whole_padding_mask_costs_nothing():
    model, ids = make("llama", 1.5), tokens(2, 20)
    made = masks.create_causal_mask(model.config, torch.zeros(2, 20, 32), torch.ones_like(ids), None)
    assert made == integration.Mask(20, 20, (-1, 0))


def test_padding_on_one_side_is_read_without_a_device_as_well():
    """Older versions of Transformers may not name the device. Rows of padding alone see nothing."""
    seen = padding("left", 3, 20).bool()
    seen[2] = False
    options = {"batch_size": 3, "q_length": 20, "kv_length": 20, "mask_function": CAUSAL, "attention_mask": seen}
    ours = integration.mask(**options)
    theirs = masks.sdpa_mask(**options, device="cpu", allow_is_causal_skip=False)[:, 0]
    assert ours.key_mask is None
    assert seen_by(ours, 3).tolist() == (theirs & seen[:, None]).tolist()
    query = torch.zeros(2, 4, 20, 8)
    with pytest.raises(ValueError, match="the mask is for a batch of 3, but the layer has one of 2"):
        integration.attention(torch.nn.Module(), query, query, query, ours, alpha=1.5)


def test_a_mask_that_is_ready():
    """4-D masks, boolean or of minus infinities, also one for each head; changed in place, and as rows of padding."""
    model, ids = make("llama", 1.5), tokens(2, LENGTH)
    allowed = torch.rand(2, 4, LENGTH, LENGTH) > 0.6
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)

    def run(implementation, mask):
        with torch.no_grad():
            return with_implementation(model, implementation, lambda: model(ids, attention_mask=mask).last_hidden_state)

    assert_same(run("entmax15", allowed), run("oracle", additive))
    assert_same(run("entmax15", additive), run("oracle", additive))
    allowed[:, :, :, 1:60] &= allowed[:, :, :, :59]
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    assert_same(run("entmax15", allowed), run("oracle", torch.where(allowed, 0.0, -1e9)))
    keys = padding("right", 2).bool()[:, None, None]
    assert_same(run("entmax15", keys), run("oracle", torch.where(keys, 0.0, -1e9).expand(-1, -1, LENGTH, -1)))
    with pytest.raises(ValueError, match="holds numbers other than 0 and minus infinity"):
        run("entmax15", additive * 0 - 1.0)
    with pytest.raises(ValueError, match=r"keys\) = \(2, 4, 75, 75\), in which .* got \(2, 4, 75, 70\)"):
        run("entmax15", allowed[..., :70])


def test_a_mask_that_was_written_to_is_read_again():
    """By writes that a tensor does not count; and of one query, for as many as the layer has."""
    kept = np.tril(np.ones((1, 2, 7, 7), dtype=bool))
    tensor, row = torch.from_numpy(kept), torch.ones(1, 2, 1, 7, dtype=torch.bool)
    row[:, :, :, 3] = False
    query, key = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)

    def run(mask, queries=7):
        return integration.attention(torch.nn.Module(), query[:, :, :queries], key, key, mask, alpha=1.5)[0]

    causal = run(tensor)
    kept[:, :, :, 1:5] = False
    assert torch.equal(run(tensor), run(tensor.clone()))
    assert not torch.equal(run(tensor), causal)
    tensor.data.fill_(True)
    assert torch.equal(run(tensor), run(tensor.clone()))
    for queries in (5, 7, 2):
        assert torch.equal(run(row, queries), run(row.clone(), queries))
    with torch.inference_mode():
        made = torch.ones(1, 2, 7, 7, dtype=torch.bool).tril()
        assert_same(run(made), causal)
        made.fill_(True)
        assert_same(run(made), run(made.clone()))


def test_all_layers_share_what_was_made_of_a_mask(monkeypatch):
    made = []
    monkeypatch.setattr(transformers_masks, "_as_block_mask", lambda dense: made.append(dense) or KEPT(dense))
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    make("llama", 1.5)(tokens(2, LENGTH), attention_mask=mask)
    assert len(made) == 1


KEPT = transformers_masks._as_block_mask
