"""Models of Transformers with entmax attention, against a dense oracle that gets the models' own masks."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from transformers import AutoModelForCausalLM, DataCollatorWithFlattening
from transformers_models import (
    BATCHES,
    CONFIGS,
    ENCODERS,
    LENGTH,
    assert_same,
    make,
    padding,
    tokens,
    with_implementation,
)

from flash_entmax.integrations import transformers as integration


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_dense_entmax(name, batch):
    """Hidden states at all real tokens; encoders ignore positions that begin again, as they do with "eager"."""
    model, inputs = make(name), BATCHES[batch]()
    if name in ENCODERS:
        inputs.pop("use_cache", None)
    outputs = {}
    for implementation, alpha in {"entmax15": 1.5, "sparsemax": 2.0, "entmax": 1.3}.items():
        model.config.entmax_alpha = alpha
        with torch.no_grad():
            ours, theirs = (
                with_implementation(model, key, lambda: model(**inputs).last_hidden_state)
                for key in (implementation, "oracle")
            )
        assert_same(ours, theirs, inputs.get("attention_mask"))
        assert ours.isfinite().all()
        outputs[alpha] = ours
    assert (outputs[1.5] - outputs[2.0]).abs().max() > 1e-2
    assert (outputs[1.5] - outputs[1.3]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "batch"), [("gemma2", "left"), ("llama", "packed"), ("modernbert", "right")])
def test_gradients_are_those_of_dense_entmax(name, batch):
    model, inputs = make(name, 1.5), BATCHES[batch]()
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    weight = torch.randn(*real.shape, 32)[real]

    def gradients():
        loss = (model(**inputs).last_hidden_state[real] * weight).sum()
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    ours, theirs = (with_implementation(model, key, gradients) for key in ("entmax15", "oracle"))
    for our, their in zip(ours, theirs, strict=True):
        if their is not None:
            torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-3 * their.abs().max().item() + 1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "modernbert"])
def test_boundaries_pack_sequences(name):
    """A collator's cu_seq_lens_q and its kin: each sequence as if it were alone."""
    model, sequences = make(name, 1.5), [tokens(1, length) for length in (30, 1, 44)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": sequence[0].tolist()} for sequence in sequences])
    del batch["labels"]
    batch |= {} if name in ENCODERS else {"use_cache": False}
    with torch.no_grad():
        packed = model(**batch).last_hidden_state
        alone = [model(sequence).last_hidden_state for sequence in sequences]
    assert_same(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_pack_sequences_where_there_is_no_cache(name):
    model, lengths = make(name, 1.5), (30, 44)
    sequences = [tokens(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = model(torch.cat(sequences, 1), position_ids=positions, use_cache=False).last_hidden_state
        alone = [model(sequence).last_hidden_state for sequence in sequences]
    assert_same(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "mistral", "gpt2"])
def test_generate(name, cache):
    """Greedy tokens after left padding, beyond the window, are the oracle's; so are their scores."""
    model = make(name, 1.5, AutoModelForCausalLM)
    inputs = {"input_ids": tokens(2, 14), "attention_mask": padding("left", 2, 14)}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    ours, theirs = (
        with_implementation(model, key, lambda: model.generate(**inputs, **options)) for key in ("entmax15", "oracle")
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(set(ours.sequences[:, 14:].flatten().tolist())) > 1
    assert_same(torch.stack(ours.scores), torch.stack(theirs.scores))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks_of_a_prompt(name):
    """Several queries after a cache that is not empty."""
    model, ids = make(name, 1.5), tokens(2, LENGTH)
    with torch.no_grad():
        first = model(ids[:, :33], use_cache=True)
        second = model(ids[:, 33:], past_key_values=first.past_key_values).last_hidden_state
        assert_same(second, model(ids).last_hidden_state[:, 33:])


# torch.compile


@pytest.mark.parametrize(("name", "batch"), [("gemma2", "left"), ("llama", "whole"), ("modernbert", "right")])
def test_compiled(name, batch):
    """One graph; alpha moves in place, and nothing is compiled again. A compiled decoder looks for packed sequences in
    every batch without padding."""
    torch._dynamo.reset()
    model, inputs, alpha = make(name), BATCHES[batch](), torch.tensor(1.3)
    inputs |= {} if name in ENCODERS else {"use_cache": False}
    integration.set_alpha(model, alpha)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weight, outputs = model.get_input_embeddings().weight, []

    def step(run):
        hidden = run(**inputs).last_hidden_state[inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()]
        return hidden.detach(), torch.autograd.grad(hidden.square().mean(), weight)[0]

    outputs.append(step(compiled))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ours, theirs in zip(outputs[0], step(model), strict=True):
            assert_same(ours, theirs)
        alpha.fill_(1.9)
        outputs.append(step(compiled))
    for ours, theirs in zip(outputs[1], step(model), strict=True):
        assert_same(ours, theirs)
    assert (outputs[0][0] - outputs[1][0]).abs().max() > 1e-2


def test_compiled_generation():
    """The mask is made outside of the compiled forward pass, and goes in as an argument."""
    from transformers.generation import CompileConfig

    torch._dynamo.reset()
    model, ids = make("llama", 1.5, AutoModelForCausalLM), tokens(2, 14)
    inputs = {"input_ids": ids, "attention_mask": padding("left", 2, 14), "cache_implementation": "static"}
    inputs |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    ours = model.generate(**inputs, compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert ours.tolist() == model.generate(**inputs, disable_compile=True).tolist()


def test_a_mask_of_its_own_does_not_compile():
    torch._dynamo.reset()
    model, ids = make("gemma3, both ways", 1.5), tokens(2, 20)
    refused = r"evaluated into a BlockMask, which cannot be done inside torch\.compile"
    if torch.__version__.startswith("2.11."):  # says that there is an error, and not which
        refused = "Observed exception"
    with pytest.raises(Exception, match=refused):
        torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False)
    with torch.no_grad():  # in parts, it does
        ours = torch.compile(model, backend="eager")(ids, use_cache=False).last_hidden_state
        assert_same(ours, model(ids, use_cache=False).last_hidden_state)


def test_bfloat16():
    model, inputs = make("gemma2", 1.5), BATCHES["left"]()
    with torch.no_grad():
        whole = model(**inputs).last_hidden_state
        half = model.to(torch.bfloat16)(**inputs).last_hidden_state
    assert half.dtype == torch.bfloat16
    difference = (half - whole)[inputs["attention_mask"].bool()].norm() / whole[inputs["attention_mask"].bool()].norm()
    assert difference < 0.1
