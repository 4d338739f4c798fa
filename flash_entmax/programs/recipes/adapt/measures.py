"""What is measured of a model: held-out loss, keys and densities by layer, speed of generation, answers."""

import copy
import time
from dataclasses import asdict
from itertools import pairwise
from math import inf, isfinite
from statistics import fmean, median

import torch
from torch import nn

from flash_entmax.adapt import evaluate

from ...demo.train import precision
from .settings import AdaptSize
from .text import Text, held_out_windows

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that reverses a list.",
    "Explain in one sentence why the sky is blue.",
    "I have 3 apples and buy 2 more. How many apples do I have?",
)


def held_out(model: nn.Module, texts: dict[str, Text], size: AdaptSize, device: str) -> dict:
    """{text: {length: {"loss", "layers": [...]}}}; loss in nats per token. Softmax has no layers."""
    found = {}
    with precision(torch.device(device)):
        for name, text in texts.items():
            found[name] = {}
            for length in size.lengths:
                evaluation = evaluate(model, held_out_windows(text, size, length, device))
                layers = [asdict(layer) for layer in evaluation.layers]
                found[name][str(length)] = {"loss": evaluation.loss, "layers": layers}
    return found


def validation(measured: dict) -> float:
    """The number that chooses learning rates: the mean loss of both texts at the shortest length.

    Infinite for a training that failed.
    """
    loss = fmean(next(iter(by_length.values()))["loss"] for by_length in measured.values())
    return loss if isfinite(loss) else inf


def for_generation(model: nn.Module) -> nn.Module:
    """On CUDA a copy with weights in bfloat16, as one would generate. Buffers, such as rotary frequencies, stay."""
    if next(model.parameters()).is_cuda:
        model = copy.deepcopy(model)
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16)
    return model.eval()


class Clock:
    """When each token came; Transformers calls it as a streamer, first with the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def tokens_per_second(model: nn.Module, tokenizer, text: Text, size: AdaptSize) -> float:
    """By the median time from one token to the next, behind a prompt of held-out text: one sequence, greedy."""
    prompt = text.held_out[: size.prompt].long().unsqueeze(0).to(next(model.parameters()).device)
    generate(model, tokenizer, prompt, 2)  # what is compiled at first
    clock = Clock()
    generate(model, tokenizer, prompt, size.generated, min_new_tokens=size.generated, streamer=clock)
    return 1 / median(later - earlier for earlier, later in pairwise(clock.times[1:]))


def answers(model: nn.Module, tokenizer, size: AdaptSize) -> dict[str, str]:
    """{prompt: greedy answer}; in the form of a chat if the tokenizer has one."""
    device, found = next(model.parameters()).device, {}
    for prompt in PROMPTS:
        text = prompt
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        written = generate(model, tokenizer, ids.to(device), size.answer)[0, ids.shape[1] :]
        found[prompt] = tokenizer.decode(written, skip_special_tokens=True).strip()
    return found


def generate(model: nn.Module, tokenizer, ids: torch.Tensor, count: int, **options) -> torch.Tensor:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=pad, **options)
