"""Keys in pages: the same bits as keys in one piece, and nothing is read that belongs to no row."""

import pytest
import torch
from conftest import HAS_CUDA, Backend
from paged_cases import attend_packed, check_pages, make_paged_case, packed
from torch.utils.flop_counter import FlopCounterMode

from flash_entmax import entmax_attention_paged, register_flop_formulas
from flash_entmax.backends import BACKENDS
from flash_entmax.core import pages as core_pages
from flash_entmax.core.call import Problem, ScoreOptions, VisibilityArgs
from flash_entmax.core.pages import Pages
from flash_entmax.operators.paged import attention_paged
from flash_entmax.testing import poisoned

BY_HEAD = torch.tensor([1.3, 2.0])
CASES = {
    "page of a quarter tile": {"page": 16, "dim": 64},
    "page of a tile": {"page": 64, "dim": 64},
    "page of two tiles": {"page": 128, "lengths": (0, 100, 129), "heads": 4, "key_heads": 2},
    "page of one key": {"page": 1, "lengths": (0, 1, 40)},
    "page that no tile divides": {"page": 48, "lengths": (47, 48, 49, 97)},
    "half precision": {"page": 32, "dim": 128, "dtype": torch.float16, "index_dtype": torch.int64},
    "value size": {"page": 16, "dim": 32, "value_dim": 48},
    "head size that 16 does not divide": {"page": 16, "dim": 40, "lengths": (0, 17, 65)},
    "window": {"page": 16, "window_size": (20, 5)},
    "window of one key": {"page": 64, "lengths": (1, 65), "window_size": (0, -1), "queries": 3},
    "softcap": {"page": 32, "softcap": 1.5, "alpha": 1.3},
    "ALiBi": {"page": 16, "alibi_slopes": torch.tensor([0.1, -0.02])},
    "ALiBi of rows": {"page": 16, "lengths": (5, 80), "alibi_slopes": torch.tensor([[0.1, 0.0], [0.3, 0.2]])},
    "learned alpha": {"page": 16, "alpha": BY_HEAD},
    "learned scale": {"page": 16, "scale": torch.tensor(0.3), "alpha": 2.0},
    "all keys in the support": {"page": 16, "lengths": (600, 3), "heads": 1, "scale": 1e-6},
    "chunk of a prompt": {"page": 16, "lengths": (0, 30, 90), "queries": 20, "window_size": (40, 0)},
    "softmax": {"page": 16, "lengths": (0, 17, 65), "alpha": 1.0},
}


def case_of(backend, name, **more):
    options = {
        key: option.to(backend.device) if isinstance(option, torch.Tensor) else option
        for key, option in CASES[name].items()
    }
    return make_paged_case(backend, **options | more)


@pytest.mark.parametrize("name", CASES)
def test_bits_of_keys_in_one_piece(backend, name):
    check_pages(case_of(backend, name), backend.impl)


