"""The models that are asked: folders of Transformers with softmax or entmax, the default model, or a tiny one."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from flash_entmax.integrations.transformers import register, saved_attention

from ...errors import CommandError
from ...inspect.transformers_model import silence
from ..adapt.measures import for_generation
from ..adapt.models import default_file, default_model, tiny_model
from ..adapt.settings import DEFAULT_MODEL
from .settings import TIMES, TRAINED_LENGTH, RulerSize, is_model

TINY = "tiny"
SAFELY = {"local_files_only": True, "trust_remote_code": False}
OWN_POSITIONS = {TINY: 2048, DEFAULT_MODEL: 8192}


@dataclass(frozen=True)
class Asked:
    """A model by its name: a folder, DEFAULT_MODEL or TINY. What it reads at most, and its attention in words."""

    name: str
    positions: int | None
    attention: str = "softmax"

    def tokenizer(self):
        from transformers import AutoTokenizer

        if self.name == TINY:
            return tiny_model()[1]
        with silence():
            if self.name == DEFAULT_MODEL:
                file = default_file()
                return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            try:
                return AutoTokenizer.from_pretrained(self.name, **SAFELY)
            except (OSError, ValueError, ImportError) as error:
                raise CommandError(f"--model {self.name}: its tokenizer: {error}") from error

    def model(self, device: str) -> nn.Module:
        """In evaluation mode, with weights in bfloat16 on CUDA, in float32 elsewhere."""
        from transformers import AutoModelForCausalLM

        with silence():
            if self.name == TINY:
                return for_generation(tiny_model(self.positions)[0].to(device))
            if self.name == DEFAULT_MODEL:
                return for_generation(default_model()[0].to(device))
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            try:
                model = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype, use_safetensors=True, **SAFELY)
            except (OSError, ValueError, ImportError) as error:
                raise CommandError(f"--model {self.name}: {error}") from error
        return model.to(device).eval()

    def files(self) -> str:
        """A hash of the names, sizes and times of its files: what was written anew is another model."""
        if self.name == TINY:
            return ""
        folder = default_file().parent if self.name == DEFAULT_MODEL else Path(self.name)
        stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return sha256(repr(facts).encode()).hexdigest()[:16]


def models_of(size: RulerSize) -> list[Asked]:
    register()
    if size.model:
        return [of_folder(folder) if is_model(folder) else Asked(str(folder), None) for folder in size.model]
    name = TINY if size.is_tiny else DEFAULT_MODEL
    return [Asked(name, OWN_POSITIONS[name])]


def of_folder(folder: Path) -> Asked:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, **SAFELY)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--model {folder}: {error}") from error
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    found = saved_attention(config)
    if found is None:
        return Asked(str(folder), positions)
    name, alpha = found
    return Asked(str(folder), positions, f"{name}, alpha {alpha}" if isinstance(alpha, str) else f"entmax {alpha:g}")


def lengths_for(models: list[Asked], size: RulerSize) -> tuple[int, ...]:
    """Those of --lengths, or TIMES the TRAINED_LENGTH as far as all models read. None may be longer than that."""
    known = [(model.positions, model.name) for model in models if model.positions is not None]
    most, name = min(known, default=(max(TIMES) * TRAINED_LENGTH, ""))
    lengths = size.lengths or tuple(n for times in TIMES if (n := times * TRAINED_LENGTH) <= most)
    if not lengths or (known and lengths[-1] > most):
        longest = lengths[-1] if lengths else TRAINED_LENGTH
        raise CommandError(
            f"{name} reads up to {most:,} tokens (max_position_embeddings of its config), and {longest:,} are asked "
            "for: --lengths"
        )
    return lengths
