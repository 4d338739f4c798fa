"""Without gradients wanted, a call keeps nothing for a backward pass, and its output is that of training."""

from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from cases import Case, attend, crowd, make_case, run_dense
from checks import operator_arguments
from conftest import HAS_CUDA
from torch.utils._python_dispatch import TorchDispatchMode

from flash_entmax import inspection
from flash_entmax.operators import attention as ops
from flash_entmax.testing import assert_within_budget, iid_inputs, inputs_with_scores, poisoned, score_rows

PAIR = torch.tensor([0.4, 0.8])
OPTIONS = {
    "causal": {"is_causal": True},
    "sparsemax, grouped": {"alpha": 2.0, "heads": 4, "key_heads": 2, "value_dim": 24},
    "learned": {"alpha": 1.1 + PAIR, "scale": PAIR, "alibi_slopes": 0.1 * PAIR, "softcap": 2.0},
    "masked": {"window_size": (30, 4), "key_mask": (torch.arange(70) % 3 > 0)[None]},
    "rows that see no key": {"query_positions": -20, "is_causal": True},
}
TILED = 17  # queries: fewer are decoded without gradients, see test_decode
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Watch(TorchDispatchMode):
    """Keeps `needs_backward` and the results of each call of flash_entmax::attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        if function is ops.attention:
            self.calls.append((arguments[3], results))
        return results


def case_of(backend, name, dtype=torch.float32):
    options = {key: o.to(backend.device) if isinstance(o, torch.Tensor) else o for key, o in OPTIONS[name].items()}
    return make_case(backend, length=70, dtype=dtype, **options)


def with_and_without_gradients(case, impl):
    """The outputs of two calls: one of training, one of inference."""
    with Watch() as watch:
        training = attend(case.with_tensors(**case.leaves()), impl)
        inference = attend(case, impl)
    assert [needs_backward for needs_backward, _ in watch.calls] == [True, False]
    return training.detach(), inference


def check_outputs(case, impl):
    """Bit-equal in float32 and float64. In 16-bit types, both keep the budget."""
    training, inference = with_and_without_gradients(case, impl)
    if case.query.dtype in (torch.float32, torch.float64):
        assert torch.equal(training, inference)
        return
    exact, dense = attend(case.in_float64(), "reference"), run_dense(case, case.grad_output()).output
    for name, output in (("training", training), ("inference", inference)):
        assert_within_budget(output, exact, dense, name=name)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_without_gradients_keeps_nothing(backend, mode):
    case = case_of(backend, "learned")
    case = case.with_tensors(**case.leaves())
    with Watch() as watch, MODES[mode]():
        output = attend(case, backend.impl)
    ((needs_backward, results),) = watch.calls
    assert not needs_backward
    assert output.numel()
    assert [result.numel() for result in results[1:]] == [0] * 5


@pytest.mark.parametrize("name", ["none", "query", "key", "value", "alpha", "scale", "alibi_slopes"])
def test_what_is_kept_depends_on_what_requires_a_gradient(backend, name):
    case = case_of(backend, "learned")
    leaves = {own: tensor.detach().requires_grad_(own == name) for own, tensor in case.tensors.items()}
    with Watch() as watch:
        attend(case.with_tensors(**leaves), backend.impl)
    ((needs_backward, results),) = watch.calls
    assert needs_backward == (name != "none")
    assert [result.numel() > 0 for result in results[1:5]] == [needs_backward] * 4


def test_nothing_is_kept_of_a_call_without_keys(backend):
    case = make_case(backend, length=5, key_length=0)
    with Watch() as watch:
        assert (attend(case, backend.impl) == 0).all()
    assert [result.numel() for result in watch.calls[0][1][1:]] == [0] * 5


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_are_those_of_training(backend, name):
    for dtype in backend.dtypes:
        check_outputs(case_of(backend, name, dtype), backend.impl)


def test_unwritten_memory_reaches_no_output(backend):
    case = case_of(backend, "causal")
    expected = attend(case, backend.impl)
    with poisoned():
        assert torch.equal(attend(case, backend.impl), expected)


@pytest.mark.parametrize(("alpha", "depth", "spread"), [(1.45, -0.0025, 0.01), (1.5, -0.001, 0.004)])
def test_crowded_rows_have_the_outputs_of_training(backend, alpha, depth, spread):
    """A small step of the offset moves many small probabilities."""
    for dtype in backend.dtypes:
        if dtype != torch.bfloat16:  # which does not hold these scores
            check_outputs(crowd(alpha, depth, spread, dtype, backend.device, rows=TILED), backend.impl)


@pytest.mark.parametrize("distribution", ["all equal", "one maximum over a crowd"])
def test_long_flat_rows_have_the_outputs_of_training(backend, distribution):
    length = backend.sizes(2048, 65536, 131072)
    for dtype in backend.dtypes:
        z = score_rows(distribution, length, rows=TILED).to(backend.device, dtype)
        query, key, scale = inputs_with_scores(z, 1.5)
        value = iid_inputs(1, 1, length, 8, dtype=dtype, device=backend.device)[2].abs()
        check_outputs(Case(query, key, value, scale=scale), backend.impl)


def test_rows_without_keys_are_zero(backend):
    for dtype in backend.dtypes:
        output = attend(case_of(backend, "rows that see no key", dtype), backend.impl)
        assert (output[:, :, :20] == 0).all()
        assert (output[:, :, 20:] != 0).any(-1).all()


def test_nan_reaches_the_rows_that_see_it(backend):
    for dtype in backend.dtypes:
        case = case_of(backend, "causal", dtype)
        clean = attend(case, backend.impl)
        case.key[0, 0, 50, 3] = torch.nan
        output = attend(case, backend.impl)
        assert output[0, 0, 50:].isnan().all()
        torch.testing.assert_close(output[0, 0, :50], clean[0, 0, :50])
        assert torch.equal(output[0, 1], clean[0, 1])


@contextmanager
def counted_products():
    """A list with one entry for each matrix product of the kernels in Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts, create_dot = [], InterpreterBuilder.create_dot

    def counting(self, *arguments):
        counts.append(1)
        return create_dot(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counting)
        yield counts


