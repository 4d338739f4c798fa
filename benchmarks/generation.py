"""Tokens a second of a model of Transformers that decodes with a long static cache, with entmax15 and with sdpa.

python benchmarks/generation.py takes some minutes on a GPU; with --smallest, seconds on a CPU. The model is a Llama
with random weights. Its cache is filled with random keys and values, except for the last ROOM tokens. The keys of each
layer are scaled until a query attends to about --support of them. A step is one whole pass of the model for one token
of each batch row: as called, and as one CUDA graph. Times are medians of REPEATS, by CUDA events; on a CPU by the
clock. sdpa runs as Transformers calls it, with a mask over the whole static cache. FOLDER/generation.md and
FOLDER/generation.json are written with --out FOLDER.
"""

import argparse
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
import triton
from derivatives import milliseconds
from keys import graphed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from flash_entmax import __version__, inspection
from flash_entmax.integrations.transformers import register

ROOM, REPEATS = 32, 20
HALVINGS = 12  # of the interval in which the scale of the keys is looked for
ATTENTIONS = "entmax15", "sdpa"
SMALLEST = {
    "layers": 2, "heads": 4, "key_heads": 2, "head_size": 16, "vocabulary": 64, "dtype": "float32",
    "caches": [128, 256], "batches": [1, 2], "support": 12.0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One case: milliseconds of a step and tokens a second, as called and as a graph, and keys per query by layer."""

    cache: int
    batch: int
    attention: str
    called_ms: float
    called_tokens: float
    graph_ms: float | None
    graph_tokens: float | None
    support: list[float] | None


def main(arguments: list[str] | None = None) -> list[Row]:
    args = parsed(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register()
    model = build(args, device)
    conditions = conditions_of(args, model, device)
    print(conditions, flush=True)
    rows = []
    for tokens in args.caches:
        scales = scales_for(model, tokens, args.support)
        for batch in args.batches:
            cache = filled_cache(model, batch, tokens, scales)
            for attention in ATTENTIONS:
                rows.append(measured(model, cache, attention, batch, tokens))
                print(line(rows[-1]), flush=True)
            del cache
    if args.out is not None:
        write(args.out, conditions, rows)
    return rows


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("layers", 12), ("heads", 16), ("key-heads", 4), ("head-size", 128), ("vocabulary", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=number, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--caches", nargs="+", type=int, default=[2_048, 8_192, 32_768], metavar="N", help="tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="N")
    parser.add_argument("--support", type=float, default=100.0, help="keys of a query (default: %(default)s)")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes, in place of the defaults")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args(arguments)
    if args.smallest:
        parser.set_defaults(**SMALLEST)
        args = parser.parse_args(arguments)
    if min(args.caches) < 2 * ROOM:
        parser.error(f"--caches must be at least {2 * ROOM} tokens, got {min(args.caches)}")
    return args


def build(args: argparse.Namespace, device: str) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    width = args.heads * args.head_size
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.key_heads, head_dim=args.head_size,
        max_position_embeddings=2 * max(args.caches),
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="entmax15", dtype=getattr(torch, args.dtype))
    return model.eval().to(device)


def filled_cache(model: LlamaForCausalLM, batch: int, tokens: int, scales: list[float]) -> StaticCache:
    """A cache of some tokens, full except for the last ROOM. One scale for the keys of each layer."""
    config = model.config
    cache = StaticCache(config, max_cache_len=tokens)
    sizes = {"batch_size": batch, "num_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    cache.early_initialization(**sizes, dtype=model.dtype, device=model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    for layer, scale in zip(cache.layers, scales, strict=True):
        layer.keys.normal_(generator=generator).mul_(scale)
        layer.values.normal_(generator=generator)
    rewind(cache, tokens)
    return cache


def rewind(cache: StaticCache, tokens: int) -> None:
    """Let the next step write the first token of the room. What the steps before have written stays unseen."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens - ROOM)


def step_of(model: LlamaForCausalLM, cache: StaticCache, batch: int) -> Callable[[], Tensor]:
    """One pass for one token of each batch row."""
    ids = torch.arange(batch, device=model.device).unsqueeze(1) % model.config.vocab_size
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    options = {name: cache, "use_cache": True}

    @torch.no_grad()
    def step() -> Tensor:
        return model(ids, **options).logits

    return step


def scales_for(model: LlamaForCausalLM, tokens: int, wanted: float) -> list[float]:
    """The scale of the keys of each layer at which its queries attend to about so many keys, by bisection."""
    model.set_attn_implementation("entmax15")
    low, high = ([edge] * model.config.num_hidden_layers for edge in (-6.0, 6.0))  # powers of two
    for _ in range(HALVINGS):
        middle = [(one + other) / 2 for one, other in zip(low, high, strict=True)]
        cache = filled_cache(model, 1, tokens, [2.0**power for power in middle])
        for layer, support in enumerate(supports(model, cache, 1, tokens)):
            (low if support > wanted else high)[layer] = middle[layer]  # a larger scale leaves fewer keys
    return [2.0 ** ((one + other) / 2) for one, other in zip(low, high, strict=True)]


def supports(model: LlamaForCausalLM, cache: StaticCache, batch: int, tokens: int) -> list[float]:
    """The mean support size of a step's queries in each layer."""
    rewind(cache, tokens)
    with inspection.record(keep_inputs=False) as calls:
        step_of(model, cache, batch)()
    return [call.support.size.double().mean().item() for call in calls]


def measured(model: LlamaForCausalLM, cache: StaticCache, attention: str, batch: int, tokens: int) -> Row:
    model.set_attn_implementation(attention)
    sizes = supports(model, cache, batch, tokens) if attention == "entmax15" else None
    step = step_of(model, cache, batch)
    rewind(cache, tokens)
    called, graph = step_ms(step), None
    if model.device.type == "cuda":
        rewind(cache, tokens)
        replay = graphed(step)
        rewind(cache, tokens)
        graph = step_ms(replay)
    speeds = [None if ms is None else 1e3 * batch / ms for ms in (called, graph)]
    return Row(tokens, batch, attention, called, speeds[0], graph, speeds[1], sizes)


def step_ms(step: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        return milliseconds(step, REPEATS)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def conditions_of(args: argparse.Namespace, model: LlamaForCausalLM, device: str) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "flash-entmax": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: getattr(args, name) for name in ("layers", "heads", "key_heads", "head_size", "dtype")},
        "support asked for": args.support,
        "repeats": REPEATS,
    }


HEAD = "| cache | batch | attention | called, ms | tokens/s | graph, ms | tokens/s | keys per query |"


def line(row: Row) -> str:
    """The row of the table."""
    graph = ("", "") if row.graph_ms is None else (f"{row.graph_ms:.3f}", f"{row.graph_tokens:,.0f}")
    keys = "" if row.support is None else f"{min(row.support):.0f} to {max(row.support):.0f}"
    called = f"{row.called_ms:.3f} | {row.called_tokens:,.0f}"
    return f"| {row.cache:,} | {row.batch} | {row.attention} | {called} | {graph[0]} | {graph[1]} | {keys} |"


def write(folder: Path, conditions: dict[str, object], rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "rows": [asdict(row) for row in rows]}
    (folder / "generation.json").write_text(json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in conditions.items())
    table = "\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(line, rows)])
    about = "Keys per query are the means of the layers, the smallest and the largest."
    (folder / "generation.md").write_text(f"# Tokens a second with a static cache\n\n{facts}\n\n{about}\n\n{table}\n")


if __name__ == "__main__":
    main()
