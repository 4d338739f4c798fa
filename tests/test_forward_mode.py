"""Forward-mode derivatives: right with and without gradients, in no_grad too; what has none says so."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import make_case, packed_case
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from flash_entmax import entmax, entmax_attention, entmax_attention_varlen, entmax_loss, linear_entmax_loss

HEADS = torch.tensor([0.1, 0.7])
OPTIONS = {
    "causal": {"is_causal": True},
    "grouped": {"heads": 4, "key_heads": 2, "value_dim": 24},
    "softcap": {"softcap": 1.5, "window_size": (30, 4), "alpha": 1.7},
    "learned": {"alpha": 1.2 + HEADS, "scale": torch.tensor(0.3), "alibi_slopes": HEADS, "softcap": 2.0},
    "learned scale": {"scale": HEADS, "key_lengths": torch.tensor([40])},
    "masked": {"key_mask": (torch.arange(70) % 3 > 0)[None], "alibi_slopes": torch.tensor([0.3, torch.inf])},
    "sparsemax": {"alpha": 2.0, "key_length": 90, "query_positions": 3},
    "softmax": {"alpha": 1.0, "key_lengths": torch.tensor([50]), "key_heads": 1},
}


def directions(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator).to(t.device, t.dtype) * 0.1 for t in tensors)


def call_of(case, impl):
    """The public call as a function of the case's tensors."""
    names = list(case.tensors)
    longest = max(case.options["cu_seq_q"].diff().tolist()) if case.is_packed else None

    def call(*tensors):
        given = case.with_tensors(**dict(zip(names, tensors, strict=True)))
        options = {"alpha": given.alpha, "scale": given.scale, "is_causal": given.is_causal, **given.options}
        query, key, value = given.query, given.key, given.value
        if not case.is_packed:
            return entmax_attention(query, key, value, impl=impl, **options)
        cu_seq = options.pop("cu_seq_q")
        return entmax_attention_varlen(query, key, value, cu_seq, None, longest, longest, impl=impl, **options)

    return call


def assert_within_budget(case, backend, tangents):
    """Against central differences of the float64 reference, in the dtype's own rounding."""
    exact = case.in_float64()
    tensors, moves = tuple(exact.tensors.values()), tuple(tangent.double() for tangent in tangents)
    reference = call_of(exact, "reference")
    expected = jvp(reference, tensors, moves)[1]
    step = 1e-6
    ahead, behind = (
        reference(*(t + sign * step * move for t, move in zip(tensors, moves, strict=True))) for sign in (1, -1)
    )
    torch.testing.assert_close(expected, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    ours = jvp(call_of(case, backend.impl), tuple(case.tensors.values()), tangents)[1]
    assert ours.dtype == case.query.dtype
    roundings = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.query.dtype]
    assert (ours - expected).norm() <= roundings * expected.norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_attention(backend, name):
    options = {key: o.to(backend.device) if isinstance(o, torch.Tensor) else o for key, o in OPTIONS[name].items()}
    for dtype in backend.dtypes[:2]:
        case = make_case(backend, length=70, dtype=dtype, **options)
        if name == "softmax" and dtype == torch.float16:
            continue  # PyTorch's own rounding
        assert_within_budget(case, backend, directions(case.tensors.values()))


def test_packed_attention(backend):
    case = packed_case(backend, (40, 0, 24), spare=3, is_causal=True)
    assert_within_budget(case, backend, directions(case.tensors.values()))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_one_input_moves(backend, moved):
    case = make_case(backend, length=40)
    tensors = tuple(case.tensors.values())
    tangent = directions(tensors)[moved]
    tangents = tuple(tangent if index == moved else torch.zeros_like(t) for index, t in enumerate(tensors))
    call = call_of(case, backend.impl)
    expected = jvp(call, tensors, tangents)[1]
    with forward_ad.dual_level():
        dual = (forward_ad.make_dual(t, tangent) if index == moved else t for index, t in enumerate(tensors))
        torch.testing.assert_close(forward_ad.unpack_dual(call(*dual)).tangent, expected, rtol=1e-4, atol=1e-6)


TARGET, TARGET_PROBABILITIES = torch.tensor([1, -100, 3, 0]), torch.randn(4, 9).softmax(-1)
ROWS = {  # a function of tensors and of what it needs beside, and the tensors' shapes
    "entmax": (lambda x, of: entmax(x, 1.5, dim=0, impl=of.impl), [(9, 4)]),
    "entmax, masked": (lambda x, of: entmax(x.masked_fill(of.q < 0.1, -torch.inf), 1.3, impl=of.impl), [(4, 9)]),
    "entmax, learned": (lambda x, a, of: entmax(x, 1.5 + 0.4 * a.tanh(), impl=of.impl), [(4, 9), (4, 1)]),
    "alpha alone": (lambda a, of: entmax(of.q * 3, 1.5 + 0.4 * a.tanh(), impl=of.impl), [(4, 1)]),
    "softmax": (lambda x, of: entmax(x, 1.0, impl=of.impl), [(4, 9)]),
    "loss": (lambda x, of: entmax_loss(x, of.target, label_smoothing=0.2, impl=of.impl), [(4, 9)]),
    "loss of each": (lambda x, of: entmax_loss(x, of.target, 2.0, reduction="none", impl=of.impl), [(4, 9)]),
    "loss of probabilities": (lambda x, of: entmax_loss(x, of.q, impl=of.impl), [(4, 9)]),
    "linear loss": (
        lambda x, w, b, of: linear_entmax_loss(x, w, of.target, bias=b, impl=of.impl), [(4, 5), (9, 5), (9,)],
    ),
}  # fmt: skip


