"""A model of Transformers, by folder or name."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CommandError, device_for, require
from .settings import ATTENTION, InspectSettings, check_against, check_offset, read_text
from .subject import NO_INTERFACE, Subject


def open_transformers(settings: InspectSettings) -> "TransformersModel":
    path = Path(settings.model)
    if path.exists() and not (path / "config.json").is_file():
        known = "a model of Transformers (config.json) nor the demo's (model.safetensors)"
        raise CommandError(f"{path} holds neither {known}")
    if not path.exists() and settings.model.startswith((".", "/", "~")):
        raise CommandError(f"{path}: no such folder")
    require("transformers", "transformers")
    content = read_text(settings.text)
    try:
        return load(settings, content)
    except (ImportError, OSError, ValueError) as error:
        place = "" if path.exists() else "no such folder here, and as a name of a model: "
        raise CommandError(f"{settings.model}: {place}{in_words(error)}") from error


def in_words(error: Exception) -> str:
    """The message without the advice to use another attn_implementation, which this command does not take."""
    if "trust_remote_code" in str(error):
        return "its config.json names Python code of its own, which is not run here"
    problem, *advice = re.split(r"(?:\.|:|;) (use|load the model with) attn_implementation=", str(error), flags=re.I)
    if advice and ("class says that it does not support" in problem or "without a call of its" in problem):
        return NO_INTERFACE
    return problem


def load(settings: InspectSettings, content: bytes) -> "TransformersModel":
    """Read the config, then the text, and the weights last, so that refusals come before the weights are read."""
    from transformers import AutoConfig, AutoTokenizer

    from ...integrations.transformers import register

    register()
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("a model of an encoder and a decoder: the page shows a text that attends to itself")
    sizes = config.get_text_config()
    attention, _, words = attention_of(settings, config) if has_attention(sizes) else without_attention(settings)
    check_against(settings, *(getattr(sizes, name, None) for name in ("num_hidden_layers", "num_attention_heads")))
    context = getattr(sizes, "max_position_embeddings", None) or settings.tokens
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"its tokenizer, which --text needs, cannot be loaded: {error}") from error
    ids, tokens = encoded(tokenizer, settings, content, min(settings.tokens, context))
    if settings.alpha is not None:
        sizes.entmax_alpha = settings.alpha
    model = load_weights(settings, config, attention)
    subject = TransformersModel(settings, model, torch.tensor([ids], device=model.device), tokens, words)
    subject.why_no_loss = subject.why_no_loss or why_no_loss(model)
    subject.layers = getattr(sizes, "num_hidden_layers", 0)
    subject.softmax_layers, subject.has_attention = softmax_layers(attention, sizes), attention is not None
    if context == len(tokens) < settings.tokens:
        subject.read += ", all that the model takes at once"
    return subject


def has_attention(config) -> bool:
    """False if the config names the kind of every layer, and none is attention: the models of Mamba."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or any("attention" in kind and kind != "linear_attention" for kind in kinds)


def without_attention(settings: InspectSettings) -> tuple[None, None, str]:
    """What ``attention_of`` gives for a model that has none."""
    for option in ("attention", "alpha"):
        if (value := getattr(settings, option)) is not None:
            raise ValueError(f"--{option} {value}: this model has no attention")
    return None, None, ""


def attention_of(settings: InspectSettings, config) -> tuple[str, object, str]:
    """The name of the attention, its alpha, and in words, where that alpha comes from."""
    from ...integrations.transformers import saved_attention

    by_hand = getattr(config.get_text_config(), "entmax_alpha", None)
    saved, found = saved_attention(config) or ("entmax15" if by_hand is None else "entmax", by_hand)
    is_asked_for = settings.attention is not None or settings.alpha is not None
    attention = (settings.attention or "entmax") if is_asked_for else saved
    alpha = settings.alpha or ATTENTION[attention] or found
    if alpha is None:
        raise ValueError("--attention entmax needs --alpha: the model's config has no entmax_alpha")
    if isinstance(alpha, (int, float)) and not 1 < alpha <= 2:
        raise ValueError(f"entmax_alpha in its config.json must be above 1 and at most 2, got {alpha!r}: give --alpha")
    return attention, alpha, origin_of(alpha, config)


def origin_of(alpha: object, config) -> str:
    """In words, where this alpha comes from, and what it replaces."""
    from ...integrations.transformers import saved_attention
    from ...integrations.transformers.config import is_held

    declared, saved = getattr(config.get_text_config(), "entmax_alpha", None), saved_attention(config)
    if saved is None:
        place = "among its weights" if is_held(declared) else "of its config.json"
        is_declared = declared is not None and alpha == declared
        return f"{f'with the entmax_alpha {place}, ' if is_declared else ''}in place of its softmax"
    _, found = saved
    if found is None:
        return "for the entmax attention that it was saved with, without an alpha"
    if alpha == found:
        return f"as found {'among its weights' if is_held(declared) else 'in its config.json'}"
    if is_held(declared):
        kind, whose, *_ = found.split(", ")
        return f"in place of its {'learned' if kind == 'learned' else 'own'} {whose}"
    return f"in place of {f'alpha {found},' if isinstance(found, str) else found} in its config.json"


