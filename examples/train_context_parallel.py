"""The demo's language model is trained on sequences that several processes share, with its weights sharded by FSDP2.

Every process has a part of every sequence. Attention gathers keys and values; everything else needs the own part only.
It runs on CPUs with gloo, and on GPUs with NCCL, unchanged. With --folder it saves itself, and goes on from there when
it is started again, on any number of processes.

torchrun --standalone --nproc-per-node 2 examples/train_context_parallel.py --steps 200 --tokens 1024 --folder out/long
"""

import argparse
import os
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from flash_entmax.distributed import positions, shard
from flash_entmax.programs.demo.model import Transformer

LAYERS, WIDTH, HEADS, BATCH = 2, 64, 4, 4
ATTENTION = {"position": "nape", "learn_alpha": True, "alpha": 1.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of the whole training, those before a restart included")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence; a multiple of twice the processes")
    parser.add_argument("--folder", type=Path, help="where to save, and to go on from")
    parser.add_argument("--save-every", type=int, default=100, help="steps; the last one is saved as well")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun: torchrun --standalone --nproc-per-node 2 " + parser.prog)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(distributed.get_rank() % torch.cuda.device_count())
    train(init_device_mesh(device, (distributed.get_world_size(),)), args)
    distributed.barrier()  # the threads of gloo have let go of all tensors before Python ends
    distributed.destroy_process_group()


def train(mesh: DeviceMesh, args: argparse.Namespace) -> None:
    model = new_model(mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.frombuffer(bytearray(Path(nn.functional.__file__).read_bytes()), dtype=torch.uint8).long()
    own, ranks = positions(args.tokens, mesh), mesh.size()
    done = resume(model, optimizer, args.folder)
    say(mesh, f"{ranks} processes, {len(own)} of {args.tokens} tokens each: the first has {own[0]} to {own[-1]}")
    begin, read = time.perf_counter(), 0
    for step in range(done + 1, args.steps + 1):
        starts = torch.randint(len(text) - args.tokens, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        whole = text[starts + torch.arange(args.tokens + 1)].to(mesh.device_type)
        tokens, labels = shard(whole[:, :-1], 1, mesh), shard(whole[:, 1:], 1, mesh)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()  # FSDP takes the mean of the processes, all of which have as many tokens
        optimizer.step()
        optimizer.zero_grad()
        read += whole[:, 1:].numel()
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            mean = loss.detach().clone()
            distributed.all_reduce(mean)
            speed = read / (time.perf_counter() - begin)
            say(mesh, f"step {step}: loss {mean.item() / ranks:.6f}, {speed:,.0f} tokens a second")
        if args.folder and (step % args.save_every == 0 or step == args.steps):
            save(model, optimizer, args.folder, step)


def new_model(mesh: DeviceMesh) -> Transformer:
    """The same weights on every process, then a shard of each."""
    torch.manual_seed(0)
    model = Transformer(LAYERS, WIDTH, HEADS, context_parallel=mesh, **ATTENTION).to(mesh.device_type)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    return model


def save(model: Transformer, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """Each process writes its shards, into a folder of this step."""
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"step-{step:06}")


def resume(model: Transformer, optimizer: torch.optim.Optimizer, folder: Path | None) -> int:
    """The step of the last whole checkpoint, which is loaded; 0 if there is none."""
    found = sorted(folder.glob("step-*/.metadata")) if folder else []
    if not found:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=found[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(found[-1].parent.name.removeprefix("step-"))


def say(mesh: DeviceMesh, text: str) -> None:
    if mesh.get_local_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
