"""Which keys a query sees: padding, positions, windows and block masks, alone and together."""

import random
from dataclasses import replace

import pytest
import torch
from cases import attend, make_case, run
from checks import check_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from flash_entmax import entmax_attention
from flash_entmax.core import visibility
from flash_entmax.core.intervals import intervals
from flash_entmax.core.registration import function_of
from flash_entmax.testing import iid_inputs, poisoned

WINDOWS = ((0, 0), (0, -1), (-1, 0), (3, 0), (0, 4), (17, 5), (64, 0), (70, -1), (-1, 70), (500, 500), (-1, -1))


def seen_keys(case, backend, **more):
    """(batch, heads, query length, key length) bool by what the output does to one-hot values, with equal scores."""
    keys = case.key.shape[2]
    value = torch.eye(keys, device=case.key.device).expand(*case.key.shape[:2], keys, keys)
    plain = case.with_tensors(query=torch.zeros_like(case.query), key=torch.zeros_like(case.key), value=value)
    return attend(plain, backend.impl, **more) > 0


# Padding


@pytest.mark.parametrize("is_causal", [False, True])
def test_key_lengths(backend, is_causal):
    """Padding on the right: a batch row is its own shorter call, and its padding gets gradient 0. 0 keys: output 0."""
    lengths = torch.tensor([0, 1, 64, 90], device=backend.device)
    sizes = {"batch": 4, "heads": 1, "length": 70, "key_length": 90}
    case = make_case(backend, **sizes, key_lengths=lengths, is_causal=is_causal, query_positions=20)
    result = check_attention(case, backend.impl)
    assert (result.output[0] == 0).all()
    for row, length in enumerate(lengths.tolist()):
        for gradient in result.gradients[1:]:
            assert (gradient[row, :, length:] == 0).all()
        if length and not is_causal:
            alone = make_case(backend)
            alone.query, alone.key, alone.value = (
                case.query[row : row + 1], case.key[row : row + 1, :, :length], case.value[row : row + 1, :, :length],
            )  # fmt: skip
            torch.testing.assert_close(
                attend(alone, backend.impl)[0], result.output[row], rtol=1e-5, atol=2e-6
            )  # fmt: skip


def test_key_lengths_of_either_integer_type(backend):
    case = make_case(backend, batch=2, length=40)
    for dtype in (torch.int32, torch.int64):
        case.options["key_lengths"] = torch.tensor([7, 40], device=backend.device, dtype=dtype)
        check_attention(case, backend.impl)


