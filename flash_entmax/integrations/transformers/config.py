"""What the config of a Transformers model says about entmax attention, and how ``config.json`` comes to say it.

``attn_implementation`` and ``entmax_alpha`` make a plain ``from_pretrained(folder)`` build what was saved.
``entmax_attention`` repeats the first. A load that asks for softmax replaces the first only, and finds in the other
that entmax was saved.
"""

from collections.abc import Iterator
from numbers import Real
from typing import Any

from torch import nn

IMPLEMENTATIONS = {"entmax15": 1.5, "sparsemax": 2.0, "entmax": None}
HELD_BY = "held_by"  # key of config.entmax_alpha: the class of the module that holds alpha as a weight


def implementation_of(module: nn.Module) -> str | None:
    """The name in the module's config, None without one. All modules that call an attention function have a config."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def declared_attention(config: Any) -> str | dict | None:
    """The value of ``attn_implementation=`` that builds the entmax attention of this config; None if it has none.

    One name if all parts have the same, else a dict by part, as Transformers takes it.
    """
    own, parts = config._attn_implementation, dict(_parts_of(config))
    by_part = {name: declared_attention(part) for name, part in parts.items()}
    if own in IMPLEMENTATIONS and all(
        by_part[name] == own or part._attn_implementation is None for name, part in parts.items()
    ):
        return own
    named = {name: attention for name, attention in by_part.items() if attention is not None}
    return ({"": own} if own in IMPLEMENTATIONS else {}) | named or None


def _parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "sub_configs"):
            yield name, part


def takes_alpha(config: Any) -> bool:
    """Whether the config, or a part of it, has "entmax", whose alpha is set by the user."""
    return config._attn_implementation == "entmax" or any(takes_alpha(part) for _, part in _parts_of(config))


def hand_down(config: Any) -> None:
    """Give the parts that have "entmax" and no alpha the number of this config."""
    alpha = getattr(config, "entmax_alpha", None)
    for _, part in _parts_of(config):
        if isinstance(alpha, Real) and takes_alpha(part) and getattr(part, "entmax_alpha", None) is None:
            part.entmax_alpha = alpha
        hand_down(part)


def is_held(alpha: object) -> bool:
    """Whether this value of config.entmax_alpha says that alpha is a tensor among the weights."""
    return isinstance(alpha, dict) and HELD_BY in alpha


def drop_held(config: Any) -> bool:
    """Remove from the config and its parts the declaration that alpha is a weight; True if there was one."""
    dropped = [drop_held(part) for _, part in _parts_of(config)]
    if is_held(getattr(config, "entmax_alpha", None)):
        config.entmax_alpha = None
        dropped.append(True)
    return any(dropped)


def declare(config: Any) -> None:
    """Let the config and its parts be saved with the attention that they have when they are saved."""
    for _, part in _parts_of(config):
        declare(part)
    config.attn_implementation = Declaration(config, vars(config).get("attn_implementation"))
    if declared_attention(config) is not None:
        config.entmax_attention = Declaration(config)


def is_undeclared(config: Any) -> bool:
    """Whether a config of Transformers belongs to a model that was built before `register`, without `declare`."""
    return hasattr(config, "sub_configs") and not isinstance(getattr(config, "attn_implementation", None), Declaration)


class Declaration:
    """An attribute of a config that is saved as the `declared_attention` that the config has then.

    Transformers saves a deep copy of the attributes, without the config itself; the copy of this one is the text to be
    written. In a copy of the whole config, it is a declaration of the copied config.
    """

    def __init__(self, config: Any, otherwise: object = None) -> None:
        kept = isinstance(otherwise, Declaration)
        self.config, self.otherwise = config, otherwise.otherwise if kept else _unless_entmax(otherwise)

    def __deepcopy__(self, memo: dict) -> "Declaration | str | dict | None":
        copied = memo.get(id(self.config))
        return self.written() if copied is None else Declaration(copied, self.otherwise)

    def written(self) -> "str | dict | None":
        return declared_attention(self.config) or self.otherwise

    def __eq__(self, other: object) -> bool:
        return self.written() == (other.written() if isinstance(other, Declaration) else other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.written())


def _unless_entmax(attention: object) -> object:
    """The value of another library stays. A name of ours is dropped: it is derived from the config."""
    return None if isinstance(attention, dict) or attention in IMPLEMENTATIONS else attention


def saved_attention(config: Any) -> tuple[str, float | str | None] | None:
    """The name of the attention that a loaded config declares, and its alpha as a number or in words, None if not set.

    None if the config declares no entmax attention. Of several parts, the first that has one counts.
    """
    name = config._attn_implementation
    if name not in IMPLEMENTATIONS:
        return next((found for _, part in _parts_of(config) if (found := saved_attention(part))), None)
    alpha = IMPLEMENTATIONS[name] or getattr(config, "entmax_alpha", None)
    if is_held(alpha):
        count = len(alpha["initial"]) if isinstance(alpha["initial"], list) else 1
        whose = f"one for each of {count} heads" if count > 1 else "one for all heads"
        return name, f"{'learned' if alpha['learned'] else 'a tensor'}, {whose}, among the weights"
    if isinstance(alpha, dict) and alpha:
        return name, f"by layer, {min(alpha.values()):g} to {max(alpha.values()):g}"
    if alpha is not None and (not isinstance(alpha, Real) or isinstance(alpha, bool)):
        raise TypeError(f"config.entmax_alpha must be a number, or a dict of numbers by layer, got {alpha!r}")
    return name, None if alpha is None else float(alpha)
