"""What the ranks of tests/test_context_parallel_transformers.py do: each function has its group first."""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, OPTConfig
from transformers_models import HEADS, make

from flash_entmax.distributed import ContextParallel, positions
from flash_entmax.integrations.transformers import context_parallel, set_alpha


def causal(name: str, alpha, **options) -> nn.Module:
    """A model without dropout; a tensor alpha is learned."""
    options |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "gpt2" else {}
    model = make(name, 1.5, AutoModelForCausalLM, **options)
    set_alpha(model, nn.Parameter(torch.tensor(alpha)) if isinstance(alpha, list) else alpha)
    return model.train()


def gradients(model: nn.Module) -> dict:
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def share(group, name: str, alpha, batch: dict, method: str, layout: str) -> dict:
    """This rank's share of loss and gradients, its logits and their positions.

    The backward pass, which computes each layer again, comes after the block.
    """
    model = causal(name, alpha)
    model.gradient_checkpointing_enable()
    with context_parallel(model, batch, ContextParallel(group, method, layout)) as own:
        outputs = model(**own)
    outputs.loss.backward()
    places = positions(batch["input_ids"].shape[1], group, layout)
    return {
        "loss": outputs.loss.detach(), "logits": outputs.logits.detach(), "positions": places, "grads": gradients(model)
    }  # fmt: skip


def in_one_graph(group, batch: dict) -> list[dict]:
    """The loss and the gradients of a model whose layers are checkpointed: as it is, and compiled without a break."""
    answers = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model = causal("llama", HEADS)
        model.gradient_checkpointing_enable()
        if is_compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        with context_parallel(model, batch, group) as own:
            loss = model(**own).loss
            loss.backward()
        answers.append({"loss": loss.detach(), **gradients(model)})
    return answers


def hidden(group, batch: dict) -> tuple:
    """The last hidden states of an encoder."""
    model = make("bert", 1.5)
    with torch.no_grad(), context_parallel(model, batch, group) as own:
        return model(**own).last_hidden_state, positions(batch["input_ids"].shape[1], group)


def everything(group, batches: list[dict]) -> tuple[list, dict, list[int]]:
    """FSDP2, checkpoints, torch.compile and autocast together: losses, the last gradients, graphs after each step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = causal("llama", HEADS, num_hidden_layers=1)
    model.gradient_checkpointing_enable()
    model.compile(backend="aot_eager")
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    losses, graphs = [], []
    for batch in batches:
        model.zero_grad()
        with context_parallel(model, batch, mesh) as own:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**own).loss
            (2 * loss).backward()  # FSDP averages over two ranks
        losses.append(loss.detach())
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, gradients(model), graphs


SMALL_OPT = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "attention_dropout": 0.0,
}  # fmt: skip


def told_otherwise(group, ids: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The names of the own part, and how many labels count, of one batch that each rank says in its own way."""
    batch = {"input_ids": ids, "labels": ids}
    if distributed.get_rank(group):
        batch = {"labels": ids, "use_cache": False, "attention_mask": None, "input_ids": ids}
    with context_parallel(make("llama", 1.5, AutoModelForCausalLM), batch, group) as own:
        return list(own), own["num_items_in_batch"]


def refused(group, case: str) -> None:
    """A block that is refused."""
    ids = torch.arange(3, 19).view(2, 8)
    model, batch = make("llama", 1.5, AutoModelForCausalLM), {"input_ids": ids}
    if case == "whole inputs":
        with context_parallel(model, batch, group) as own:
            model(**own | {"input_ids": ids.repeat(1, 2)})
    if case == "nested":
        with context_parallel(model, batch, group), context_parallel(model, batch, group):
            pass
    if case == "packed by boundaries":
        with context_parallel(model, batch, group) as own:
            model(**own, cu_seq_lens_q=torch.tensor([0, 8], dtype=torch.int32))
    if case == "another batch":
        batch = {"input_ids": ids + distributed.get_rank(group)}
    if case == "two tokens that cancel" and distributed.get_rank(group):
        ids = ids.clone()
        ids[0, 0] += 3
        ids[0, 1] -= 1
        batch = {"input_ids": ids}
    if case == "a mask of its own":
        with context_parallel(model, batch, group) as own:
            model(**own | {"attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)})
    if case == "masks without positions":
        config = OPTConfig(**SMALL_OPT)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="entmax15")
        batch = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
        with context_parallel(model, batch, group) as own:
            model(**own)
    if case == "softmax":
        model.set_attn_implementation("sdpa")
    if case == "no model":
        model = nn.Linear(2, 2)
    if case == "rope":
        model.config.rope_parameters["rope_type"] = "dynamic"
    if case == "layers":
        model.config.layer_types = ["full_attention", "linear_attention"]
    if case == "router":
        model.config.output_router_logits = True
    if case == "loss":
        model.loss_function, batch["labels"] = nn.functional.cross_entropy, ids
    batch |= {
        "cache": {"use_cache": True},
        "pictures": {"pixel_values": ids},
        "neither": {"input_ids": None},
        "4-D mask": {"attention_mask": torch.ones(2, 1, 8, 8)},
        "list": {"labels": ids.tolist()},
        "one row": {"input_ids": ids[0]},
        "embeddings without width": {"input_ids": None, "inputs_embeds": ids.float()},
        "float labels": {"labels": ids.float()},
        "float ids": {"input_ids": ids.float()},
        "counted in words": {"labels": ids, "num_items_in_batch": "x"},
        "a key of no name": {3: ids},
        "packed rows": {"position_ids": torch.arange(8).expand(2, -1) % 5},
        "odd": {"input_ids": ids[:, :7]},
    }.get(case, {})
    with context_parallel(model, [batch] if case == "no dict" else batch, group):
        raise AssertionError(f"{case} was not refused")