@pytest.mark.parametrize("name", ["page of a quarter tile", "window", "ALiBi of rows", "learned alpha", "softmax"])
def test_the_reference_agrees(backend, name):
    case = case_of(backend, name)
    exact = case.attend("reference")
    torch.testing.assert_close(exact, case.attend_in_one_piece("reference"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.attend(backend.impl), exact, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("behind", ["far", "negative"])
@pytest.mark.parametrize("page", [16, 128])
def test_entries_behind_the_keys_may_be_anything(backend, behind, page):
    case = make_paged_case(backend, lengths=(0, 16, 70), page=page, behind=behind, heads=1, extra_columns=2)
    with poisoned():
        check_pages(case, backend.impl)
        case.query = case.query.repeat(1, 1, 9, 1)
        check_pages(case, backend.impl)


def test_rows_share_pages(backend):
    """Two rows have the same prompt: its pages are in both tables."""
    case = make_paged_case(backend, lengths=(70, 100), page=16)
    case.block_table[1, :4] = case.block_table[0, :4]
    for tensor in (case.key, case.value):
        tensor[1, :, :64] = tensor[0, :, :64]
    check_pages(case, backend.impl)


def test_more_queries_than_keys(backend):
    """A query before key 0 sees nothing."""
    case = make_paged_case(backend, lengths=(0, 2, 5), queries=4)
    check_pages(case, backend.impl)
    assert (case.attend(backend.impl)[1, :, :2] == 0).all()


def test_a_key_that_is_not_finite_spoils_its_row(backend):
    case = make_paged_case(backend, lengths=(70, 70), page=16)
    case.key_cache[case.block_table[1, 2], 5] = torch.inf
    output = case.attend(backend.impl)
    assert output[1].isnan().all()
    assert torch.equal(output[0], case.attend_in_one_piece(backend.impl)[0])


@pytest.mark.parametrize("layout", ["keys beside values", "heads first", "one column of a table"])
def test_strides(backend, layout):
    """As others lay caches out, and tables cut from wider ones, shifted by one row."""
    case = make_paged_case(backend, lengths=(33, 70, 16), key_heads=2)
    if layout == "keys beside values":
        case.key_cache, case.value_cache = torch.stack((case.key_cache, case.value_cache)).unbind()
    if layout == "heads first":
        case.key_cache = case.key_cache.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one column of a table":
        wide = torch.full((4, 20), -1, dtype=torch.int32, device=backend.device)
        wide[1:, 3 : 3 + case.block_table.shape[1]] = case.block_table
        case.block_table = wide[1:, 3 : 3 + case.block_table.shape[1]]
        case.key_lengths = torch.stack((case.key_lengths, case.key_lengths), -1)[:, 1]
    check_pages(case, backend.impl)


@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_few_queries_copy_no_page(backend, layout, monkeypatch):
    """The kernels read pages where they are; only more queries, and plain PyTorch, have them gathered."""
    case, called, gathered = make_paged_case(backend, lengths=(3, 40), queries=17), [], core_pages.gathered
    monkeypatch.setattr(core_pages, "gathered", lambda *of: called.append(None) or gathered(*of))
    if layout == "packed":
        attend_packed(case, (2, 16), backend.impl)
    else:
        case.query = case.query[:, :, :16]
        case.attend(backend.impl)
    assert bool(called) == (backend.impl == "torch")
    if layout == "packed":
        attend_packed(case, (2, 17), backend.impl)
        assert called


# Packed queries


@pytest.mark.parametrize("name", ["half precision", "page of a tile", "window", "ALiBi", "learned alpha"])
def test_packed_queries_have_the_bits_of_rows(backend, name):
    """Rows with 0 to 5 queries, and tokens of no row."""
    case = case_of(backend, name, queries=5, lengths=(0, 64, 3, 17, 70))
    counts, whole = (0, 2, 5, 0, 4), case.attend_in_one_piece(backend.impl)
    with poisoned():
        *rows, spare = attend_packed(case, counts, backend.impl, spare=3, max_q=5)
    for row, count in enumerate(counts):
        expected = whole[row, :, 5 - count :]
        if backend.impl == "triton":
            assert torch.equal(rows[row], expected)
        else:
            torch.testing.assert_close(rows[row], expected, rtol=1e-3, atol=1e-5)
    assert (spare == 0).all()


@pytest.mark.parametrize("options", [{}, {"window_size": (9, 0)}, {"alpha": 1.0}], ids=["plain", "window", "softmax"])
@pytest.mark.parametrize("impl", ["own", "reference"])
def test_chunks_of_prompts_beside_single_queries(backend, impl, options):
    impl = backend.impl if impl == "own" else impl
    case = make_paged_case(backend, lengths=(0, 40, 30, 17, 70), queries=30, **options)
    counts, whole = (0, 30, 1, 4, 30), case.attend_in_one_piece("reference", dtype=torch.float64)
    *rows, spare = attend_packed(case, counts, impl, spare=2)
    for row, count in enumerate(counts):
        expected = whole[row, :, 30 - count :].float()
        torch.testing.assert_close(rows[row], expected, rtol=1e-4, atol=1e-5)
    assert (spare == 0).all()


# What does not fit


def call_of_a_backend(backend, case, boundaries=None, query=None, most=2):
    """Without the checks of values, as on a GPU."""
    query = case.query if query is None else query
    pages = Pages(case.block_table, case.key_lengths, boundaries, -1, case.key_cache.shape[1])
    sizes = case.block_table.shape[0], 2, 1, most, pages.capacity, 16, 16
    visibility = VisibilityArgs(None, None, None, True, pages.capacity)
    problem = Problem(*sizes, ScoreOptions(1.5, 0.25), visibility)
    return BACKENDS[backend.impl].attention_paged(problem, pages, query, case.key_cache, case.value_cache)


@pytest.mark.parametrize("length", [1000, 33, -3])
def test_a_length_beyond_the_pages_is_refused_or_gives_nan(backend, length):
    case = make_paged_case(backend, lengths=(20, 32, 5), extra_columns=0)
    case.key_lengths[1] = length
    output = call_of_a_backend(backend, case)
    assert output[1].isnan().all()
    assert output[::2].isfinite().all()
    if backend.device == "cpu":
        with pytest.raises(ValueError, match=rf"key_lengths must be from 0 to 32.*2 pages of 16.*{length}"):
            case.attend(backend.impl)


@pytest.mark.parametrize("boundaries", [(0, 3, 4, 5), (0, 1, 2, 60), (0, 2, 1, 2), (-1, 1, 2, 3)])
def test_boundaries_that_do_not_fit_are_refused_or_give_nan(backend, boundaries):
    """More queries than max_q, more tokens than there are, falling ones, and one before the first."""
    case = make_paged_case(backend, lengths=(20, 32, 5))
    tokens = packed(case, (2, 2, 2))["query"]
    given = torch.tensor(boundaries, dtype=torch.int32, device=backend.device)
    output = call_of_a_backend(backend, case, given, tokens.transpose(0, 1).unsqueeze(0))
    assert output.isnan().any()
    if backend.device == "cpu":
        with pytest.raises(ValueError, match=r"cu_seq_q must rise from 0 to at most 6 tokens in steps of at most 2"):
            entmax_attention_paged(tokens, *case.paged[1:], cu_seq_q=given, max_q=2, impl=backend.impl)


@pytest.mark.skipif(HAS_CUDA, reason="a GPU's page numbers are not read")
@pytest.mark.parametrize("number", [-1, 1000])
def test_numbers_of_pages_that_do_not_exist_are_refused(backend, number):
    case = make_paged_case(backend, lengths=(20, 40))
    case.block_table[1, 1] = number
    with pytest.raises(ValueError, match=rf"block_table.*from 0 to 7.*{number}"):
        case.attend(backend.impl)


# The operator


def operator_arguments(case, backend, boundaries=None, query=None):
    query = case.query if query is None else query
    return query, *case.paged[1:], boundaries, None, None, None, 2, -1, 1.5, 0.25, 0.0, backend.impl


def test_opcheck(backend):
    case = make_paged_case(backend, lengths=(0, 20, 33))
    torch.library.opcheck(attention_paged, operator_arguments(case, backend))
    tokens = packed(case, (2, 0, 1), spare=1)
    query = tokens["query"].transpose(0, 1).unsqueeze(0)
    torch.library.opcheck(attention_paged, operator_arguments(case, backend, tokens["cu_seq_q"], query))


@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_compiled_and_exported_equal_eager(backend, layout):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            *inputs, boundaries = tensors
            more = {} if boundaries is None else {"cu_seq_q": boundaries, "max_q": 2}
            return 2 * entmax_attention_paged(*inputs, **more, window_size=(30, 0), impl=backend.impl)

    torch._dynamo.reset()
    case, arguments = make_paged_case(backend, lengths=(20, 33)), None
    if layout == "batch":
        arguments = *case.paged, None
    else:
        tokens = packed(case, (2, 1))
        arguments = tokens["query"], *case.paged[1:], tokens["cu_seq_q"]
    expected = Layer()(*arguments)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*arguments), expected)
    assert torch.equal(torch.export.export(Layer(), arguments).module()(*arguments), expected)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_no_rows_and_tensors_without_data(backend, device):
    tensors = torch.empty(0, 2, 1, 16), *torch.empty(2, 3, 16, 1, 16), torch.empty(0, 2), torch.empty(0)
    tensors = [t.to(device=device, dtype=torch.int32 if n > 2 else torch.float32) for n, t in enumerate(tensors)]
    assert entmax_attention_paged(*tensors).shape == (0, 2, 1, 16)
    if device == "meta":
        tensors[0], tensors[3], tensors[4] = (
            torch.empty(shape, dtype=old.dtype, device=device)
            for shape, old in (((5, 2, 1, 16), tensors[0]), ((5, 2), tensors[3]), ((5,), tensors[4]))
        )
        assert entmax_attention_paged(*tensors).shape == (5, 2, 1, 16)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_flops_are_those_of_all_pages_of_a_row(device):
    """Packed queries do not meet the pages of other rows."""
    case = make_paged_case(Backend("torch", "cpu"), lengths=(20, 40), page=16, queries=2, heads=4, extra_columns=0)
    tokens = packed(case, (2, 1))
    register_flop_formulas()
    counts = []
    for query, more in ((case.query, {}), (tokens["query"], {"cu_seq_q": tokens["cu_seq_q"].to(device), "max_q": 2})):
        with FlopCounterMode(display=False) as counter:
            entmax_attention_paged(*(t.to(device) for t in (query, *case.paged[1:])), **more)
        counts.append(counter.get_total_flops())
    assert counts == [queries * 4 * 48 * 2 * (16 + 16) for queries in (4, 3)]


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_a_cuda_graph_reads_lengths_and_pages_anew(backend):
    case = make_paged_case(backend, lengths=(40, 130, 7), key_heads=2, dim=64, dtype=torch.bfloat16)
    other = make_paged_case(backend, lengths=(130, 1, 65), key_heads=2, dim=64, dtype=torch.bfloat16, seed=1)
    case.attend(backend.impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = case.attend(backend.impl)
    for tensor, new in zip(case.paged, other.paged, strict=True):
        tensor.copy_(new)
    graph.replay()
    assert torch.equal(output, other.attend(backend.impl))


def test_flops_of_values_of_another_size():
    register_flop_formulas()
    query, key, value = torch.randn(1, 4, 2, 16), torch.randn(2, 16, 4, 16), torch.randn(2, 16, 4, 8)
    with FlopCounterMode(display=False) as counter:
        entmax_attention_paged(query, key, value, torch.tensor([[0, 1]]), torch.tensor([20]))
    assert counter.get_total_flops() == 2 * 4 * 32 * 2 * (16 + 8)


def test_a_window_may_be_of_any_length():
    query, cache, pages = torch.randn(1, 1, 1, 16), torch.randn(2, 4, 1, 16), torch.tensor([[0, 1]])
    whole = entmax_attention_paged(query, cache, cache, pages, torch.tensor([8]))
    assert torch.equal(
        entmax_attention_paged(query, cache, cache, pages, torch.tensor([8]), window_size=(2**40, 0)), whole
    )
