"""A sequence on several GPUs beside the same sequence on one.

torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py --out FOLDER takes some minutes on two GPUs.
A step is forward and backward pass of causal attention in bfloat16, batch 1, on inputs that are sparse by tile
(testing.topic_inputs with 20 topics). Milliseconds are medians by the clock, of the slowest
rank; the host runs ahead, as in a training. Beside each step:

    one GPU      the whole sequence on the first rank, while the others wait
    own part     the attention of each rank by itself, its keys and values gathered before: largest, and over the mean
    exchange     the collectives of the step by themselves, on tensors of the same sizes
    PyTorch      scaled_dot_product_attention under PyTorch's own context parallelism (a ring), where it runs

Then whole training steps of a transformer with FSDP2 on one long sequence. All of it goes to
FOLDER/context_parallel.json with --out FOLDER. On CPUs, over gloo, it only shows that it runs: give --lengths 256.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from flash_entmax import entmax_attention
from flash_entmax.distributed import ContextParallel, context_parallel_attention, positions, shard
from flash_entmax.distributed.ranks import all_gather
from flash_entmax.programs.demo.model import Transformer
from flash_entmax.testing import topic_inputs

TOPICS = 20
LENGTHS = 131_072, 524_288
LONGEST_OF_SDPA = 131_072
ROUNDS, CALLS, SLOW = 3, 5, 400  # calls of a round, but one where it takes more milliseconds
TRAINED = 262_144
MODEL = {"layers": 8, "width": 512, "heads": 8}


class Heads(NamedTuple):
    query: int
    key: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key} heads of {self.dim}"


HEADS = Heads(8, 8, 64), Heads(32, 8, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--trained", type=int, default=TRAINED, help="tokens of a training step; 0 for none")
    parser.add_argument("--steps", type=int, default=8, help="of the training")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(minutes=3))
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    name = "CPU"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        name = torch.cuda.get_device_name()
    mesh = init_device_mesh(device, (ranks,))
    found = {"conditions": {"device": name, "ranks": ranks, "torch": torch.__version__, "topics": TOPICS}, "steps": []}
    say(found["conditions"])
    for length in args.lengths:
        for heads in HEADS:
            found["steps"] += steps(length, heads, mesh)
            write(found, args.out)
    if args.trained:
        found["training"] = training(args.trained, args.steps, mesh)
        write(found, args.out)
    distributed.barrier()
    distributed.destroy_process_group()


def steps(length: int, heads: Heads, mesh: DeviceMesh) -> list[dict]:
    """What one length takes: on one GPU, by each method, and by PyTorch's ring of softmax attention."""
    rank, case = distributed.get_rank(), {"length": length, "heads": str(heads)}
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    made = topic_inputs(
        1, heads.query, length, heads.dim, TOPICS, key_heads=heads.key, dtype=dtype, device=mesh.device_type
    )
    whole = tuple(tensor.requires_grad_() for tensor in made)
    grad = torch.ones_like(whole[0])
    rows = []
    alone = largest(milliseconds(lambda: step(entmax_attention, whole, grad), rank == 0))
    rows.append(case | {"what": "one GPU", "step": alone})
    say(rows[-1])
    parts = tuple(shard(tensor.detach(), 2, mesh).requires_grad_() for tensor in whole)
    part_of_grad = torch.ones_like(parts[0])
    expected = [shard(tensor, 2, mesh) for tensor in derived(entmax_attention, whole, grad)]
    for method in ("gather", "heads"):

        def parallel(*inputs: Tensor, is_causal: bool, method=method) -> Tensor:
            return context_parallel_attention(*inputs, group=mesh, method=method, is_causal=is_causal)

        off = largest(difference(parallel, parts, part_of_grad, expected))
        taken = largest(milliseconds(lambda: step(parallel, parts, part_of_grad)))
        rows.append(case | {"what": method, "step": taken, "one_over_this": alone / taken, "difference": off})
        say(rows[-1])
    rows.append(case | {"what": "own part"} | own_part(parts[0], whole, part_of_grad, mesh))
    rows.append(case | {"what": "exchange of gather"} | exchange(parts, mesh))
    say(rows[-2])
    say(rows[-1])
    if length <= LONGEST_OF_SDPA and mesh.device_type == "cuda":
        rows.append(case | {"what": "PyTorch: one GPU"} | {"step": largest(sdpa_alone(whole, grad, rank == 0))})
        rows.append(case | {"what": "PyTorch: ring"} | ring(made, mesh))
        say(rows[-2])
        say(rows[-1])
    return rows