def rows(backend, name):
    """The function of tensors alone, and the tensors."""
    function, shapes = ROWS[name]
    generator = torch.Generator().manual_seed(0)
    beside = SimpleNamespace(
        impl=backend.impl, target=TARGET.to(backend.device), q=TARGET_PROBABILITIES.to(backend.device)
    )
    tensors = tuple(torch.randn(shape, generator=generator).to(backend.device) for shape in shapes)
    return partial(function, of=beside), tensors


@pytest.mark.parametrize("name", ROWS)
def test_rows_and_losses(backend, name):
    """The tangent is the transposed gradient: v . J t = (J^T v) . t, for an output's direction v and an input's t."""
    function, tensors = rows(backend, name)
    tangents = directions(tensors)
    output, tangent = jvp(function, tensors, tangents)
    (v,) = directions((output,), seed=2)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(function(*leaves), leaves, v)
    expected = sum((gradient * move).sum() for gradient, move in zip(gradients, tangents, strict=True))
    assert tangent.abs().max() > 0
    torch.testing.assert_close((v * tangent).sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "entmax, learned", "loss", "linear loss"])
def test_gradients_may_be_off(backend, name):
    """In no_grad inside, and in inference_mode around, the tangent is what it is with gradients on."""
    if name == "attention":
        case = make_case(backend, length=40)
        function, tensors = call_of(case, backend.impl), tuple(case.tensors.values())
    else:
        function, tensors = rows(backend, name)
    tangents = directions(tensors)
    expected = jvp(function, tensors, tangents)[1]

    def without_gradients(*inputs):
        with torch.no_grad():
            return function(*inputs)

    assert torch.equal(jvp(without_gradients, tensors, tangents)[1], expected)
    with torch.no_grad():
        assert torch.equal(jvp(function, tensors, tangents)[1], expected)
    with torch.inference_mode():
        one = torch.ones(())
        if jvp(torch.sin, (one,), (one,))[1] != 0:  # before 2.13, PyTorch drops the tangents of all operators there
            assert torch.equal(jvp(function, tensors, tangents)[1], expected)
    with forward_ad.dual_level(), torch.no_grad():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        assert torch.equal(forward_ad.unpack_dual(function(*duals)).tangent, expected)


def test_a_target_from_a_tangent(backend):
    """As consistency models train: gradients of the output go on beside a tangent that is only looked at."""
    case = make_case(backend, length=40)
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    function, tangents = call_of(case, backend.impl), directions(leaves)
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    output, tangent = jvp(function, tuple(leaves), tangents)
    gradients = torch.autograd.grad((output.square() + 0.0 * tangent.detach()).sum(), leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_derivative_of_a_tangent_is_refused(backend):
    case = make_case(backend, length=20)
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    _, tangent = jvp(call_of(case, backend.impl), tuple(leaves), directions(leaves))
    with pytest.raises(RuntimeError, match="attention has no second derivative: impl='reference' of the call has one"):
        tangent.sum().backward()


def test_samples_side_by_side_within_forward_mode(backend):
    """jvp of vmap, softmax included."""
    for alpha in (1.5, 1.0):
        query = torch.randn(2, 1, 1, 10, 8, device=backend.device)

        def attend(query, alpha=alpha):
            return entmax_attention(query, query, query, alpha=alpha, impl=backend.impl)

        together = jvp(vmap(attend), (query,), (query,))[1]
        alone = torch.stack([jvp(attend, (sample,), (sample,))[1] for sample in query])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_tangents_in_16_bits_do_not_leave_the_range():
    """Of a linear layer's loss they are summed in float32."""
    hidden, target = torch.full((2, 4), 8.0).half(), torch.tensor([0, 0])
    weight, tangent = torch.tensor([[1.0] * 4, [20.0] * 4, [2.0] * 4]).half(), torch.full((2, 4), 6e3).half()

    def loss(hidden):
        return linear_entmax_loss(hidden, weight.to(hidden.dtype), target, reduction="sum", impl="torch")

    expected = jvp(loss, (hidden.float(),), (tangent.float(),))[1]
    torch.testing.assert_close(jvp(loss, (hidden,), (tangent,))[1], expected)


def test_a_mean_over_nothing_has_a_tangent_of_zero():
    scores, nothing = torch.randn(3, 5), torch.full((3,), -100)
    weight = torch.randn(4, 5)
    for loss in (lambda x: entmax_loss(x, nothing), lambda x: linear_entmax_loss(x, weight, nothing)):
        value, tangent = jvp(loss, (scores,), (scores,))
        assert value.isnan()
        assert tangent == 0


def test_tangents_of_another_dtype_are_refused(backend):
    dtype = backend.dtypes[1]
    query = torch.randn(1, 1, 8, 8, device=backend.device).to(dtype)
    with pytest.raises(TypeError, match=f"dtype of their tensors, {dtype}, got torch.float64"):
        jvp(lambda q: entmax_attention(q, query, query, impl=backend.impl), (query,), (query.double(),))
