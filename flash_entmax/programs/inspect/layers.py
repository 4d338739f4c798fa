"""Which layer made a recorded call, and which layers are not shown."""

from collections.abc import Collection, Sequence

from torch import nn

from ...inspection import Recorded
from ..errors import CommandError
from .settings import InspectSettings, check_against, heads_of, numbers_of
from .subject import NO_ATTENTION, NO_INTERFACE, Subject


def choose(settings: InspectSettings, subject: Subject, calls: Sequence[Recorded]) -> tuple[list[Recorded], str]:
    """The calls of the layers asked for, numbered by layer; and in words, which of these layers are not shown."""
    if not calls:
        raise CommandError(f"{settings.model}: {why_no_calls(subject)}")
    by_layer = number_by_layer(subject.model, calls)
    recorded = {call.number for call in calls}
    count = max(subject.layers if by_layer else 0, 1 + max(recorded | subject.softmax_layers))
    check_against(settings, count, max(call.problem.heads for call in calls))
    asked = numbers_of(settings.layers, count)
    for layer, head in heads_of(settings):
        if layer is not None and layer not in recorded:
            raise CommandError(f"--head {layer}:{head}: {not_shown({layer}, subject.softmax_layers)}")
    words = not_shown(asked - recorded, subject.softmax_layers)
    if not asked & recorded:
        raise CommandError(f"--layers {' '.join(settings.layers)}: {words}")
    return [call for call in calls if call.number in asked], words


def number_by_layer(model: nn.Module, calls: Sequence[Recorded]) -> bool:
    """Number every call by the ``layer_idx`` of its module. If two calls would share one, change nothing: False."""
    modules = dict(model.named_modules())
    numbers = [getattr(modules.get(call.name), "layer_idx", None) for call in calls]
    if not all(isinstance(number, int) for number in numbers) or len(set(numbers)) < len(numbers):
        return False
    for call, number in zip(calls, numbers, strict=True):
        call.number = number
    return True


def not_shown(layers: Collection[int], softmax_layers: Collection[int]) -> str:
    """Why these layers are not recorded, in words; empty for no layers."""
    softmax = sorted(layer for layer in layers if layer in softmax_layers)
    others = sorted(layer for layer in layers if layer not in softmax_layers)
    parts = (
        (softmax, "is softmax (alpha 1) and is not shown", "are softmax (alpha 1) and are not shown"),
        (others, "has no entmax attention and is not shown", "have no entmax attention and are not shown"),
    )
    return "; ".join(
        f"layer {found[0]} {one}" if len(found) == 1 else f"layers {' '.join(map(str, found))} {several}"
        for found, one, several in parts
        if found
    )


def state_space_words(calls: Sequence[Recorded]) -> str:
    """Which of these layers are state-space layers, and what their keys are, in words; empty for none."""
    found = [call for call in calls if call.covered < 1]
    if not found:
        return ""
    numbers = " ".join(str(call.number) for call in found)
    layers = f"layers {numbers} are state-space layers"
    if len(found) == 1:
        layers = f"layer {numbers} is a state-space layer"
    share = f"{100 * found[0].covered:g} %"
    return f"{layers}: keys are the fewest tokens that make up {share} of an output, the rest is other"


def why_no_calls(subject: Subject) -> str:
    """Why a model that ran made no call that is recorded, in words."""
    if not subject.has_attention:
        return NO_ATTENTION
    if subject.softmax_layers:
        return f"{not_shown(subject.softmax_layers, subject.softmax_layers)}: give --alpha"
    return NO_INTERFACE
