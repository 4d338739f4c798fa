"""State-space layers in tests: tiny random ones of every accepted class, and the same layers in plain loops."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

WIDTH, VOCABULARY = 12, 8


def config_of(name: str, **options):
    """Of a tiny model that has layers of this class."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    heads = {"mamba_n_heads": 4, "mamba_d_head": 6, "mamba_d_state": 5, "mamba_n_groups": 2, "mamba_chunk_size": 8}
    mamba2 = {"num_heads": 4, "head_dim": 6, "state_size": 5, "n_groups": 2, "chunk_size": 8}
    nemotron = {"mamba_num_heads": 4, "mamba_head_dim": 6, "ssm_state_size": 5, "n_groups": 2, "chunk_size": 8}
    zamba2 = {"n_mamba_heads": 4, "mamba_headdim": 6, "mamba_d_state": 5, "mamba_ngroups": 2, "chunk_size": 8}
    kinds = {
        "MambaMixer": ("MambaConfig", {"state_size": 5, "use_bias": True}),
        "FalconMambaMixer": ("FalconMambaConfig", {"state_size": 5}),
        "JambaMambaMixer": ("JambaConfig", attention | {"mamba_d_state": 5, "mamba_dt_rank": 3}),
        "Mamba2Mixer": ("Mamba2Config", mamba2 | {"use_bias": True, "time_step_limit": (0.01, 0.8)}),
        "BambaMixer": ("BambaConfig", attention | heads),
        "GraniteMoeHybridMambaLayer": ("GraniteMoeHybridConfig", attention | heads),
        "NemotronHMamba2Mixer": (
            "NemotronHConfig",
            attention | nemotron | {"layers_block_type": ["linear_attention"], "head_dim": 6},
        ),
        "Zamba2MambaMixer": ("Zamba2Config", attention | zamba2 | {"layers_block_type": ["mamba"]}),
    }
    kind, own = kinds[name]
    if name == "NemotronHMamba2Mixer":
        del sizes["num_hidden_layers"]  # it is the length of the list
    return getattr(transformers, kind)(**sizes | own | options)


def model_of(name: str, **options) -> nn.Module:
    from transformers import AutoModel

    torch.manual_seed(0)
    return spread(AutoModel.from_config(config_of(name, **options)).eval())


def mixer_of(name: str, **options) -> nn.Module:
    return next(part for part in model_of(name, **options).modules() if type(part).__name__ == name)


def spread(model: nn.Module) -> nn.Module:
    """Weights and biases so large that no gate is nearly constant, and no bias is 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.normal_(std=0.4)
            elif name.endswith((".bias", "dt_bias", ".D")):
                parameter.normal_()
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2)
    return model


def plain_mamba(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """MambaMixer in a loop over tokens. Its gates are detached, so that its derivative is with gates held fixed."""
    size, state = mixer.intermediate_size, mixer.ssm_state_size
    inputs, z = mixer.in_proj(hidden).split(size, -1)
    channels = gated_convolution(mixer, inputs)
    low, write, read = mixer.x_proj(channels).detach().split((mixer.time_step_rank, state, state), -1)
    step = softplus(mixer.dt_proj(low)).detach()
    memory, outputs = hidden.new_zeros(hidden.shape[0], size, state), []
    for t in range(hidden.shape[1]):
        decay = torch.exp(-step[:, t, :, None] * torch.exp(mixer.A_log))
        memory = decay * memory + (step[:, t] * channels[:, t])[..., None] * write[:, t, None]
        outputs.append((memory * read[:, t, None]).sum(-1) + mixer.D * channels[:, t])
    return mixer.out_proj(torch.stack(outputs, 1) * silu(z).detach())


def plain_mamba2(mixer: nn.Module, hidden: Tensor) -> Tensor:
    size, state, groups, heads = mixer.intermediate_size, mixer.ssm_state_size, mixer.n_groups, mixer.num_heads
    z, inputs, step = mixer.in_proj(hidden).split((size, size + 2 * groups * state, heads), -1)
    mixed = gated_convolution(mixer, inputs)
    channels = mixed[..., :size].unflatten(-1, (heads, -1))
    write, read = (
        part.unflatten(-1, (groups, state)).repeat_interleave(heads // groups, 2)
        for part in mixed[..., size:].detach().chunk(2, -1)
    )
    step = softplus(step + mixer.dt_bias).clamp(*mixer.time_step_limit).detach()
    memory, outputs = hidden.new_zeros(hidden.shape[0], heads, size // heads, state), []
    for t in range(hidden.shape[1]):
        decay = torch.exp(-step[:, t] * torch.exp(mixer.A_log))[..., None, None]
        memory = decay * memory + (step[:, t, :, None] * channels[:, t])[..., None] * write[:, t, :, None]
        outputs.append((memory * read[:, t, :, None]).sum(-1) + mixer.D[:, None] * channels[:, t])
    gated = torch.stack(outputs, 1).flatten(2) * silu(z).detach()
    grouped = gated.unflatten(-1, (size // getattr(mixer.norm, "group_size", size), -1))  # older norms have one group
    gain = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).detach()
    return mixer.out_proj((grouped * gain).flatten(2) * mixer.norm.weight)


def gated_convolution(mixer: nn.Module, inputs: Tensor) -> Tensor:
    found = mixer.conv1d(inputs.mT)[..., : inputs.shape[1]].mT
    return torch.sigmoid(found).detach() * found
