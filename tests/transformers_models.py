"""Tiny models of Transformers, batches for them, and the dense oracle that gets the models' own masks."""

import copy

import entmax
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask

from flash_entmax.integrations import transformers as integration

LENGTH = 75  # more than one tile of 64
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
LAYERS = {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
DECODERS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, **LAYERS, attn_logit_softcapping=2.0, query_pre_attn_scalar=4),
    "gemma3": Gemma3TextConfig(**GROUPED, **LAYERS, query_pre_attn_scalar=16),
    "mistral": MistralConfig(**GROUPED, sliding_window=10),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, attn_pdrop=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
ENCODERS = {
    "bert": BertConfig(**SMALL, **NO_DROPOUT),
    "modernbert": ModernBertConfig(
        **SMALL, local_attention=16, layer_types=["sliding_attention", "full_attention"], cls_token_id=1, sep_token_id=2
    ),
    "gemma3, both ways": Gemma3TextConfig(
        **GROUPED, **LAYERS, query_pre_attn_scalar=16, use_bidirectional_attention=True
    ),
}
CONFIGS = DECODERS | ENCODERS


def oracle(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **_):
    """Scores in float64 under the mask of `eager_mask`, and the probabilities of the package entmax."""
    alpha, groups = alpha_of(module), query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        hidden = attention_mask < 0
        scores = scores.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -1e9)  # blind rows: anything finite
    if alpha in (1.5, 2.0):
        rows = entmax.entmax15 if alpha == 1.5 else entmax.sparsemax
        probability = rows(scores, dim=-1)
    else:
        probability = entmax.entmax_bisect(scores, alpha, dim=-1, n_iter=60)
    return (probability @ value).transpose(1, 2).to(query.dtype).contiguous(), None


def alpha_of(module):
    alpha = module.config.entmax_alpha
    return alpha[str(module.layer_idx)] if isinstance(alpha, dict) else alpha


def make(name: str, alpha: float | None = None, model_class=AutoModel, **options):
    """A model with seeded weights, none of them 0, that runs "entmax"."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.entmax_alpha = alpha
    for option, value in options.items():
        setattr(config, option, value)
    model = model_class.from_config(config, attn_implementation="entmax").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 97, shape)


def padding(side: str, batch: int = 3, length: int = LENGTH) -> torch.Tensor:
    """The first row is whole, the others lack some tokens on that side."""
    lacking = torch.tensor([0, 11, 66][:batch]).unsqueeze(1)
    place = torch.arange(length)
    return (place >= lacking if side == "left" else place < length - lacking).long()


def with_implementation(model, name, run):
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        return run()
    finally:
        model.set_attn_implementation(before)


# Alpha as it may be saved, and models that load

HEADS = [1.2, 1.4, 1.6, 1.8]
ALPHAS = {
    "number": lambda: 1.3,
    "by layer": lambda: {0: 1.2, 1: 1.9},
    "tensor": lambda: torch.tensor(1.3),
    "tensor by head": lambda: torch.tensor(HEADS),
    "learned": lambda: nn.Parameter(torch.tensor(1.3)),
    "learned by head": lambda: nn.Parameter(torch.tensor(HEADS)),
}


def decoder(alpha=None):
    model = make("llama", model_class=AutoModelForCausalLM)
    if alpha is not None:
        integration.set_alpha(model, alpha)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def assert_loads_as(folder, model, ids):
    """Also when what was loaded is saved again."""
    for times in ("once", "twice"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == model.config._attn_implementation, times
        assert torch.equal(logits(loaded, ids), logits(model, ids)), times
        loaded.save_pretrained(folder)
    return loaded


PACKED = torch.cat([torch.arange(n) for n in (30, 1, 44)]).expand(2, -1)
BATCHES = {
    "whole": lambda: {"input_ids": tokens(2, LENGTH)},
    "right": lambda: {"input_ids": tokens(3, LENGTH), "attention_mask": padding("right")},
    "left": lambda: {"input_ids": tokens(3, LENGTH), "attention_mask": padding("left")},
    "packed": lambda: {"input_ids": tokens(2, LENGTH), "position_ids": PACKED, "use_cache": False},
}


def assert_same(ours, theirs, where=None, tolerance=2e-4):
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


integration.register()
AttentionInterface.register("oracle", oracle)
AttentionMaskInterface.register("oracle", eager_mask)
