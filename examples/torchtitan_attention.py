"""A model of torchtitan runs entmax attention on sequences that several processes share.

torchtitan 0.3 builds its models from configs, and takes any module as the inner attention of a layer: one that gets
queries, keys and values (batch, length, heads, dim). Its own context parallelism is not used here: every process passes
its part of the tokens, with their positions. It needs torchtitan. On one process it is the same model.

torchrun --standalone --nproc-per-node 2 examples/torchtitan_attention.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.models.common.attention import VarlenMetadata
from torchtitan.models.llama3 import _debugmodel
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.protocols.module import Module

from flash_entmax.distributed import ContextParallel, positions, shard

TOKENS, LAYERS = 256, 2


class EntmaxInnerAttention(Module):
    """Causal entmax attention, in place of torchtitan's ``FlexAttention``. Its group is set when the model is built."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        alpha: float = 1.5

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.alpha, self.context_parallel = config.alpha, None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attention_masks: VarlenMetadata | None = None,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """``attention_masks`` are the boundaries of packed documents in the whole sequence, of a batch of 1."""
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        boundaries = None if attention_masks is None else attention_masks.cu_seq_q
        options = {"alpha": self.alpha, "scale": scale, "is_causal": True, "cu_seq": boundaries}
        return self.context_parallel.attention(*parts, **options).transpose(1, 2)


def new_model(parallel: ContextParallel) -> Llama3Model:
    """The same weights on every process."""
    config = _debugmodel("varlen")
    config.layers = config.layers[:LAYERS]
    for layer in config.layers:
        layer.attention.inner_attention = EntmaxInnerAttention.Config(alpha=1.5)
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    for block in model.layers.values():
        block.attention.inner_attention.context_parallel = parallel
    return model


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(distributed.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    model = new_model(ContextParallel(mesh)).to(device)
    whole = torch.randint(2048, (1, TOKENS + 1), generator=torch.Generator().manual_seed(1)).to(device)
    documents = torch.tensor([0, 100, TOKENS], dtype=torch.int32, device=device)
    places = torch.cat((torch.arange(100), torch.arange(TOKENS - 100))).unsqueeze(0).to(device)
    tokens, labels, places = (shard(part, 1, mesh) for part in (whole[:, :-1], whole[:, 1:], places))
    logits = model(tokens, positions=places, attention_masks=VarlenMetadata(documents, documents, 156, 156))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / TOKENS
    loss.backward()
    gradient = model.layers["0"].attention.wo.weight.grad
    for share in (loss.detach(), gradient):
        distributed.all_reduce(share)
    if mesh.get_local_rank() == 0:
        own = positions(TOKENS, mesh)
        print(f"{mesh.size()} processes, {len(own)} of {TOKENS} tokens each: loss {loss.item():.5f}, ", end="")
        print(f"norm of a gradient {gradient.norm().item():.5f}", flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
