"""The keys of a call in parts, each computed by itself: together they give what the whole call gives."""

import pytest
import torch
from cases import Case, make_case
from key_parts import Parts, check_parts

from flash_entmax.backends import BACKENDS
from flash_entmax.testing import topic_inputs

PAIR = torch.tensor([0.4, 0.8])
CASES = {  # options, and the keys at which a part ends
    "causal": ({"is_causal": True}, (37, 75)),
    "causal, cut at tiles": ({"is_causal": True}, (64,)),
    "sparsemax": ({"alpha": 2.0}, (1, 89)),
    "window": ({"window_size": (30, 4), "alpha": 1.3}, (50,)),
    "alibi": ({"alibi_slopes": torch.tensor([0.1, -0.02]), "is_causal": True}, (37, 75)),
    "an infinite slope": ({"alibi_slopes": torch.tensor([torch.inf, 0.1])}, (75,)),
    "softcap": ({"softcap": 0.7}, (37, 75)),
    "alpha by head, softcap": ({"alpha": 1.1 + PAIR, "scale": PAIR, "softcap": 2.0}, (80,)),
    "grouped heads": ({"heads": 4, "key_heads": 2, "batch": 2, "value_dim": 24}, (70,)),
    "a part that no query sees": ({"key_lengths": torch.tensor([60])}, (37, 66)),
    "rows that see no key": ({"query_positions": -20, "is_causal": True}, (9,)),
    "a part without keys": ({}, (50, 50)),
}


def case_of(backend, name, dtype=torch.float32):
    options = {key: o.to(backend.device) if isinstance(o, torch.Tensor) else o for key, o in CASES[name][0].items()}
    length, key_length = backend.sizes((40, 90), (70, 130), (70, 130))
    return make_case(backend, length=length, key_length=key_length, dtype=dtype, **options)


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_call(backend, name):
    check_parts(case_of(backend, name), backend.impl, CASES[name][1])


def test_parts_of_a_key_mask(backend):
    case = case_of(backend, "causal")
    case.options["key_mask"] = (torch.arange(case.key.shape[2], device=backend.device) % 3 > 0)[None]
    check_parts(case, backend.impl, (37,))


def test_tiles_that_a_mask_hides_whole_are_not_read(backend):
    """Their keys would win every row. The tile before is seen in part: its bits might be read for theirs."""
    case = case_of(backend, "causal")
    tile = BACKENDS[backend.impl].tile_size(case.key.dtype, case.key.shape[3])
    place = torch.arange(case.key.shape[2], device=backend.device)
    hidden = (place >= tile) & (place < 2 * tile)
    assert hidden.any()
    case.key[:, :, hidden] *= 50.0
    case.options["key_mask"] = (~hidden & (place != 3))[None]
    check_parts(case, backend.impl, (2 * tile,) if len(place) > 2 * tile else (tile // 2,))


@pytest.mark.parametrize("name", ["causal", "alpha by head, softcap"])
def test_parts_add_up_in_every_dtype(backend, name):
    for dtype in backend.dtypes:
        check_parts(case_of(backend, name, dtype), backend.impl, CASES[name][1])


def test_a_part_may_hold_no_support(backend):
    """Keys of one topic lie together, so most parts hold none of a row's support."""
    check_parts(Case(*topic_inputs(1, 1, 96, 16, 3, device=backend.device)), backend.impl, (30, 70))


def test_nan_of_a_part_reaches_the_rows_that_see_it(backend):
    case = case_of(backend, "causal")
    length, key_length = case.query.shape[2], case.key.shape[2]
    bad = key_length - 20
    seen = torch.arange(length, device=backend.device) + key_length - length >= bad  # the last query sees every key
    clean = solved(case, backend)
    case.key[0, 1, bad, 3] = torch.nan
    output = solved(case, backend)
    assert output[:, 1, seen].isnan().all()
    torch.testing.assert_close(output[:, 1, ~seen], clean[:, 1, ~seen])
    torch.testing.assert_close(output[:, 0], clean[:, 0])


def solved(case, backend):
    parts = Parts(case, backend.impl, (37, 75))
    maximum = parts.maximum()
    return parts.output(maximum, parts.offset(maximum))


def test_a_part_that_is_not_seen_adds_nothing(backend):
    """No maximum, no F, no sum u, no output, whatever its keys and values hold."""
    case = make_case(backend, length=40, key_length=70, key_lengths=torch.tensor([50], device=backend.device))
    parts = Parts(case, backend.impl, (50,))
    problem, key, value = parts.parts[1]
    key.fill_(torch.nan)
    value.fill_(torch.nan)
    maximum, offset = (torch.full(case.query.shape[:3], number, device=backend.device) for number in (0.0, 1.0))
    assert (parts.backend.row_maxima(problem, case.query, key) == torch.inf).all()
    for result in parts.backend.sums_at(problem, case.query, key, maximum, offset):
        assert (result == 0).all()
    assert (parts.backend.output_at(problem, case.query, key, value, maximum, offset) == 0).all()