def products_of(case) -> tuple[int, int]:
    """How many matrix products a call takes with gradients, and without."""
    counts = []
    for mode in (nullcontext(), torch.no_grad()):
        with counted_products() as products, mode:
            attend(case.with_tensors(**case.leaves()), "triton")
        counts.append(len(products))
    return tuple(counts)


def equal_scores(z: float, dtype: torch.dtype, device: str = "cpu") -> Case:
    """64 keys. In 16-bit types an offset is off by 2^-22 of z, so that F is off by 2^-18 of z."""
    query, key, scale = inputs_with_scores(torch.full((TILED, 64), z, dtype=dtype, device=device), 1.5)
    return Case(query, key, iid_inputs(1, 1, 64, 16, dtype=dtype, device=device)[2], scale=scale)


in_the_interpreter = pytest.mark.skipif(
    HAS_CUDA or not find_spec("triton"), reason="counts products in Triton's interpreter"
)


@in_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_leave_out_the_products_of_o1(dtype):
    """One for each tile of queries and keys in 16-bit types. In float32 the last step of the output needs O1.

    Equal scores: the solve ends at F = 1, and the output takes one pass.
    """
    case = Case(*iid_inputs(1, 1, 128, 16, dtype=dtype))
    case.query.zero_()
    training, inference = products_of(case)
    assert training - inference == (2 * 2 if dtype == torch.float16 else 0)


@in_the_interpreter
def test_large_equal_scores_take_a_further_pass_of_the_output():
    """Of three products with gradients, of two without."""
    few, more = (products_of(equal_scores(z, torch.float16)) for z in (0.0, 400.0))
    assert (more[0] - few[0], more[1] - few[1]) == (3, 2)


def test_rows_of_further_passes_have_the_outputs_of_training(backend):
    for dtype in backend.dtypes:
        for z in (20.0, 200.0, 400.0):
            check_outputs(equal_scores(z, dtype, backend.device), backend.impl)


def test_the_operator_keeps_its_schema(backend):
    case = case_of(backend, "learned")
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in operator_arguments(case, backend.impl)]
    assert arguments[3] is False
    torch.library.opcheck(ops.attention, arguments)


def test_a_compiled_call_without_gradients_keeps_nothing(backend):
    torch._dynamo.reset()
    case, flags = case_of(backend, "causal"), []

    def compiler(module, inputs):
        flags.extend(node.args[3] for node in module.graph.nodes if node.target is ops.attention)
        return module

    compiled = torch.compile(partial(attend, case, backend.impl), backend=compiler, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(), attend(case, backend.impl))
    assert flags == [False]


def test_a_support_is_returned_without_gradients(backend):
    case = case_of(backend, "causal", torch.float16 if torch.float16 in backend.dtypes else torch.float32)
    expected_output, expected = attend(case.with_tensors(**case.leaves()), backend.impl, return_support=True)
    with torch.no_grad():
        output, support = attend(case, backend.impl, return_support=True)
    assert torch.equal(output, expected_output)
    assert all(map(torch.equal, (*support[:4], support.keys), (*expected[:4], expected.keys)))


@pytest.mark.parametrize("mode", MODES)
def test_a_recording_without_gradients_has_the_support(backend, mode):
    case = case_of(backend, "causal")
    expected = attend(case, backend.impl, return_support=True)[1]
    with MODES[mode](), inspection.record() as calls:
        output = attend(case, backend.impl)
    assert torch.equal(output, attend(case, backend.impl))
    assert all(map(torch.equal, (*calls[0].support[:4], calls[0].support.keys), (*expected[:4], expected.keys)))
    rows = inspection.attention_rows(*case.inputs[:2], is_causal=True, impl=backend.impl)
    assert torch.equal(calls[0].rows().to_dense(), rows.to_dense())
