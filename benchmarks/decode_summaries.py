"""Decoding with and without KeySummaries beside scaled_dot_product_attention, for one new token.

python benchmarks/decode_summaries.py takes a minute on a GPU. 32 query heads, 8 key heads of 128, bfloat16. Each query
has 30 keys of its own far above the others. Microseconds are medians of CUDA graphs; scaled_dot_product_attention is
the fastest of its backends. The bytes are those of the keys in 8 bits, of the candidates' keys and of the values of the
support, over those of all keys and values. Results with and without are compared first.
"""

import argparse
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import triton
from derivatives import milliseconds
from keys import graphed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_entmax import KeySummaries, entmax_attention

HEADS, KEY_HEADS, DIM, PLANTED = 32, 8, 128, 30
SIZES = (1, 32_768), (1, 131_072), (16, 32_768)  # batch, keys
SDPA_BACKENDS = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
HEAD = (
    "| batch | keys | SDPA, us | without, us | with summaries, us | with / SDPA | append, us | bytes read | keys in "
    "the support |\n" + 9 * "|---" + "|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    conditions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(conditions, HEAD, sep="\n", flush=True)
    rows = []
    for batch, keys in SIZES:
        rows.append(measured(batch, keys))
        print(line(rows[-1]), flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode_summaries.json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))


@torch.no_grad()
def measured(batch: int, keys: int) -> dict:
    query, key, value = inputs_of(batch, keys)
    summaries = KeySummaries.of(key)
    attend = partial(entmax_attention, query, key, value)
    with_summaries = partial(attend, key_summary=summaries)
    torch.testing.assert_close(with_summaries(), attend(), rtol=1e-2, atol=1e-3)
    support = attend(return_support=True)[1].size.double().mean().item()
    lengths = torch.full((batch,), keys - 1, dtype=torch.int32, device="cuda")
    times = {
        "sdpa": fastest_sdpa(query, key, value),
        "without": microseconds(attend),
        "with": microseconds(with_summaries),
        "append": microseconds(lambda: summaries.append(key[:, :, -1:], lengths)),
    }
    read = summaries.nbytes + 2 * 2 * support * batch * HEADS * DIM  # the candidates are hardly more than the support
    return {"batch": batch, "keys": keys, "support": support, "bytes": read / (key.nbytes + value.nbytes), **times}


def inputs_of(batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the planted keys are 14 + uniform(0, 1), in units of z 7 to 7.5; those of others N(0, 0.6^2)."""
    made = {"generator": torch.Generator("cuda").manual_seed(0), "device": "cuda"}
    group = HEADS // KEY_HEADS
    directions = torch.linalg.qr(torch.randn(batch, KEY_HEADS, DIM, group, **made)).Q.mT
    length = (14.0 * DIM**0.5) ** 0.5
    key = 0.6 * torch.randn(batch, KEY_HEADS, keys, DIM, **made)
    place = torch.rand(batch, KEY_HEADS, keys, **made).argsort(-1)[..., : group * PLANTED]
    planted = length * (1 + torch.rand(*place.shape, 1, **made) / 14) * directions.repeat_interleave(PLANTED, 2)
    key.scatter_(2, place.unsqueeze(-1).expand(-1, -1, -1, DIM), planted)
    query = (length * directions).reshape(batch, HEADS, 1, DIM)
    value = torch.randn(batch, KEY_HEADS, keys, DIM, **made)
    return tuple(tensor.to(torch.bfloat16) for tensor in (query, key, value))


def fastest_sdpa(query: Tensor, key: Tensor, value: Tensor) -> float:
    times = []
    for backend in SDPA_BACKENDS:
        with suppress(RuntimeError), sdpa_kernel(backend):  # it has no kernel for these inputs
            times.append(microseconds(partial(scaled_dot_product_attention, query, key, value, enable_gqa=True)))
    return min(times)


def microseconds(call) -> float:
    return 1e3 * milliseconds(graphed(call))


def line(row: dict) -> str:
    times = [f"{row[name]:.1f}" for name in ("sdpa", "without", "with")]
    cells = row["batch"], row["keys"], *times, f"{row['with'] / row['sdpa']:.2f}", f"{row['append']:.1f}"
    return "| " + " | ".join(map(str, (*cells, f"{row['bytes']:.3f}", f"{row['support']:.0f}"))) + " |"


if __name__ == "__main__":
    main()
