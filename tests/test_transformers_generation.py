"""Generation with models of Transformers: cached steps give the tokens of whole passes, and reach the kernels bare."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from transformers import AutoModelForCausalLM, StaticCache, masking_utils
from transformers_models import assert_same, make, padding, tokens

from flash_entmax.integrations.transformers import layer_call, masks

CACHES = "dynamic", "static"
PROMPT, NEW = 20, 6  # a prompt of more queries than the kernels decode; the windows of 10 are full


def model_of(name, **options):
    """Whose last layer does not repeat the token that it reads."""
    model = make(name, 1.5, AutoModelForCausalLM, tie_word_embeddings=False, **options)
    model.set_attn_implementation("entmax15")
    return model


def generated(model, batch=2, padded=False, new=NEW, **options):
    """The new tokens, (batch, new), of a prompt that every call of a test shares."""
    torch.manual_seed(1)
    inputs = {"input_ids": tokens(batch, PROMPT).to(model.device)}
    if padded:
        inputs["attention_mask"] = padding("left", batch, PROMPT).to(model.device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, PROMPT:].tolist()


@pytest.fixture
def calls(monkeypatch):
    """(query, key, value, visibility, output) of each call, whose implementation is `calls.impl`."""

    class Calls(list):
        impl = "auto"

    made, attend = Calls(), layer_call.attend

    def attend_and_keep(query, key, value, score, visibility, impl, return_support):
        output = attend(query, key, value, score, visibility, made.impl, return_support)
        made.append((query, key, value, visibility, output))
        return output

    monkeypatch.setattr(layer_call, "attend", attend_and_keep)
    return made


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
def test_cached_tokens_are_those_of_whole_passes(name, padded):
    model = model_of(name)
    whole = generated(model, padded=padded, use_cache=False)
    for cache in CACHES:
        assert generated(model, padded=padded, cache_implementation=cache) == whole, cache
    assert len({token for row in whole for token in row}) > 2


@pytest.mark.parametrize(("name", "cache"), [("llama", "dynamic"), ("gemma2", "static")])
def test_the_kernels_decode_the_same_tokens(name, cache, backend, calls, monkeypatch):
    """Every step after the prompt takes the kernels for few queries."""
    if backend.impl != "triton":
        pytest.skip("plain PyTorch is what the kernels are compared with")
    from flash_entmax.backends.triton import attention

    calls_of_decoding, decode = [], attention.decoded
    monkeypatch.setattr(attention, "decoded", lambda *given: calls_of_decoding.append(given) or decode(*given))
    model = model_of(name).to(backend.device)
    inputs = {"padded": True, "new": 4, "cache_implementation": cache}
    calls.impl = "torch"
    plain = generated(model, **inputs)
    calls.impl = "triton"
    assert generated(model, **inputs) == plain
    assert len(calls_of_decoding) == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize(("name", "padded"), [("llama", True), ("mistral", False)])
def test_beams(name, padded):
    model = model_of(name)
    options = {"num_beams": 3, "padded": padded, "new": 4}
    whole = generated(model, **options, use_cache=False)
    assert generated(model, **options) == whole
    assert generated(model, **options, cache_implementation="static") == whole
    assert whole != generated(model, padded=padded, new=4), "beams find what greedy steps do not"


def test_an_assistant_proposes_tokens(calls):
    """Its proposals are checked by calls of several queries, whose mask is the plain causal one."""
    model, assistant = model_of("llama"), model_of("llama", num_hidden_layers=1)
    greedy = generated(model, batch=1, new=12)
    calls.clear()
    assert generated(model, batch=1, new=12, assistant_model=assistant) == greedy
    several = [visibility for query, *_, visibility, _ in calls if 1 < query.shape[2] < PROMPT]
    assert several
    assert all(visibility.is_plain and visibility.key_mask is None for visibility in several)


class HostReads(TorchDispatchMode):
    """Counts how often Python reads a number out of a tensor, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_step_with_a_dynamic_cache_is_plain(name, calls):
    """Nothing hides a key: neither a mask of ones nor a window that the cache has cut."""
    generated(model_of(name))
    steps = [call for call in calls if call[0].shape[2] == 1]
    assert len(steps) == 2 * (NEW - 1)
    for *_, visibility, output in steps:
        assert visibility.is_plain
        assert visibility.key_mask is visibility.block_mask is None
        assert output.transpose(1, 2).is_contiguous(), "the projection reads it as it is"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_with_a_static_cache_waits_for_nothing(name, calls):
    """Only the filled part counts, which the device knows. All layers of a kind share its intervals."""
    model, ids = model_of(name), tokens(2, PROMPT + 1)
    with torch.no_grad():
        cache = StaticCache(model.config, max_cache_len=64)
        model(ids[:, :PROMPT], past_key_values=cache)
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        calls.clear()
        with HostReads() as reads:
            logits = model(ids[:, PROMPT:], past_key_values=cache).logits
        assert reads.count == 0
        assert_same(logits, model(ids).logits[:, PROMPT:])
    layers = calls[: len(cache.layers)]
    full = [visibility for _, key, _, visibility, _ in layers if key.shape[2] == 64]
    assert full
    assert all(visibility.known_intervals is full[0].known_intervals for visibility in full)
    assert full[0].known_intervals.tolist() == [[[0], [PROMPT + 1], [PROMPT]]] * 2
    assert all(visibility.key_mask is visibility.block_mask is None for *_, visibility, _ in layers)
    for (_, key, value, *_), place, layer in zip(layers, places, cache.layers, strict=True):
        if key.shape[2] == 64:
            assert (key.data_ptr(), value.data_ptr()) == place == (layer.keys.data_ptr(), layer.values.data_ptr())


@pytest.mark.parametrize("cache", CACHES)
def test_left_padding_is_an_interval(cache, calls):
    generated(model_of("llama"), padded=True, cache_implementation=cache)
    for query, *_, visibility, _ in calls:
        assert visibility.key_mask is None
        start, stop, position = visibility.known_intervals.unbind(1)
        assert start[:, 0].tolist() == [0, 11]
        assert torch.equal(stop, position + 1)
        assert position[:, -1].unique().numel() == 1
        assert query.shape[2] == position.shape[1]


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    """Whether padding is an interval then stays open: the mask of keys holds."""
    ones = torch.ones(2, PROMPT, dtype=torch.bool)
    options = {"batch_size": 2, "q_length": 1, "kv_length": PROMPT, "q_offset": PROMPT - 1, "device": "cpu"}
    options |= {"mask_function": masking_utils.causal_mask_function, "attention_mask": ones}
    assert masks.mask(**options).key_mask is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(masks, "_can_be_read", lambda mask: CAN_BE_READ(SimpleNamespace(is_cuda=True, is_meta=False)))
    with HostReads() as reads:
        assert torch.equal(masks.mask(**options).key_mask, ones)
    assert reads.count == 0


CAN_BE_READ = masks._can_be_read


def test_the_kernels_read_a_cache_in_place():
    """Heads of 64 and 128, whole or cut, by head or by token: none is copied."""
    pytest.importorskip("triton")
    from flash_entmax.backends.triton.tile import aligned

    for dim in (64, 128):
        whole = torch.zeros(2, 4, 96, dim, dtype=torch.bfloat16)
        by_token = torch.zeros(2, 96, 4, dim, dtype=torch.bfloat16).transpose(1, 2)
        for view in (whole, whole[:, :, :33], whole[:, :, -17:], whole[:1], by_token, by_token[:, :, 5:]):
            assert aligned(view).data.data_ptr() == view.data_ptr()
