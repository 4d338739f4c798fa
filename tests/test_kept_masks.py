"""What is made of a block mask is kept while nothing that decides it changes, and made again where something did."""

from functools import partial, partialmethod

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

from flash_entmax import entmax_attention
from flash_entmax.core import tile_filter
from flash_entmax.core.closure import state_of
from flash_entmax.testing import iid_inputs

LENGTH = 70
WIDTH, TABLE = 9, torch.arange(LENGTH) // 10  # read by masks below as global variables


def near(b, h, q, k, width=9):
    return (q - k).abs() <= width


def near_globally(b, h, q, k):
    return (q - k).abs() <= WIDTH


def same_globally(b, h, q, k):
    return TABLE[q] == TABLE[k]


def imported(b, h, q, k):
    from test_kept_masks import WIDTH

    return (q - k).abs() <= WIDTH


class Near:
    def __init__(self):
        self.width = 9

    def __call__(self, b, h, q, k):
        return (q - k).abs() <= self.width

    also = partialmethod(__call__)


def of_number(width):
    return lambda b, h, q, k: (q - k).abs() <= width


def of_table(table):
    return lambda b, h, q, k: table[q] == table[k]


def counting():
    count = 8

    def growing(b, h, q, k):
        nonlocal count
        count += 1
        return (q - k).abs() <= count

    return growing


def of_mask(function) -> BlockMask:
    return create_block_mask(function, None, None, LENGTH, LENGTH, device="cpu")


def replaced(function, other):
    """Masks whose mask_mod is set to another, as a decoder does for each position."""

    def change(mask):
        mask.mask_mod = other

    return lambda: (of_mask(function), change)