def step(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    derived(attend, inputs, grad)


def derived(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs."""
    output = attend(*inputs, is_causal=True)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def difference(attend: Callable[..., Tensor], parts: tuple, grad: Tensor, expected: list[Tensor]) -> float:
    """The largest difference from the whole sequence on one GPU, over the largest number of each tensor."""
    pairs = zip(derived(attend, parts, grad), expected, strict=True)
    return max(((found - known).abs().max() / known.abs().max()).item() for found, known in pairs)


def own_part(query: Tensor, whole: tuple[Tensor, ...], grad: Tensor, mesh: DeviceMesh) -> dict:
    """Attention of this rank's two chunks of queries to the keys up to each, with nothing exchanged."""
    ends = [chunk[-1].item() + 1 for chunk in positions(whole[0].shape[2], mesh).chunk(2)]

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        chunks = zip(query.chunk(2, 2), ends, strict=True)
        return torch.cat(
            [entmax_attention(own, key[:, :, :end], value[:, :, :end], is_causal=is_causal) for own, end in chunks], 2
        )

    times = of_all_ranks(milliseconds(lambda: step(attend, (query, *whole[1:]), grad)))
    return {"step": max(times), "largest_over_mean": max(times) * len(times) / sum(times)}


def exchange(parts: tuple[Tensor, ...], mesh: DeviceMesh) -> dict:
    """All keys and values to all ranks, and a gradient of each whole to its rank."""
    key, value = (tensor.detach() for tensor in parts[1:])
    group, ranks = mesh.get_group(), mesh.size()

    def run() -> None:
        for tensor in (key, value):
            gathered = tensor.new_empty(ranks * tensor.numel())
            all_gather(gathered, tensor.flatten(), group=group)
            distributed.all_to_all_single(torch.empty_like(gathered), gathered, group=group)

    taken = largest(milliseconds(run))
    received = 2 * (ranks - 1) * sum(tensor.numel() * tensor.element_size() for tensor in (key, value))
    return {"step": taken, "megabytes": received / 1e6, "gb_per_s": received / 1e6 / taken}


def sdpa_alone(whole: tuple[Tensor, ...], grad: Tensor, takes_part: bool) -> float:
    grouped = whole[0].shape[1] != whole[1].shape[1]

    def attend(*inputs: Tensor, is_causal: bool) -> Tensor:
        return scaled_dot_product_attention(*inputs, is_causal=is_causal, enable_gqa=grouped)

    return milliseconds(lambda: step(attend, whole, grad), takes_part)


def ring(made: tuple[Tensor, ...], mesh: DeviceMesh) -> dict:
    """Softmax attention under torch.distributed's context parallelism, or why it did not run."""
    try:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        found = {}
        groups = made[0].shape[1] // made[1].shape[1]  # heads of keys are repeated: the ring takes no groups
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            buffers = [
                tensor.detach().repeat_interleave(groups if number else 1, 1) for number, tensor in enumerate(made)
            ]
            with (
                sdpa_kernel(backend),
                context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2], no_restore_buffers=set(buffers)),
            ):
                inputs = tuple(tensor.detach().requires_grad_() for tensor in buffers)
                grad = torch.ones_like(inputs[0])
                found[backend.name] = largest(
                    milliseconds(lambda: step(nn.functional.scaled_dot_product_attention, inputs, grad))  # noqa: B023
                )
        return found | {"step": min(found.values())}
    except Exception as error:  # what a peer cannot do is a result
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def training(length: int, count: int, mesh: DeviceMesh) -> dict:
    """Steps of a language model of bytes on one sequence: on one GPU, and with FSDP2 and context parallelism."""
    source = Path(nn.functional.__file__).read_bytes() + Path(torch.__file__).read_bytes()
    text = torch.frombuffer(bytearray(source * (length // len(source) + 1)), dtype=torch.uint8).long()
    tokens = text[: length + 1].to(mesh.device_type).unsqueeze(0)
    rows = {}
    for what, group in (("one GPU", None), ("gather", mesh), ("heads", mesh)):
        takes_part = group is not None or distributed.get_rank() == 0
        rows[what] = trained(what, tokens, count, group) if takes_part else None
        distributed.barrier()
    if distributed.get_rank() == 0:
        parameters = sum(weight.numel() for weight in Transformer(**MODEL).parameters())
        return {"length": length, "parameters": parameters, "model": MODEL} | rows
    return {}


def trained(what: str, tokens: Tensor, count: int, mesh: DeviceMesh | None) -> dict:
    torch.manual_seed(0)
    parallel = None if mesh is None else ContextParallel(mesh, method=what)
    model = Transformer(**MODEL, position="rope", context_parallel=parallel).to(tokens.device)
    if mesh is not None:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=tokens.is_cuda)
    data, labels = tokens[:, :-1], tokens[:, 1:]
    if mesh is not None:
        data, labels = shard(data, 1, mesh), shard(labels, 1, mesh)
    if tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(count):
        begin = now()
        with torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext():
            logits = model(data)
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - begin)
        mean = loss.detach().clone()
        if mesh is not None:
            distributed.all_reduce(mean)
            mean /= mesh.size()
        losses.append(mean.item())
    taken = median(seconds[len(seconds) // 2 :])
    found = {
        "losses": losses,
        "seconds": taken,
        "tokens_per_second": tokens.shape[1] / taken,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if tokens.is_cuda else None,
    }
    say({"training": what} | found)
    return found


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(call: Callable[[], None], takes_part: bool = True) -> float:
    """The time of a call on this rank: the median of several rounds, in which the host runs ahead as in a training.

    All ranks make as many calls. 0 where a rank takes no part.
    """

    def round_of(calls: int) -> float:
        begin = now()
        for _ in range(calls if takes_part else 0):
            call()
        return 1e3 * (now() - begin) / calls

    round_of(1)
    calls = CALLS if largest(round_of(1)) < SLOW else 1
    times = [round_of(calls) for _ in range(ROUNDS)]
    distributed.barrier()
    return median(times) if takes_part else 0.0


def of_all_ranks(number: float) -> list[float]:
    numbers: list[float] = [0.0] * distributed.get_world_size()
    distributed.all_gather_object(numbers, number)
    return numbers


def largest(number: float) -> float:
    return max(of_all_ranks(number))


def say(row: dict) -> None:
    if distributed.get_rank() == 0:
        print(
            {name: float(f"{cell:.4g}") if isinstance(cell, float) else cell for name, cell in row.items()}, flush=True
        )


def write(found: dict, out: Path | None) -> None:
    if out is not None and distributed.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "context_parallel.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
