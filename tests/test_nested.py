"""Nested tensors where they are taken, and words where they are not. Attention itself: test_packed.py."""

import pytest
import torch

from flash_entmax import (
    entmax,
    entmax15,
    entmax_attention,
    entmax_attention_varlen,
    entmax_loss,
    linear_entmax_loss,
    sparsemax,
)
from flash_entmax.nn import Entmax, EntmaxAttention

LENGTHS = 3, 5, 1


def parts(backend, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, size, generator=generator).to(backend.device) for length in LENGTHS]


def jagged(tensors):
    return torch.nested.nested_tensor(tensors, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("dim", [-1, 2])
def test_activations_of_each_part(backend, dim):
    tensors = [part.requires_grad_() for part in parts(backend)]
    nested = jagged([part.detach() for part in tensors])
    output = entmax(nested, 1.3, dim, impl=backend.impl)
    assert output.shape == nested.shape
    alone = [entmax(part, 1.3, -1, impl=backend.impl) for part in tensors]
    output.values().square().sum().backward()
    sum(p.square().sum() for p in alone).backward()
    for ours, gradient, theirs, part in zip(output.unbind(), nested.grad.unbind(), alone, tensors, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient, part.grad)


def test_the_other_activations():
    nested = jagged([torch.randn(length, 16) for length in LENGTHS])
    assert torch.equal(sparsemax(nested).values(), sparsemax(nested.values()))
    assert torch.equal(Entmax(1.5)(nested).values(), entmax15(nested.values()))
    alpha = torch.full((1, 1, 1), 1.3, requires_grad=True)
    p = entmax(nested, alpha)
    assert torch.equal(p.values(), entmax(nested.values(), torch.tensor(1.3)))
    p.values().square().sum().backward()
    assert alpha.grad.shape == alpha.shape


@pytest.mark.parametrize("position", ["rope", "nape"])
def test_a_layer_packs_the_parts(backend, position):
    torch.manual_seed(0)
    layer = EntmaxAttention(16, 2, position=position, learn_alpha=True, device=backend.device)
    tensors = parts(backend)
    nested = jagged(tensors)
    output = layer(nested, impl=backend.impl)
    assert output.is_nested
    assert output.shape == nested.shape
    for ours, part in zip(output.unbind(), tensors, strict=True):
        torch.testing.assert_close(ours, layer(part[None], impl=backend.impl)[0], rtol=1e-5, atol=1e-6)
    output.values().sum().backward()
    assert nested.grad.shape == nested.shape


def test_a_layer_is_called_once():
    """By its hooks, which get the nested tensors. What is known of the lengths stays known."""
    layer, calls = EntmaxAttention(16, 2), []
    layer.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, output)))
    x = torch.nested.nested_tensor([torch.randn(length, 16) for length in LENGTHS], layout=torch.jagged)
    assert x._get_max_seqlen() == 5
    output = layer(x)
    assert [[tensor.is_nested for tensor in call] for call in calls] == [[True, True]]
    assert (output._maybe_min_seqlen, output._maybe_max_seqlen) == (x._maybe_min_seqlen, 5)
    assert entmax(x)._maybe_max_seqlen == 5


def heads_of(lengths, heads=2):
    tensors = [torch.randn(length, heads, 8) for length in lengths]
    return torch.nested.nested_tensor(tensors, layout=torch.jagged).transpose(1, 2)


def test_attention_of_nested_tensors_with_its_support():
    query, key = heads_of(LENGTHS), heads_of((4, 5, 2))
    output, support = entmax_attention(query, key, key, return_support=True)
    assert output.shape == query.shape
    assert support.size.shape == (2, sum(LENGTHS))
    boundaries = [tensor.offsets() for tensor in (query, key)]
    packed = (tensor.values().transpose(0, 1) for tensor in (query, key, key))
    _, expected = entmax_attention_varlen(*packed, *boundaries, 5, 5, return_support=True)
    assert torch.equal(support.size, expected.size)


def test_what_does_not_fit_beside_a_nested_query():
    query = heads_of(LENGTHS)
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got NoneType"):
        entmax_attention(query, None, None)
    with pytest.raises(ValueError, match="query and key must have the same number of sequences, got 3 and 2"):
        entmax_attention(query, heads_of((3, 5)), heads_of((3, 5)))


X, BOUNDARIES = torch.randn(9, 16), torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda nested, _: entmax(nested, dim=1), "dim of a nested tensor must be after the ragged one, .* got 1"),
        (lambda nested, _: entmax(nested, dim=3), "dim must be from -3 to 2, got 3"),
        (
            lambda nested, _: entmax(nested, torch.full((3, 1, 1), 1.5)),
            r"alpha of a nested tensor must .*, got \(3, 1, 1",
        ),
        (lambda _, strided: entmax(strided), "x must be a tensor that is not nested"),
        (lambda _, strided: entmax(X.to_sparse()), "x must be a dense tensor, got one of layout torch.sparse_coo"),
        (lambda nested, _: entmax_loss(nested, torch.zeros(9).long()), "input must be a tensor that is not nested"),
        (lambda nested, _: entmax_loss(X, nested), "target must be a tensor that is not nested"),
        (lambda nested, _: linear_entmax_loss(nested, X, torch.zeros(9).long()), "hidden must be .* pass its values"),
        (
            lambda nested, _: entmax_attention_varlen(nested, X, X, BOUNDARIES, None, 9, 9),
            "query must be a tensor that is",
        ),
        (
            lambda _, strided: entmax_attention(strided, strided, strided),
            "jagged nested tensor .* got another nested tensor",
        ),
        (lambda nested, _: entmax_attention(nested, X, X), "jagged nested tensor .* got another nested tensor"),
        (
            lambda nested, _: EntmaxAttention(16, 2)(nested, key_lengths=BOUNDARIES),
            "are for tensors that are not nested",
        ),
        (lambda _, strided: EntmaxAttention(16, 2)(strided), "x must be a tensor that is not nested"),
    ],
)
def test_refusals(call, words):
    tensors = [torch.randn(length, 16) for length in LENGTHS]
    with pytest.raises(ValueError, match=words):
        call(jagged(tensors), torch.nested.nested_tensor(tensors))


def test_values_of_other_lengths_are_refused():
    def nested(*lengths):
        return torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in lengths], layout=torch.jagged).transpose(1, 2)

    query, key = nested(3, 7), nested(3, 7)
    assert entmax_attention(query, key, nested(3, 7)).shape == query.shape
    with pytest.raises(ValueError, match=r"value must have the sequence lengths of key, \[3, 7\], got \[7, 3\]"):
        entmax_attention(query, key, nested(7, 3))
    with pytest.raises(ValueError, match="value must have the sequence lengths of key, got 3 sequences and 2"):
        entmax_attention(query, key, nested(3, 3, 4))


def test_the_implementation_of_a_layer_is_that_of_its_nested_call():
    x = torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(5, 24)], layout=torch.jagged)
    with pytest.raises(ValueError, match="impl must be"):
        EntmaxAttention(24, 4)(x, impl="fast")
