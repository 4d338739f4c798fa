"""What only a GPU can show: every dtype and common head size at its real lengths, scratch, and what is compiled."""

import pytest
import torch
from cases import Case, run
from checks import check_attention, check_live_map
from conftest import HAS_CUDA

from flash_entmax import entmax_attention, entmax_attention_varlen
from flash_entmax.testing import iid_inputs, relative_error, topic_inputs

pytestmark = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 2**20


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.mark.parametrize("head_size", [40, 64, 80, 128, 256, 512])
def test_head_sizes_and_groups(dtype, head_size):
    """Queries 8 to 1 key head, odd lengths, causal; the same kernels then serve other lengths and groups."""
    for heads, key_heads, queries, keys in ((8, 1, 777, 777), (4, 1, 1, 300), (2, 2, 129, 1025), (4, 4, 65, 31)):
        inputs = iid_inputs(
            1, heads, queries, head_size, key_heads=key_heads, key_length=keys, dtype=dtype, device="cuda"
        )
        check_attention(Case(*inputs, is_causal=True), "triton")


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3, 1.2, 1.1])
def test_lengths(dtype, alpha):
    for length in (1, 2, 31, 33, 64, 127, 1000, 2049, 4097):
        inputs = iid_inputs(1, 2, length, 64, key_heads=1, dtype=dtype, device="cuda", seed=length)
        check_attention(Case(*inputs, is_causal=True, alpha=alpha), "triton")


@pytest.mark.parametrize("topics", [1, 2, 4, 10, 20])
def test_topics(dtype, topics):
    """Dead tiles are dead, live ones live, at the sparsity that the inputs were made for."""
    inputs = topic_inputs(1, 1, 6144, 64, topics, dtype=dtype, device="cuda")
    result = check_attention(Case(*inputs, is_causal=True), "triton")
    tiles = result.support.tiles
    visible = torch.ones_like(tiles).tril()
    density = (tiles.sum() / visible.sum()).item()
    assert density == pytest.approx(1 / topics, abs=0.06 if dtype != torch.float32 else 0.08)