def softmax_layers(attention: str | None, config) -> frozenset[int]:
    """The layers to which the config gives alpha 1."""
    from ...integrations.transformers.config import is_held

    alpha = getattr(config, "entmax_alpha", None)
    if attention != "entmax" or not isinstance(alpha, dict) or is_held(alpha):
        return frozenset()
    return frozenset(int(layer) for layer, number in alpha.items() if number == 1)


def load_weights(settings: InspectSettings, config, attention: str | None):
    """The model, of the class that was saved. ValueError if one of its weights is missing."""
    import transformers

    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name or "AutoModel", None)
    if kind is None:
        raise ValueError(f"its config.json names the class {name}, which Transformers does not have")
    device = torch.device(device_for(settings.device))
    dtype = "auto" if device.type == "cuda" else torch.float32
    options = {"config": config, "dtype": dtype, "output_loading_info": True}
    if attention is not None:
        options["attn_implementation"] = attention
    safely = {"use_safetensors": True, "trust_remote_code": False}  # a pickle, or code of a model, may do anything
    with silence():
        model, loaded = kind.from_pretrained(settings.model, **options, **safely)
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ValueError(f"{len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}")
    return model.to(device).eval()


@contextmanager
def silence() -> Iterator[None]:
    """Transformers shows no progress bar and no report meanwhile."""
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def why_no_loss(model) -> str:
    """In words; empty for a causal language model, whose tokens do not see the tokens that they predict."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    def is_of(mapping) -> bool:
        kinds = mapping.get(type(model.config), ())
        return type(model) in (kinds if isinstance(kinds, (tuple, list)) else (kinds,))

    name = type(model).__name__
    if is_of(MODEL_FOR_MASKED_LM_MAPPING):
        return f"{name} predicts hidden tokens, not the next one"
    if not is_of(MODEL_FOR_CAUSAL_LM_MAPPING):
        return f"{name} has no head that predicts the next token"
    if not all(getattr(part, "is_causal", True) for part in (model.config, *model.get_decoder().modules())):
        return f"the tokens of this {name} see those that follow them"
    return ""


class TransformersModel(Subject):
    def __init__(self, settings: InspectSettings, model, ids: Tensor, tokens: list[str], origin: str) -> None:
        super().__init__(settings, model.base_model, ids, tokens, origin)
        self.whole = model

    @property
    def vocabulary(self) -> int:
        return self.whole.config.get_text_config().vocab_size

    def run(self) -> None:
        self.model(self.ids)

    def logits(self, first: int, stop: int) -> Tensor:
        accepted = inspect.signature(self.whole.forward).parameters
        options = {"use_cache": False, "logits_to_keep": torch.arange(first, stop, device=self.ids.device)}
        output = self.whole(self.ids, **{name: option for name, option in options.items() if name in accepted})
        return output.logits[0] if "logits_to_keep" in accepted else output.logits[0, first:stop]

    def in_words(self, error: Exception) -> str:
        return in_words(error)

    def take_softmax(self, implementation: str) -> None:
        if implementation == "sdpa" and getattr(self.whole.config.get_text_config(), "attn_logit_softcapping", None):
            raise ValueError("sdpa has no softcap")
        with silence():
            self.whole.set_attn_implementation(implementation)


REST = "\u22ef"  # in place of the later tokens of one character


def encoded(tokenizer, settings: InspectSettings, content: bytes, limit: int) -> tuple[list[int], list[str]]:
    """Ids and texts of at most ``limit`` tokens, from ``settings.offset`` on.

    The tokenizer's special tokens stay around them.
    """
    text = content.decode("utf-8", "replace")
    if limit <= (added := tokenizer.num_special_tokens_to_add()):
        raise CommandError(f"--tokens {limit}: the tokenizer adds {added} special ones to any text")
    tokenizer.truncation_side = "right"
    options = {"truncation": True, "max_length": settings.offset + limit, "return_special_tokens_mask": True}
    encoding = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, **options)
    ids = encoding["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    special = encoding["special_tokens_mask"]
    texts = pieces(text, encoding["offset_mapping"], names, special) if tokenizer.is_fast else names
    own = [place for place, is_special in enumerate(special) if not is_special]
    if not own:
        raise CommandError(f"--text {settings.text}: the tokenizer finds no token in it")
    check_offset(settings, len(own), "token", content)
    kept = [*range(own[0]), *range(own[0] + settings.offset, len(ids))]
    return [ids[place] for place in kept], [texts[place] for place in kept]


def pieces(
    text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str], special: Sequence[int]
) -> list[str]:  # fmt: skip
    """For each token, the text from the end of the one in front of it to its own end.

    So no space that a tokenizer drops is lost. Of a character of several tokens the first one shows it, and the others
    are REST; a special token shows its name.
    """
    found, end = [], 0
    for (_, stop), name, is_special in zip(offsets, names, special, strict=True):
        found.append(text[end:stop] if stop > end else name if is_special else REST)
        end = max(end, stop)
    return found
