"""A small language model is trained on sequences that several processes share, with its weights sharded by FSDP2.

Every process has a part of every sequence. Attention gathers keys and values; everything else needs the own part only.
It runs on CPUs with gloo, and on GPUs with NCCL, unchanged.

torchrun --standalone --nproc-per-node 2 examples/train_context_parallel.py [STEPS [TOKENS]]
"""

import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flash_entmax.distributed import context_parallel_attention, positions, shard

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
TOKENS = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
WIDTH, HEADS, LAYERS, BATCH, BYTES = 64, 4, 2, 4, 256


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Each head learns its alpha and its ALiBi slope."""

    def __init__(self, group) -> None:
        super().__init__()
        self.group = group
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.inwards, self.outwards = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.alpha = nn.Parameter(torch.full((HEADS,), 1.3))
        self.slopes = nn.Parameter(0.5 ** torch.arange(1.0, HEADS + 1))

    def forward(self, x):
        heads = self.inwards(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(2, 3)
        mixed = context_parallel_attention(
            *heads, group=self.group, is_causal=True, alpha=self.alpha, alibi_slopes=self.slopes,
            sum_parameter_gradients=False,  # FSDP reduces them, with those of all other weights
        )  # fmt: skip
        x = x + self.outwards(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


def new_model(group) -> nn.Sequential:
    torch.manual_seed(0)  # the same weights on every process
    blocks = (Block(group) for _ in range(LAYERS))
    return nn.Sequential(nn.Embedding(BYTES, WIDTH), *blocks, nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (ranks,))
    model = new_model(mesh).to(device)
    for part in (*model[1:-2], model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.frombuffer(bytearray(Path(nn.functional.__file__).read_bytes()), dtype=torch.uint8).long()
    own = positions(TOKENS, mesh)
    if rank == 0:
        print(f"{ranks} processes, {len(own)} of {TOKENS} tokens each: the first has {own[0]} to {own[-1]}", flush=True)

    begin = time.perf_counter()
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(text) - TOKENS, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        whole = text[starts + torch.arange(TOKENS + 1)].to(device)
        tokens, labels = shard(whole[:, :-1], 1, mesh), shard(whole[:, 1:], 1, mesh)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, STEPS // 10) == 0:
            mean = loss.detach().clone()
            distributed.all_reduce(mean)
            speed = step * BATCH * TOKENS / (time.perf_counter() - begin)
            if rank == 0:
                print(f"step {step}: loss {mean.item() / ranks:.6f}, {speed:,.0f} tokens a second", flush=True)
    distributed.barrier()  # the threads of gloo have let go of all tensors before Python ends
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