def key_masks(keys, device):
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(keys)
    masks = {
        "left padding": torch.stack([index >= 70, index >= 3]),
        "random": torch.rand(2, keys, generator=generator) < 0.3,
        "nothing in a row": torch.stack([index < 0, index >= 0]),
        "one key": torch.stack([index == 0, index == keys - 1]),
        "whole tiles": torch.stack([index // 64 == 1, index // 64 == 0]),
        "bits of every place": torch.stack([index % 32 == 31, index % 31 == 0]),
    }
    return {name: mask.to(device) for name, mask in masks.items()}


@pytest.mark.parametrize("name", key_masks(130, "cpu"))
def test_key_masks(backend, name):
    mask = key_masks(130, backend.device)[name]
    case = make_case(backend, batch=2, heads=1, length=20, key_length=130, key_mask=mask)
    with poisoned():
        result = check_attention(case, backend.impl)
    seen = seen_keys(case, backend)
    assert torch.equal(seen, mask[:, None, None, :].expand_as(seen))
    hidden = ~mask[:, None, :, None]
    for gradient in result.gradients[1:]:
        assert (gradient.masked_select(hidden) == 0).all()


def test_a_key_mask_and_its_key_lengths_are_the_same(backend):
    lengths = torch.tensor([30, 77], device=backend.device)
    case = make_case(backend, batch=2, length=80, is_causal=True, key_lengths=lengths)
    mask = torch.arange(80, device=backend.device) < lengths[:, None]
    masked = make_case(backend, batch=2, length=80, is_causal=True, key_mask=mask)
    grad_output = case.grad_output()
    results = (run(each, backend.impl, grad_output).tensors for each in (case, masked))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


class Launched(TorchDispatchMode):
    """Names of PyTorch's operators that run a kernel on a device: all that make no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if not function.is_view and not function.name().startswith(("aten::empty", "aten::detach", "flash_entmax::")):
            self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("queries", "dtype", "options", "count"),
    [
        (1, torch.int32, {}, 4),
        (1, torch.int32, {"is_causal": True}, 4),
        (1, torch.int64, {"is_causal": True}, 5),
        (1, torch.int32, {"window_size": (20, 0)}, 5),
        (4, torch.int32, {"is_causal": True}, 6),
    ],
)
def test_lengths_take_few_operators(queries, dtype, options, count, monkeypatch):
    """Each is a kernel of a decoding step on a GPU."""
    monkeypatch.setattr(visibility, "intervals", function_of(intervals))  # a mode does not see into an operator
    query, lengths = torch.empty(3, 2, queries, 8), torch.tensor([5, 0, 90], dtype=dtype)
    with Launched() as launched:
        visibility.Visibility(key_lengths=lengths, **options).intervals(query, 90)
    assert len(launched.names) == count, launched.names


LIMITS = -1, 0, 3, 50, 2**29, 2**30, 2**31


def test_intervals_are_their_definition(monkeypatch):
    """Where windows, positions and lengths end before, among and after the keys, and far away. Lengths are taken as on
    a GPU, where they are not read."""
    monkeypatch.setattr("flash_entmax.core.intervals.check_lengths", lambda *_: None)
    draw = random.Random(0)
    for _ in range(300):
        batch, queries, keys = draw.choice((1, 2)), draw.choice((1, 3)), draw.choice((1, 9, 100))
        (left, right), dtype = (draw.choice(LIMITS), draw.choice(LIMITS)), draw.choice((torch.int32, torch.int64))
        furthest, first = torch.iinfo(dtype).max, draw.choice((None, -40, 0, 30, 2**30, -(2**30)))
        lengths = torch.tensor([draw.choice((-5, 0, 8, 300, furthest)) for _ in range(batch)], dtype=dtype)
        position = torch.arange(queries).expand(batch, -1) + (keys - queries if first is None else first)
        if is_given := draw.random() < 0.5:
            numbers = [draw.choice((draw.randint(-20, 120), furthest, -furthest)) for _ in range(queries)]
            position = torch.tensor(numbers).expand(batch, -1).clamp(-(2**30), 2**30)
        given = torch.tensor(numbers, dtype=dtype) if is_given else first
        options = {"window_size": (left, right), "query_positions": given, "key_lengths": lengths}
        start = torch.zeros_like(position) if left == -1 else (position - left).clamp(0, keys)
        stop = torch.full_like(position, keys) if right == -1 else (position + right + 1).clamp(0, keys)
        stop = torch.minimum(stop, lengths.long().clamp(0, keys).unsqueeze(1))
        got = visibility.Visibility(**options).intervals(torch.empty(batch, 1, queries, 8), keys)
        assert (got.dtype, got.is_contiguous()) == (torch.int32, True)
        assert torch.equal(got, torch.stack((start, stop, position), 1).int()), (options, keys)


# Positions and windows


@pytest.mark.parametrize("first", [-30, -1, 0, 5, 60, 1000])
def test_the_position_of_the_first_query(backend, first):
    """Query i stands at first + i, before, among or after the keys."""
    case = make_case(backend, heads=1, length=40, key_length=70, is_causal=True, query_positions=first)
    check_attention(case, backend.impl)
    positions = first + torch.arange(40, device=backend.device)
    expected = torch.arange(70, device=backend.device) <= positions[:, None]
    assert torch.equal(seen_keys(case, backend)[0, 0], expected)


def test_shuffled_positions_permute_the_output(backend):
    whole = make_case(backend, length=90, is_causal=True)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2)).to(backend.device)
    shuffled = make_case(backend, length=90, is_causal=True, query_positions=order)
    shuffled.query = whole.query[:, :, order]
    check_attention(shuffled, backend.impl)
    expected = attend(whole, backend.impl)[:, :, order]
    torch.testing.assert_close(attend(shuffled, backend.impl), expected, rtol=1e-5, atol=2e-6)


def test_positions_of_each_batch_row(backend):
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.int32, torch.int64):
        positions = torch.randint(-20, 90, (2, 50), generator=generator).to(backend.device, dtype)
        case = make_case(backend, batch=2, length=50, key_length=70, window_size=(20, 3), query_positions=positions)
        check_attention(case, backend.impl)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_shards_of_the_queries_are_slices_of_the_whole(backend, as_tensor):
    """What a sequence split over devices computes: each shard of the queries against all keys."""
    whole = make_case(backend, length=130, is_causal=True)
    expected = attend(whole, backend.impl)
    for start, stop in ((0, 40), (40, 104), (104, 130)):
        positions = torch.arange(start, stop, device=backend.device) if as_tensor else start
        shard = make_case(backend, length=130, is_causal=True, query_positions=positions)
        shard.query = whole.query[:, :, start:stop]
        torch.testing.assert_close(attend(shard, backend.impl), expected[:, :, start:stop], rtol=1e-5, atol=2e-6)


def test_far_positions_do_not_overflow(backend):
    """2^62 is beyond every key, on either side: with a causal mask all keys or none."""
    positions = torch.tensor([2**62, -(2**62), 10], device=backend.device)
    case = make_case(backend, heads=1, length=3, key_length=20, is_causal=True, query_positions=positions)
    assert seen_keys(case, backend)[0, 0].sum(-1).tolist() == [20, 0, 11]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(backend, window):
    """From position - left to position + right, where the last query stands at the last key."""
    for queries, keys in backend.sizes(((40, 100),), ((100, 100), (30, 140), (140, 30)), ((250, 250), (30, 140))):
        check_window(backend, window, queries, keys)


def check_window(backend, window, queries, keys):
    left, right = (10**6 if size == -1 else size for size in window)
    case = make_case(backend, heads=1, length=queries, key_length=keys, window_size=window)
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    expected = (key >= place - left) & (key <= place + right)
    assert torch.equal(seen_keys(case, backend)[0, 0].cpu(), expected)
    assert torch.equal(seen_keys(case, backend, is_causal=True)[0, 0].cpu(), expected & (key <= place))
    check_attention(case, backend.impl)


COMBINATIONS = {
    "causal window, lengths": {"is_causal": True, "window_size": (40, -1), "key_lengths": True, "query_positions": 30},
    "window, mask and lengths": {"window_size": (50, 10), "key_mask": True, "key_lengths": True, "query_positions": 30},
    "causal mask and positions": {"is_causal": True, "key_mask": True, "query_positions": 15},
    "everything": {"is_causal": True, "window_size": (60, 3), "key_mask": True, "key_lengths": True,
                   "query_positions": -5, "softcap": 3.0, "alibi_slopes": True},
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations(backend, name):
    """A key must pass every mask that is given."""
    made = {
        "key_lengths": torch.tensor([88, 20], device=backend.device),
        "key_mask": (torch.rand(2, 100, generator=torch.Generator().manual_seed(6)) < 0.7).to(backend.device),
        "alibi_slopes": torch.tensor([[0.1, -0.02], [0.0, 0.3]], device=backend.device),
    }
    options = {
        key: made[key] if option is True and key in made else option for key, option in COMBINATIONS[name].items()
    }
    check_attention(make_case(backend, batch=2, length=70, key_length=100, **options), backend.impl)


# Block masks


def causal(b, h, q, k):
    return k <= q


def sliding(b, h, q, k):
    return (q - k).abs() <= 40


def documents(b, h, q, k):
    return q // 50 == k // 50


def by_head(b, h, q, k):
    return (q + k + h) % (h + 2) == 0


def by_batch(b, h, q, k):
    return (k - 20 * b <= q) & (k >= 70 * b)


def nothing(b, h, q, k):
    return k < 0


MASKS = {"causal": causal, "sliding": sliding, "documents": documents, "by head": by_head, "by batch": by_batch,
         "nothing": nothing}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [64, 128])
def test_block_masks(backend, name, block):
    """What mask_mod says, for each pair; whole blocks, partial ones and none."""
    length, keys = 130, 170
    batch, heads = backend.sizes((1 + (name == "by batch"), 1 + (name == "by head")), (2, 2), (2, 2))
    mask = create_block_mask(MASKS[name], batch, heads, length, keys, device=backend.device, BLOCK_SIZE=block)
    shape = {"batch": batch, "heads": heads, "key_heads": 1, "length": length, "key_length": keys}
    case = make_case(backend, **shape, block_mask=mask)
    index = (torch.arange(n, device=backend.device) for n in (batch, heads, length, keys))
    expected = MASKS[name](*torch.meshgrid(*index, indexing="ij"))
    assert torch.equal(seen_keys(case, backend), expected)
    check_attention(case, backend.impl)


def test_a_block_mask_for_every_head_and_batch_row(backend):
    mask = create_block_mask(documents, None, None, 100, 100, device=backend.device)
    check_attention(make_case(backend, batch=2, length=100, block_mask=mask, is_causal=True), backend.impl)


def test_a_block_mask_of_unequal_blocks(backend):
    mask = create_block_mask(sliding, None, None, 200, 150, device=backend.device, BLOCK_SIZE=(64, 128))
    check_attention(make_case(backend, heads=1, length=200, key_length=150, block_mask=mask), backend.impl)


@pytest.mark.parametrize(("block", "queries"), [(1, slice(64, 128)), (3, slice(192, 200))])
def test_a_slice_of_a_block_mask(backend, block, queries):
    """Taken for its own queries once its mask_mod says where they stand (and, before torch 2.14, its lengths)."""
    mask = create_block_mask(sliding, None, None, 200, 200, device=backend.device, BLOCK_SIZE=64)
    case = make_case(backend, heads=1, length=200, block_mask=mask)
    whole = seen_keys(case, backend)
    part = mask[:, :, block : block + 1]
    with pytest.raises(ValueError, match=r"for 200 queries and 200 keys, got|\(4, 4\) blocks.*\(1, 4\)"):
        seen_keys(replace(case, options={"block_mask": part}), backend)
    part.seq_lengths = (queries.stop - queries.start, 200)
    case = replace(case, query=case.query[:, :, queries], options={"block_mask": part})
    with pytest.raises(RuntimeError, match="Cannot use mask_mod from a sliced BlockMask"):
        seen_keys(case, backend)
    part.mask_mod = lambda b, h, q, k: sliding(b, h, q + queries.start, k)
    assert torch.equal(seen_keys(case, backend), whole[:, :, queries])


def test_a_mask_mod_may_look_up_tables(backend):
    """As document[q] == document[k], which not every version of torch can do in its vmap."""
    document = torch.arange(100, device=backend.device) // 30
    looked_up = create_block_mask(
        lambda b, h, q, k: (document[q] == document[k]) & (q >= k), None, None, 100, 100, device=backend.device
    )
    case = make_case(backend, heads=1, length=100, block_mask=looked_up)
    same = document[:, None] == document
    assert torch.equal(seen_keys(case, backend)[0, 0], same.tril())


def test_a_block_mask_may_be_used_first_in_inference(backend):
    mask = create_block_mask(documents, None, None, 70, 70, device=backend.device)
    case = make_case(backend, heads=1, length=70, block_mask=mask)
    with torch.inference_mode():
        seen_keys(case, backend)
    check_attention(case, backend.impl)


def test_a_limit_beyond_all_keys_is_none(backend):
    case = make_case(backend, heads=1, length=6, key_length=3, window_size=(2**63 - 1, 2**63 - 1))
    assert seen_keys(case, backend).all()


def test_a_static_filter_needs_no_mask_mod(backend):
    """Lists of blocks alone, as a router makes them: partial blocks without a mask_mod are seen as a whole."""
    counts = torch.tensor([[[1, 2, 0]]], dtype=torch.int32, device=backend.device)
    blocks = torch.tensor([[[[1, 0], [0, 1], [0, 1]]]], dtype=torch.int32, device=backend.device)
    mask = BlockMask.from_kv_blocks(counts, blocks, BLOCK_SIZE=64, seq_lengths=(150, 100))
    case = make_case(backend, heads=1, length=150, key_length=100, block_mask=mask)
    expected = torch.zeros(150, 100, dtype=torch.bool, device=backend.device)
    expected[:64, 64:], expected[64:128] = True, True
    assert torch.equal(seen_keys(case, backend)[0, 0], expected)
    check_attention(case, backend.impl)


def test_keys_that_are_hidden_by_a_mask_have_no_gradient(backend):
    mask = create_block_mask(by_batch, 2, None, 130, 130, device=backend.device)
    case = make_case(backend, batch=2, length=130, block_mask=mask)
    with poisoned():
        result = run(case, backend.impl, case.grad_output())
    for gradient in result.gradients[1:]:
        assert (gradient[1, :, :70] == 0).all()
        assert (gradient[1, :, 70:] != 0).any()


REFUSED = {
    "twice": ({"key_mask": torch.ones(1, 64, dtype=torch.bool)}, ValueError, "key_mask and block_mask exclude"),
    "lengths": ({"lengths": (64, 128)}, ValueError, r"64 queries and 64 keys, got one for \(64, 128\)"),
    "heads": ({"heads": 3}, ValueError, r"heads 1 or 2, got \(1, 3\)"),
    "batch": ({"batch": 2}, ValueError, r"batch 1 or 1 and heads 1 or 2, got \(2, 1\)"),
    "size": ({"block": 32}, ValueError, r"BLOCK_SIZE of multiples of 64, got \(32, 32\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_block_masks_that_do_not_fit(name):
    options, error, match = REFUSED[name]
    options = dict(options)
    lengths, block = options.pop("lengths", (64, 64)), options.pop("block", 64)
    mask = create_block_mask(
        causal, options.pop("batch", None), options.pop("heads", None), *lengths, device="cpu", BLOCK_SIZE=block
    )
    with pytest.raises(error, match=match):
        entmax_attention(*iid_inputs(1, 2, 64, 8), block_mask=mask, **options)
