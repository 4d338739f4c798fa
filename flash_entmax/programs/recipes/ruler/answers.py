"""What a model writes behind a prompt, and how much of what was asked for is in it."""

from collections.abc import Sequence

import torch
from torch import nn


def score(answers: Sequence[str], written: str) -> float:
    """The share of the answers that occur in the text, whatever their case: RULER's score of these tasks."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


@torch.inference_mode()
def written_behind(model: nn.Module, tokenizer, prompts: Sequence[Sequence[int]], room: int) -> list[str]:
    """Greedy texts of at most ``room`` tokens behind the prompts, which are padded on the left."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=pad)
    return tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
