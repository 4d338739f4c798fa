"""Models of Transformers on batches that ranks share: losses and gradients add up to those of one process."""

import re

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from rank_models import causal, everything, gradients, hidden, in_one_graph, refused, share, told_otherwise
from rank_pool import Failure
from transformers_models import HEADS, make, padding

pytestmark = pytest.mark.xdist_group("distributed")
LENGTH = 36
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT = padding("left", 2, LENGTH)
BATCHES = {
    "whole": {"input_ids": IDS, "labels": IDS},
    "padding": {"input_ids": IDS, "attention_mask": LEFT, "labels": IDS.masked_fill(LEFT == 0, -100)},
    "packed": {
        "input_ids": IDS[:1], "labels": IDS[:1],
        "position_ids": torch.cat([torch.arange(n) for n in (13, 1, 22)]).unsqueeze(0),
    },
}  # fmt: skip
CASES = {  # model, alpha, batch, method, layout
    "llama": ("llama", HEADS, "whole", "gather", "balanced"),
    "padding": ("llama", 1.5, "padding", "gather", "contiguous"),
    "packed": ("llama", 1.5, "packed", "heads", "balanced"),
    "windows and softcap": ("gemma2", 1.5, "whole", "heads", "contiguous"),
    "learned positions": ("gpt2", 1.5, "padding", "gather", "balanced"),
}


def assert_near(ours, theirs, what, tolerance):
    size = max(1e-3, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * size, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_add_up(pool, name):
    model_name, alpha, batch_name, method, layout = CASES[name]
    batch = BATCHES[batch_name]
    shares = pool.run(2, share, model_name, alpha, batch, method, layout)
    model = causal(model_name, alpha)
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    assert_near(sum(own["loss"] for own in shares), outputs.loss.detach(), "loss", 1e-6)
    order = torch.cat([own["positions"] for own in shares]).argsort()
    assert_near(torch.cat([own["logits"] for own in shares], 1)[:, order], outputs.logits.detach(), "logits", 2e-5)
    for weight, expected in gradients(model).items():
        assert_near(sum(own["grads"][weight] for own in shares), expected, weight, 2e-5)


def test_an_encoder(pool):
    batch = {"input_ids": IDS, "attention_mask": padding("right", 2, LENGTH)}
    parts = pool.run(2, hidden, batch)
    order = torch.cat([places for _, places in parts]).argsort()
    with torch.no_grad():
        expected = make("bert", 1.5)(**batch).last_hidden_state
    assert_near(torch.cat([states for states, _ in parts], 1)[:, order], expected, "hidden states", 2e-5)


def test_a_compiled_model_is_one_graph(pool):
    for plain, compiled in pool.run(2, in_one_graph, {"input_ids": IDS, "labels": IDS}):
        assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_with_fsdp_checkpoints_compile_and_autocast(pool):
    """All at once, two steps: losses and gradients of one process under autocast, and the second compiles nothing."""
    batches = [{"input_ids": ids, "labels": ids} for ids in (IDS, IDS.flip(1))]
    answers = pool.run(2, everything, batches)
    model = causal("llama", HEADS, num_hidden_layers=1)
    for step, batch in enumerate(batches):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        assert_near(sum(losses[step] for losses, _, _ in answers), loss.detach(), "loss", 4e-3)
    for _, grads, (first, second) in answers:
        assert first == second > 0
        for weight, expected in gradients(model).items():
            assert_near(grads[weight], expected, weight, 3e-2)


REFUSED = {
    "whole inputs": "each rank has 4 tokens, but the model was called with 16 queries",
    "nested": "context_parallel is open already",
    "packed by boundaries": "context_parallel packs sequences by position_ids",
    "another batch": r"same call, got input_ids .* of hash [0-9a-f]+ on rank 0, .* on rank 1",
    "two tokens that cancel": "same call, got input_ids .* on rank 0, .* on rank 1",
    "one row": r"input_ids must have shape \(batch, length\), got \(8,\)",
    "embeddings without width": r"inputs_embeds must have shape \(batch, length, width\), got \(2, 8\)",
    "float labels": r"labels must be of torch\.int64, got torch\.float32",
    "float ids": r"input_ids must be of torch\.int64 or torch\.int32, got torch\.float32",
    "counted in words": "num_items_in_batch must be a number or a tensor, got str 'x'",
    "a key of no name": "context_parallel shares input_ids, .*, got 3",
    "a mask of its own": "its model passes the mask of the part, got Tensor",
    "masks without positions": "this model makes its masks without position_ids, and does not pack",
    "softmax": "attention is one of 'entmax15', 'sparsemax', 'entmax', got 'sdpa'",
    "no model": "takes a model of Transformers, got Linear",
    "rope": "rotary angles of type 'dynamic'",
    "layers": "layers that need the whole sequence: linear_attention",
    "router": "output_router_logits=True",
    "loss": "for the loss ForCausalLMLoss, and LlamaForCausalLM has cross_entropy",
    "cache": "context_parallel has no caches",
    "pictures": "context_parallel shares input_ids, .*, got pixel_values",
    "neither": "batch must have input_ids or inputs_embeds, got neither",
    "4-D mask": r"attention_mask must have shape \(2, 8\), got \(2, 1, 8, 8\)",
    "list": "labels must be a torch.Tensor, got list",
    "packed rows": "in a batch of 1 here, got a batch of 2",
    "odd": "must divide into 4 chunks of one length, .* got length 7",
    "no dict": "batch must be a dict of what the model takes, got list",
}


def test_batches_that_say_the_same_are_the_same(pool):
    """Whatever the order of the entries, and with what is left out by None or False."""
    (one, labels), (other, same) = pool.run(2, told_otherwise, IDS)
    assert torch.equal(labels, same)
    assert set(one) == set(other)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_refused(pool, case):
    for answer in pool.answers(2, refused, case):
        assert isinstance(answer, Failure), answer
        assert answer.of[0] in ("ValueError", "TypeError"), answer
        assert re.search(REFUSED[case], answer.of[1]), answer
