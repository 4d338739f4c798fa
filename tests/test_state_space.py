"""The outputs of state-space layers as sums over input tokens: against the layers themselves, and their derivatives."""

import pytest
import torch
from mixers import WIDTH, mixer_of, plain_mamba, plain_mamba2
from torch import nn

from flash_entmax.integrations import state_space
from flash_entmax.integrations.state_space import ACCEPTED, contributions, shares

transformers = pytest.importorskip("transformers")
OF_OLD_NORMS = tuple(map(int, transformers.__version__.split(".")[:2])) <= (5, 20)
LENGTH = 37  # not a multiple of the output tokens that are split at a time


def inputs(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_sum_is_the_output_of_the_layer(name):
    """Without padding, and with padding on both sides."""
    mixer, hidden = mixer_of(name), inputs()
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :9], mask[1, -9:] = 0, 0
    for own in (None, mask):
        with torch.no_grad():
            expected = mixer(hidden, attention_mask=own)
        parts, bias = contributions(mixer, hidden, attention_mask=own)
        assert parts.shape == (2, LENGTH, LENGTH, WIDTH)
        allowed = 16 * torch.finfo(torch.float32).eps * (parts.abs().sum(2) + bias.abs()).amax()
        torch.testing.assert_close(parts.sum(2) + bias, expected, rtol=0, atol=allowed.item())
        assert not parts.movedim(-1, 1).triu(1).any()
    assert not parts[0, :, :9].any()
    assert not parts[1, :, -9:].any()


