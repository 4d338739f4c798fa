"""The command flash-entmax inspect in tests: models to inspect, a run, and the losses that it shows."""

import re
import shutil

import pytest
import torch
from test_inspection import tiny_llama

from flash_entmax.programs import cli


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()  # of what ran before
    code = cli.main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def write_llama(folder):
    """A random model with a tokenizer of words, which drops the spaces between them."""
    model = tiny_llama()
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = ["[unk]", "the", "cat", "sat", "on", "mat", ".", "<"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[unk]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]").save_pretrained(folder)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    (folder / "text.txt").write_text("the cat sat on the mat.\nthe cat < the mat.\n" * 12)
    return folder


def saved_beside(llama_folder, folder, model):
    """The model with the tokenizer of words."""
    for path in llama_folder.glob("token*"):
        shutil.copy(path, folder)
    model.save_pretrained(folder)
    return folder


def entmax_llama(alpha, layers=2):
    from flash_entmax.integrations.transformers import set_alpha

    model = tiny_llama(layers)
    model.set_attn_implementation("entmax")
    set_alpha(model, alpha)
    return model


def write_demo(folder):
    """A random model of the demo: (folder, model)."""
    pytest.importorskip("rich")
    from flash_entmax.programs.demo import checkpoint
    from flash_entmax.programs.demo.model import Transformer
    from flash_entmax.programs.demo.settings import settings_for

    torch.manual_seed(0)
    settings = settings_for("cpu", folder, None, 1.7, None, smallest=True)
    model = Transformer(settings.layers, settings.width, settings.heads, alpha=settings.alpha)
    checkpoint.save(model, settings)
    return folder, model


def loss_of(model, implementation: str, ids: list[int]) -> float:
    """By Transformers' own means, of all logits."""
    model.set_attn_implementation(implementation)
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


def shown_losses(printed: str) -> list[float]:
    """With this alpha, with softmax."""
    line = next(line for line in printed.splitlines() if line.startswith("loss in nats per"))
    return [float(number) for number in re.findall(r"(\d+\.\d{3}) with", line)]


def words_of(llama_folder, first: int, count: int) -> list[int]:
    """Token ids of the text."""
    from transformers import AutoTokenizer

    text = (llama_folder / "text.txt").read_text()
    return AutoTokenizer.from_pretrained(llama_folder)(text)["input_ids"][first:][:count]
