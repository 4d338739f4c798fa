"""State-space layers as inspection records them: beside attention, with the tokens that make up most of each output."""

import pytest
import torch
from mixers import VOCABULARY, model_of
from torch.utils.checkpoint import checkpoint

from flash_entmax import inspection
from flash_entmax.integrations import state_space

pytest.importorskip("transformers")


def tokens(batch: int = 1, length: int = 70) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def recorded(model, ids, *, options=(), **forward) -> list:
    with torch.no_grad(), inspection.record(model, layers=state_space.recorder(**dict(options))) as calls:
        model(ids, **forward)
    return calls


@pytest.fixture(scope="module")
def hybrid():
    """Bamba with attention in its second layer of three."""
    from flash_entmax.integrations.transformers import register

    register()
    model = model_of("BambaMixer", num_hidden_layers=3, attn_layer_indices=[1])
    model.set_attn_implementation("entmax15")
    return model


def test_layers_are_recorded_beside_attention(hybrid):
    calls = recorded(hybrid, tokens())
    assert [(call.name, call.number, type(call).__name__) for call in calls] == [
        ("layers.0.mamba", 0, "RecordedMixer"),
        ("layers.1.self_attn", 1, "RecordedCall"),
        ("layers.2.mamba", 2, "RecordedMixer"),
    ]
    assert repr(calls[0]) == "RecordedMixer('layers.0.mamba', BambaMixer, batch 1, 70 tokens, norm)"
    with torch.no_grad(), inspection.record(hybrid) as attention:
        hybrid(tokens())
    assert [(call.name, call.number) for call in attention] == [("layers.1.self_attn", 0)]
    with (
        torch.no_grad(),
        inspection.record(hybrid, layers=state_space.recorder(), only=lambda name: "2" in name) as one,
    ):
        hybrid(tokens())
    assert [call.name for call in one] == ["layers.2.mamba"]
    assert not any(part._forward_pre_hooks for part in hybrid.modules())


@pytest.mark.parametrize(("measure", "covered"), [("norm", 0.9), ("alti", 0.6), ("norm", 1)])
def test_rows_hold_the_fewest_tokens_that_cover_an_output(hybrid, measure, covered):
    """The numbers of a call are those of its rows."""
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, :3] = 0
    found = recorded(hybrid, tokens(2), options={"measure": measure, "covered": covered}, attention_mask=mask)[2]
    shares, dense = found.shares(), torch.stack([found.rows(batch).to_dense() for batch in range(2)])
    assert ((dense == 0) | (dense == shares)).all()
    total = dense.sum(-1)
    assert ((total >= covered - 1e-6) == (mask == 1)).all()
    assert not dense[1, :3].any()
    largest_left = (shares * (dense == 0)).amax(-1)
    smallest = dense.masked_fill(dense == 0, 1).amin(-1)
    assert (largest_left <= smallest).all()
    if covered < 1:
        assert ((total - smallest) * mask < covered).all()
    else:
        torch.testing.assert_close(dense, shares)
    kept = dense > 0
    assert found.covered == covered
    assert torch.equal(found.size, kept.sum(-1).unsqueeze(1))
    torch.testing.assert_close(found.keys_per_query, (kept.sum() / 137).double().view(1))
    together = torch.stack((kept[:, :64].any(1).sum(-1), kept[:, 64:].any(1).sum(-1)), -1)
    torch.testing.assert_close(found.keys_per_64_queries, together.double().mean().view(1))
    torch.testing.assert_close(found.key_sparsity, 1 - (together.sum() / (2 * (64 + 70))).double().view(1))
    tiles = torch.stack([kept[:, rows, keys].any(-1).any(-1) for rows, keys in TILES], -1)
    torch.testing.assert_close(found.block_sparsity, 1 - tiles.double().mean().view(1))
    by_position = torch.stack((tiles[:, 0], tiles[:, 1:].double().mean(-1)), -1).mean(0)
    torch.testing.assert_close(found.block_sparsity_by_position, 1 - by_position)
    assert found.visible_per_query == 35.5
    assert (found.intervals[1, 1] == torch.arange(1, 71)).all()


EARLY, LATE = slice(64), slice(64, None)
TILES = (EARLY, EARLY), (LATE, EARLY), (LATE, LATE)


def test_inputs_that_are_released_or_written_to(hybrid):
    with torch.no_grad(), inspection.record(hybrid, layers=state_space.recorder(), keep_inputs=False) as calls:
        hybrid(tokens())
    kept = recorded(hybrid, tokens())
    torch.testing.assert_close(calls[0].rows().to_dense(), kept[0].rows().to_dense())
    with pytest.raises(RuntimeError, match=r"input of 'layers.0.mamba' was released"):
        calls[0].shares()
    with torch.no_grad():
        hybrid.layers[2].mamba.D.add_(1)
    with pytest.raises(RuntimeError, match=r"weight of 'layers.2.mamba' was written to after the call"):
        kept[2].rows()
    kept[0].rows()
    with pytest.raises(IndexError, match="head must be from 0 to 0, got 1"):
        kept[0].rows(0, 1)


def test_what_a_backward_pass_computes_again_is_not_recorded():
    model = model_of("MambaMixer").train()
    hidden = torch.randn(1, 9, 12, requires_grad=True)
    with inspection.record(model, layers=state_space.recorder()) as calls:
        checkpoint(model.layers[0].mixer, hidden, use_reentrant=False).sum().backward()
    assert [call.name for call in calls] == ["layers.0.mixer"]
    assert not calls[0].inputs[0].requires_grad


def test_what_cannot_be_recorded_is_refused(hybrid):
    first = hybrid(tokens(), use_cache=True)
    with pytest.raises(ValueError, match=r"layers.0.mamba goes on from the state of a cache"):
        recorded(hybrid, tokens(1, 1), past_key_values=first.past_key_values)
    assert len(recorded(hybrid, tokens(), use_cache=True)) == 3
    with pytest.raises(ValueError, match="packed sequences"):
        recorded(hybrid.layers[0].mamba, torch.randn(1, 9, 12), seq_idx=torch.zeros(1, 9))
    for arguments, options, error, words in (
        ((), {"layers": state_space.recorder()}, ValueError, "layers are found in a model, and model is None"),
        ((hybrid,), {"layers": "all"}, TypeError, "layers must be a function .* got 'all'"),
    ):
        with pytest.raises(error, match=words), inspection.record(*arguments, **options):
            pass