def written(make, table=None):
    """Masks of a table that is written to."""

    def case():
        held = torch.arange(LENGTH) // 10 if table is None else table
        return of_mask(make(held)), lambda _: held.copy_(torch.arange(LENGTH) // 7)

    return case


def changed(make, change):
    def case():
        function = make()
        return of_mask(function), lambda _: change(function)

    return case


def global_width(_):
    global WIDTH
    WIDTH += 7


def by_attribute(b, h, q, k):
    return (q - k).abs() <= by_attribute.width


by_attribute.width = 9


def wider(holder):
    holder.width += 7


def in_inference():
    with torch.inference_mode():
        table = torch.arange(LENGTH) // 10

    def change(_):
        with torch.inference_mode():
            table.copy_(torch.arange(LENGTH) // 7)

    return of_mask(of_table(table)), change


def lists_written(mask):
    """What a block is changes from partial to absent."""
    mask.kv_num_blocks.zero_()


def lists_replaced(mask):
    mask.kv_num_blocks = torch.zeros_like(mask.kv_num_blocks)


def bound():
    holder = Near()
    return of_mask(holder.also), lambda _: wider(holder)


KEPT = {
    "another function": replaced(near, same_globally),
    "another number": replaced(of_number(9), of_number(20)),
    "another table": replaced(of_table(TABLE), of_table(TABLE // 2)),
    "another default": replaced(near, partial(near, width=20)),
    "partial arguments": replaced(partial(near, width=9), partial(near, width=20)),
    "a number of another type": replaced(of_number(9), of_number(9.0)),
    "a table written to": written(of_table),
    "a table in a partial": written(lambda t: partial(lambda b, h, q, k, table: table[q] == table[k], table=t)),
    "a table in a default": written(lambda t: lambda b, h, q, k, table=t: table[q] == table[k]),
    "a table further in": written(lambda t: and_masks(near, of_table(t))),
    "a global table": written(lambda _: same_globally, TABLE),
    "a global number": changed(lambda: near_globally, global_width),
    "an attribute of the function": changed(lambda: by_attribute, wider),
    "lists written to": lambda: (of_mask(near), lists_written),
    "lists replaced": lambda: (of_mask(near), lists_replaced),
}
NOT_KEPT = {
    "an object": changed(Near, wider),
    "a method": bound,
    "an inference tensor": in_inference,
    "an import": changed(lambda: imported, global_width),
    "a count of calls": changed(counting, lambda _: None),
}


@pytest.fixture
def evaluations(monkeypatch):
    """How often a mask was evaluated so far."""
    counted, plain = [], tile_filter._filter_of_blocks
    monkeypatch.setattr(tile_filter, "_filter_of_blocks", lambda *arguments: counted.append(1) or plain(*arguments))
    return counted


def attend(mask, impl="torch"):
    return entmax_attention(*iid_inputs(1, 1, LENGTH, 8), block_mask=mask, impl=impl)


@pytest.mark.parametrize("name", KEPT)
def test_kept_until_something_changes(evaluations, name):
    mask, change = KEPT[name]()
    first = attend(mask)
    assert torch.equal(attend(mask), first)
    assert len(evaluations) == 1
    change(mask)
    second = attend(mask)
    torch.testing.assert_close(second, attend(mask, "reference"))
    if name != "a number of another type":
        assert not torch.equal(first, second)
    assert torch.equal(attend(mask), second)
    assert len(evaluations) == 2


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_may_change_unseen_is_not_kept(evaluations, name):
    mask, change = NOT_KEPT[name]()
    first = attend(mask)
    change(mask)
    second = attend(mask)
    assert not torch.equal(first, second)
    if name != "a count of calls":
        torch.testing.assert_close(second, attend(mask, "reference"))
    assert len(evaluations) == 2


def test_each_mask_and_each_tile_has_its_own(backend, evaluations):
    tensors = [tensor.to(backend.device) for tensor in iid_inputs(1, 1, LENGTH, 8)]
    masks = [
        create_block_mask(function, None, None, LENGTH, LENGTH, device=backend.device) for function in (near, near)
    ]
    for _ in range(2):
        for mask in masks:
            entmax_attention(*tensors, block_mask=mask, impl=backend.impl)
    assert len(evaluations) == 2


def test_what_is_kept_keeps_no_mask_alive():
    """Nor a table longer than the mask that was made with it."""
    import gc
    import weakref

    gc.collect()
    before = len(tile_filter._filters)
    mask = of_mask(of_table(torch.arange(LENGTH)))
    attend(mask)
    assert len(tile_filter._filters) == before + 1
    alive = weakref.ref(mask)
    del mask
    gc.collect()
    assert alive() is None
    assert len(tile_filter._filters) == before


@pytest.mark.parametrize(
    ("value", "is_known"),
    [
        (near, True),
        (and_masks(near, of_number(3)), True),
        ((1, "a", None, torch.int32, [2.0], {"b": TABLE}), True),
        (torch.abs, True),
        (torch.ones(3).sum, False),
        (object(), False),
        (torch.nn.Linear(2, 2), False),
        (torch.Generator(), False),
        (lambda b, h, q, k: pytest, False),
        (lambda b, h, q, k: torch.where(q > k, h, b), True),
        (lambda b, h, q, k: (lambda: WIDTH)(), True),
    ],
)
def test_what_has_a_state(value, is_known):
    state = state_of(value)
    assert (state is not None) == is_known
    if is_known:
        assert state.key == state_of(value).key


def test_the_state_is_of_what_is_read_not_of_the_object():
    """Two functions alike have one state, as a decoder makes a new one for each position."""
    assert state_of(of_number(3)).key == state_of(of_number(3)).key
    assert state_of(of_number(3)).key != state_of(of_number(4)).key
    assert state_of(of_number(1)).key != state_of(of_number(True)).key
    assert state_of(of_table(TABLE)).key == state_of(of_table(TABLE)).key
    assert state_of(of_table(TABLE)).key != state_of(of_table(TABLE.clone())).key


def test_what_holds_itself_has_no_state():
    endless = []
    endless.append(endless)
    assert state_of(endless) is None

    def again(n):
        return again(n - 1) if n else 0

    assert state_of(again).key == state_of(again).key


def test_numbers_that_numpy_shares_are_looked_at():
    """PyTorch does not count what NumPy writes."""
    numpy = pytest.importorskip("numpy")
    numbers = numpy.arange(LENGTH) // 20
    mask = create_block_mask(of_table(torch.from_numpy(numbers)), 1, 1, LENGTH, LENGTH, device="cpu")
    inputs = iid_inputs(1, 1, LENGTH, 8)
    before = entmax_attention(*inputs, block_mask=mask)
    numbers[:] = numpy.arange(LENGTH) // 11
    after = entmax_attention(*inputs, block_mask=mask)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, entmax_attention(*inputs, block_mask=mask, impl="reference"))
