"""Which modules are accepted, and every refusal."""

from torch import Tensor, nn

from ...core.checks import said

# The class of Transformers -> whether it is of the second kind: heads with a scalar decay, and a gated norm.
ACCEPTED = {
    "MambaMixer": False,
    "FalconMambaMixer": False,
    "JambaMambaMixer": False,
    "Mamba2Mixer": True,
    "BambaMixer": True,
    "GraniteMoeHybridMambaLayer": True,
    "NemotronHMamba2Mixer": True,
    "Zamba2MambaMixer": True,
}


def is_accepted(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in ACCEPTED and kind.__module__.startswith("transformers.models.")


def is_second(mixer: nn.Module) -> bool:
    return ACCEPTED[type(mixer).__name__]


def check_mixer(mixer: object) -> None:
    if not isinstance(mixer, nn.Module) or not is_accepted(mixer):
        raise TypeError(
            f"mixer must be a state-space layer of Transformers, one of {', '.join(ACCEPTED)}, got {said(mixer)}"
        )
    name = type(mixer).__name__
    if mixer.activation not in ("silu", "swish"):
        raise ValueError(f"the activation of {name} must be 'silu', whose gate is a sigmoid, got {mixer.activation!r}")
    linear = ("in_proj", "out_proj") if is_second(mixer) else ("in_proj", "x_proj", "dt_proj", "out_proj")
    for part, kind in (*((part, nn.Linear) for part in linear), ("conv1d", nn.Conv1d)):
        if type(getattr(mixer, part)) is not kind:
            raise TypeError(
                f"{part} of {name} must be a torch.nn.{kind.__name__}, whose weight can be read (merge adapters, and "
                f"quantize nothing), got {type(getattr(mixer, part)).__name__}"
            )


def check_hidden(mixer: nn.Module, hidden: object) -> None:
    """Inputs of the layer: (batch, tokens, width)."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a torch.Tensor, got {said(hidden)}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be of a floating-point dtype, got {hidden.dtype}")
    width = mixer.in_proj.in_features
    if hidden.dim() != 3 or hidden.shape[-1] != width or 0 in hidden.shape:
        raise ValueError(
            f"hidden must have shape (batch, tokens, {width}), none of them 0, got {tuple(hidden.shape)}: it is the "
            "input of the mixer, behind the norm of its block"
        )
    if hidden.device != mixer.in_proj.weight.device:
        raise ValueError(f"hidden must be on the mixer's device, {mixer.in_proj.weight.device}, got {hidden.device}")


def check_mask(hidden: Tensor, attention_mask: object) -> None:
    """(batch, tokens): positive, or True, for the tokens that are no padding."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor or None, got {said(attention_mask)}")
    if attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"attention_mask must have shape (batch, tokens) {tuple(hidden.shape[:2])}, as the mixer takes it, got "
            f"{tuple(attention_mask.shape)}"
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask must hold 0 for padding and 1 for tokens, and nothing else")


def check_outputs(tokens: int, outputs: object) -> range:
    """The tokens whose outputs are split; all of them for None."""
    if outputs is None:
        return range(tokens)
    if not isinstance(outputs, range):
        raise TypeError(f"outputs must be a range of output tokens or None, got {said(outputs)}")
    if outputs.step != 1 or not 0 <= outputs.start < outputs.stop <= tokens:
        raise ValueError(f"outputs must be a range within the {tokens} tokens, of step 1 and not empty, got {outputs}")
    return outputs


def check_measure(measure: object, measures: dict) -> None:
    if not isinstance(measure, str):
        raise TypeError(f"measure must be a string, got {said(measure)}")
    if measure not in measures:
        raise ValueError(f"measure must be one of {', '.join(map(repr, measures))}, got {measure!r}")


def check_covered(covered: object) -> None:
    if isinstance(covered, bool) or not isinstance(covered, (int, float)):
        raise TypeError(f"covered must be a number above 0 and at most 1, got {said(covered)}")
    if not 0 < covered <= 1:
        raise ValueError(f"covered must be above 0 and at most 1, got {covered}")