@pytest.mark.parametrize(("length", "alpha"), [(16383, 1.5), (32768, 1.5), (16383, 1.2)])
@pytest.mark.parametrize("kind", ["topics", "iid"])
def test_long_rows_against_the_reference(dtype, length, alpha, kind):
    """Slices of queries against the dense reference: with the keys up to their last, alignment stays lower right."""
    maker = {"topics": lambda: topic_inputs(1, 2, length, 64, 4, dtype=dtype, device="cuda")}
    maker["iid"] = lambda: iid_inputs(1, 2, length, 64, dtype=dtype, device="cuda")
    query, key, value = maker[kind]()
    whole = Case(query, key, value, is_causal=True, alpha=alpha)
    grad_output = whole.grad_output()
    result = run(whole, "triton", grad_output)
    for stop in (300, length // 2 + 17, length):
        rows = slice(max(0, stop - 257), stop)
        part = Case(query[:, :, rows], key[:, :, :stop], value[:, :, :stop], is_causal=True, alpha=alpha)
        exact = run(part.in_float64(), "reference", grad_output[:, :, rows].double())
        bound = {torch.float32: 5e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        assert relative_error(result.output[:, :, rows], exact.output) < bound
        assert relative_error(result.gradients[0][:, :, rows], exact.gradients[0]) < bound
        sizes = result.support.size[:, :, rows].double()
        assert (sizes - exact.support.size).abs().mean() < 0.01 * sizes.mean()


def test_repeats_are_bit_identical_at_32768():
    inputs = topic_inputs(1, 8, 32768, 64, 4, key_heads=2, dtype=torch.bfloat16, device="cuda")
    case = Case(*inputs, is_causal=True)
    grad_output = case.grad_output()
    first = run(case, "triton", grad_output)
    for _ in range(3):
        again = run(case, "triton", grad_output)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(a, b) for a, b in zip(first.gradients, again.gradients, strict=True))


def test_scratch_is_bounded():
    """Beyond inputs, outputs and gradients: 256 MiB at most, and 512 bytes for each query of each head."""
    for length in (8192, 65536, 131072):
        inputs = [t.requires_grad_() for t in topic_inputs(1, 8, length, 64, 10, dtype=torch.bfloat16, device="cuda")]
        grad_output = torch.randn_like(inputs[0])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(entmax_attention(*inputs, is_causal=True), inputs, grad_output)
        torch.cuda.synchronize()
        scratch = torch.cuda.max_memory_allocated() - before
        results = 4 * inputs[0].numel() * 2  # output and three gradients
        assert scratch <= results + 512 * 8 * length + 256 * MIB


@pytest.mark.parametrize("options", [{}, {"window_size": (300, 0), "softcap": 20.0}], ids=["plain", "masked"])
def test_direct_launches_give_the_bits_of_those_through_triton(options, monkeypatch):
    from flash_entmax.backends.triton import launch
    from flash_entmax.operators import dispatch

    monkeypatch.setattr(dispatch, "keep", lambda *_: None)  # calls like one that is kept launch from notes
    inputs = topic_inputs(1, 4, 2048, 64, 4, key_heads=2, dtype=torch.bfloat16, device="cuda")
    case = Case(*inputs, is_causal=True, options=options)
    grad_output = case.grad_output()
    run(case, "triton", grad_output)
    assert launch.CAN_BE_DIRECT
    direct = run(case, "triton", grad_output)
    monkeypatch.setattr(launch, "CAN_BE_DIRECT", False)
    through_triton = run(case, "triton", grad_output)
    assert all(torch.equal(*pair) for pair in zip(direct.tensors, through_triton.tensors, strict=True))


STEPS = {
    "plain": {},
    "float32": {"is_causal": True},
    "numbers": {"is_causal": True, "alpha": 1.3, "scale": 0.5, "softcap": 20.0},
    "window": {"window_size": (300, 0)},
    "lengths": {"is_causal": True, "key_lengths": torch.tensor([2048, 3])},
    "slopes": {"is_causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, 0.01, 0.0])},
    "alpha": {"is_causal": True, "alpha": torch.tensor(1.3), "scale": torch.tensor([0.1, 0.2, 0.1, 0.3])},
}


def noted_inputs(dtype: torch.dtype, order: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two batch rows of 2,048 tokens, and a gradient of the output."""
    inputs = topic_inputs(2, 4, 2048, 64, 4, key_heads=2, dtype=dtype, device="cuda")
    tensors = [*inputs, torch.randn_like(inputs[0])]
    if order == "rows first":
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    if order == "gradient rows first":
        tensors[3] = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


def refuse_other_launches(monkeypatch) -> None:
    """From now on, all launches go by notes."""
    from flash_entmax.backends.triton import launch

    monkeypatch.setattr(launch.Launcher, "open", None)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("order", ["heads first", "rows first", "gradient rows first"])
def test_calls_from_notes_give_the_bits_of_the_first(name, order, monkeypatch):
    """The first call of a kind compiles; the second prepares notes, and those after it launch by them."""
    from flash_entmax.operators import dispatch

    dispatch.kept.clear()
    options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in STEPS[name].items()}
    inputs, grad_output = noted_inputs(torch.float32 if name == "float32" else torch.bfloat16, order)

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            alone = entmax_attention(*inputs, **options)
        output = entmax_attention(*inputs, **options)
        return [alone, output, *torch.autograd.grad(output, inputs, grad_output)]

    first = results()
    for _ in range(3):
        results()
    refuse_other_launches(monkeypatch)
    for _ in range(2):
        again = results()
        assert [tensor.stride() for tensor in again] == [tensor.stride() for tensor in first]
        assert all(map(torch.equal, again, first))


def test_packed_steps_from_notes_have_the_boundaries_of_each_call(monkeypatch):
    from flash_entmax.operators import dispatch

    inputs, grad_output = noted_inputs(torch.bfloat16, "rows first")
    tokens = [tensor[0].transpose(0, 1) for tensor in (*inputs, grad_output)]
    given = [
        torch.tensor(ends, dtype=torch.int32, device="cuda") for ends in ([0, 2048], [0, 3, 3, 900], [0, 77, 2048])
    ]

    def results(boundaries: torch.Tensor) -> list[torch.Tensor]:
        output = entmax_attention_varlen(*tokens[:3], boundaries, None, 2048, 2048, is_causal=True)
        return [output, *torch.autograd.grad(output, inputs, tokens[3])]

    first = []
    for boundaries in given:
        dispatch.kept.clear()
        first.append(results(boundaries))
    for _ in range(3):
        results(given[0])
    refuse_other_launches(monkeypatch)
    for boundaries, expected in zip(given, first, strict=True):
        assert all(map(torch.equal, results(boundaries), expected))


def test_a_graph_of_steps_from_notes_gives_their_bits(monkeypatch):
    from flash_entmax.operators import dispatch

    dispatch.kept.clear()
    inputs, grad_output = noted_inputs(torch.bfloat16, "rows first")

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return entmax_attention(*tensors, is_causal=True)

    for _ in range(4):
        plain = torch.autograd.grad(attend(*inputs), inputs, grad_output)
    refuse_other_launches(monkeypatch)
    graphed = torch.cuda.make_graphed_callables(attend, tuple(t.detach().clone().requires_grad_() for t in inputs))
    replayed = torch.autograd.grad(graphed(*inputs), inputs, grad_output)
    assert all(map(torch.equal, replayed, plain))


def test_a_new_length_compiles_nothing():
    from flash_entmax.backends.triton.bound import summary_kernel
    from flash_entmax.backends.triton.stages import BACKWARD, FORWARD, MARK, SHARE

    def step(length, heads):
        inputs = [t.requires_grad_() for t in iid_inputs(1, heads, length, 64, dtype=torch.float16, device="cuda")]
        entmax_attention(*inputs, is_causal=True).sum().backward()

    kernels = {summary_kernel, *FORWARD, *MARK, *BACKWARD, *SHARE}
    step(4096, 2)
    compiled = [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]
    assert compiled
    for length, heads in ((1, 2), (17, 1), (1000, 16), (5000, 3)):
        step(length, heads)
    assert compiled == [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]


def test_live_map_at_16384_keys_drops_nothing():
    inputs = topic_inputs(1, 1, 16384, 64, 4, dtype=torch.bfloat16, device="cuda", seed=11)
    case = Case(inputs[0][:, :, -512:], *inputs[1:], is_causal=True)
    exact = entmax_attention(*(t.double() for t in (case.query, case.key, case.value)), is_causal=True,
                             impl="reference", return_support=True)[1]  # fmt: skip
    check_live_map(case, "triton", exact)


@pytest.mark.parametrize(
    "sizes", [(40, 24), (40, 8), (256, 64), (64, 256), (256, 24), (512, 40), (40, 512), (17, 3), (128, 16), (160, 96)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_and_values_of_different_sizes(sizes, is_causal):
    """Head sizes that rows do not align for, and pairs that need different matrix shapes."""
    head_size, value_size = sizes
    inputs = iid_inputs(1, 2, 200, head_size, value_dim=value_size, dtype=torch.float16, device="cuda")
    check_attention(Case(*inputs, is_causal=is_causal), "triton")


def test_a_graph_of_decoding_follows_lengths_that_grow():
    """As a static cache does: the lengths change on the device, between replays."""
    query, key, value = iid_inputs(2, 8, 1, 64, key_heads=2, key_length=4096, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor([1, 70], device="cuda")

    def decode():
        with torch.no_grad():
            return entmax_attention(query, key, value, key_lengths=lengths)

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode()
    for grown in ([1, 70], [64, 4096], [3000, 0]):
        lengths.copy_(torch.tensor(grown))
        graph.replay()
        assert torch.equal(output, decode())
        exact = entmax_attention(query.double(), key.double(), value.double(), key_lengths=lengths, impl="reference")
        assert relative_error(output, exact) < 2e-2


def test_a_million_keys_are_decoded():
    query, key, value = iid_inputs(1, 8, 16, 64, key_heads=1, key_length=2**20, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = entmax_attention(query, key, value, is_causal=True)
        assert torch.cuda.max_memory_allocated() - before <= 256 * MIB + 2 * output.numel() * output.element_size()
    rows = slice(3, 5)
    exact = entmax_attention(query[:, rows].double(), key.double(), value.double(), is_causal=True, impl="reference")
    assert relative_error(output[:, rows], exact) < 2e-2