@pytest.mark.parametrize(("name", "plain"), [("MambaMixer", plain_mamba), ("Mamba2Mixer", plain_mamba2)])
def test_each_part_is_what_one_token_contributes(name, plain):
    """With gates held fixed a layer is linear in its tokens: a part is the derivative, times the token."""
    mixer, hidden = mixer_of(name), inputs(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(plain(mixer, hidden), mixer(hidden), rtol=1e-4, atol=1e-4)
    mixer, hidden = mixer.double(), hidden.double()
    derivative = torch.autograd.functional.jacobian(lambda h: plain(mixer, h), hidden, vectorize=True)[0, :, :, 0]
    parts, bias = contributions(mixer, hidden)
    assert parts.dtype == torch.float64
    torch.testing.assert_close(parts[0], torch.einsum("iakc,kc->ika", derivative, hidden[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.sum(2) + bias, plain(mixer, hidden).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["MambaMixer", "Mamba2Mixer"])
def test_slices_are_those_of_the_whole(name):
    mixer, hidden = mixer_of(name), inputs()
    parts, bias = contributions(mixer, hidden)
    for outputs in (range(1), range(5, 30), range(16, 32), range(LENGTH - 1, LENGTH)):
        own = slice(outputs.start, outputs.stop)
        found = contributions(mixer, hidden, outputs=outputs)
        torch.testing.assert_close(found.parts, parts[:, own])
        torch.testing.assert_close(found.bias, bias[:, own])


@pytest.mark.parametrize("name", ["MambaMixer", "Mamba2Mixer"])
def test_the_digits_of_late_tokens(name):
    """Time steps add up to thousands: their float32 sum has no digits left for the decay between neighbours."""
    mixer, hidden = mixer_of(name), inputs(1, 300)
    with torch.no_grad():
        if name == "Mamba2Mixer":
            mixer.time_step_limit = 0.0, torch.inf
        (mixer.dt_bias if name == "Mamba2Mixer" else mixer.dt_proj.bias).fill_(40.0)
        mixer.A_log.fill_(-4.0)
    last = range(290, 300)
    found = contributions(mixer, hidden, outputs=last).parts.double()
    exact = contributions(mixer.double(), hidden.double(), outputs=last).parts
    assert ((found - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("name", ["FalconMambaMixer", "BambaMixer"])
def test_shares_are_rows_that_sum_to_one(name):
    mixer, hidden = mixer_of(name), inputs()
    mask = torch.ones(2, LENGTH)
    mask[1, :9] = 0
    parts = contributions(mixer, hidden, attention_mask=mask).parts.double()
    whole = parts.sum(2, keepdim=True)
    amounts = {
        "norm": parts.square().sum(-1).sqrt(),
        "alti": (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp_min(0),
    }
    for measure, amount in amounts.items():
        found = shares(mixer, hidden, attention_mask=mask, measure=measure)
        assert (found >= 0).all()
        expected = (amount / amount.sum(-1, keepdim=True)).nan_to_num(0)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)
        whole_rows = mask > 0
        if OF_OLD_NORMS:  # whose outputs are others: all parts of one token point away from its output
            whole_rows = whole_rows & (amount > 0).any(-1)
            assert whole_rows.sum() >= mask.sum() - 1
        torch.testing.assert_close(found.sum(-1), whole_rows.float(), rtol=0, atol=1e-6)
    same = shares(mixer, hidden, attention_mask=mask > 0, measure="alti")
    torch.testing.assert_close(same, found)


def test_parts_of_16_bit_layers_are_float32():
    mixer, hidden = mixer_of("MambaMixer").bfloat16(), inputs(1, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = contributions(mixer, hidden)
    assert found.parts.dtype == torch.float32
    assert not found.parts.requires_grad
    torch.testing.assert_close(found.parts, contributions(mixer.float(), hidden.float()).parts)
    assert shares(mixer.bfloat16(), hidden).dtype == torch.float32


class Adapter(nn.Linear):
    pass


def test_refusals():
    mixer, hidden = mixer_of("MambaMixer"), inputs()
    wrong = [
        ((nn.Linear(3, 3), hidden), {}, TypeError, "must be a state-space layer of Transformers, one of MambaMixer, "),
        ((None, hidden), {}, TypeError, "got None"),
        ((mixer, None), {}, TypeError, "hidden must be a torch.Tensor, got None"),
        ((mixer, hidden.long()), {}, TypeError, "floating-point dtype, got torch.int64"),
        ((mixer, hidden[0]), {}, ValueError, r"\(batch, tokens, 12\).* got \(37, 12\)"),
        ((mixer, hidden[:, :0]), {}, ValueError, "none of them 0"),
        ((mixer, hidden[..., :5]), {}, ValueError, r"got \(2, 37, 5\)"),
        ((mixer, hidden.to("meta")), {}, ValueError, "mixer's device, cpu, got meta"),
        ((mixer, hidden), {"attention_mask": [1]}, TypeError, "must be a torch.Tensor or None, got list"),
        ((mixer, hidden), {"attention_mask": torch.ones(2, 3)}, ValueError, r"\(2, 37\).* got \(2, 3\)"),
        ((mixer, hidden), {"attention_mask": torch.full((2, 37), -1.0)}, ValueError, "0 for padding and 1 for tokens"),
    ]
    of_parts = [
        ((mixer, hidden), {"outputs": 3}, TypeError, "a range of output tokens or None, got 3"),
        ((mixer, hidden), {"outputs": range(30, 38)}, ValueError, r"within the 37 tokens.* got range\(30, 38\)"),
        ((mixer, hidden), {"outputs": range(4, 4)}, ValueError, "not empty"),
        ((mixer, hidden), {"outputs": range(0, 4, 2)}, ValueError, "of step 1"),
    ]
    of_shares = [
        ((mixer, hidden), {"measure": 2}, TypeError, "measure must be a string, got 2"),
        ((mixer, hidden), {"measure": "l2"}, ValueError, "measure must be one of 'norm', 'alti', got 'l2'"),
    ]
    for function, cases in ((contributions, wrong + of_parts), (shares, wrong + of_shares)):
        for arguments, options, error, words in cases:
            with pytest.raises(error, match=words):
                function(*arguments, **options)
    for options, error, words in (
        ({"measure": "l2"}, ValueError, "measure must be one of"),
        ({"covered": "all"}, TypeError, "covered must be a number above 0 and at most 1, got 'all'"),
        ({"covered": 0}, ValueError, "above 0 and at most 1, got 0"),
    ):
        with pytest.raises(error, match=words):
            state_space.recorder(**options)


def test_layers_that_cannot_be_read_are_refused():
    hidden = inputs()
    with pytest.raises(ValueError, match=r"activation of MambaMixer must be 'silu'.* got 'gelu'"):
        contributions(mixer_of("MambaMixer", hidden_act="gelu"), hidden)
    mixer = mixer_of("Mamba2Mixer")
    mixer.out_proj = Adapter(24, WIDTH)
    with pytest.raises(TypeError, match=r"out_proj of Mamba2Mixer must be a torch.nn.Linear.* got Adapter"):
        contributions(mixer, hidden)

    class MambaMixer(nn.Module):
        """A class of that name that is not of Transformers."""

    with pytest.raises(TypeError, match="got MambaMixer"):
        contributions(MambaMixer(), hidden)
