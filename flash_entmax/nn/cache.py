"""The keys and values of the tokens that an attention layer has read, for generation."""

import torch
from torch import Tensor

from ..core.checks import is_int, typed


class KeyValueCache:
    """Room for the keys and values of ``capacity`` tokens of one attention layer: ``EntmaxAttention.new_cache``.

    Attributes:
        keys, values: (batch, key heads, capacity, head size), of which the first ``length`` tokens are filled.
        length: how many tokens each batch row has, a number on the host. Set it lower to take tokens back, such as
            drafts that were rejected; TypeError or ValueError for what is no integer from 0 to ``capacity``.
    """

    def __init__(
        self, batch: int, key_heads: int, capacity: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = batch, key_heads, capacity, head_dim
        with torch.inference_mode(False):  # wherever it is made, it can be written under torch.no_grad() too
            self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if not is_int(length):
            raise TypeError(f"length must be an integer, got {typed(length)}")
        if not 0 <= length <= self.capacity:
            raise ValueError(f"length must be from 0 to the capacity of the cache, {self.capacity}, got {length}")
        self._length = length

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens, (batch, key heads, tokens, head size) each.

        Returns views of the cache: the keys and the values of all tokens so far.

        Raises:
            TypeError, ValueError: as `write`.
        """
        keys, values = self.write(key, value)
        self.length = keys.shape[2]
        return keys, values

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, but the next write goes to the same place: ``length`` stays as it is.

        Raises:
            TypeError: no tensors, or another dtype.
            ValueError: another shape or device, more tokens than there is room for, or a gradient that is asked for.
                Nothing is written.
        """
        for name, tensor, held in (("key", key, self.keys), ("value", value, self.values)):
            check_fits(name, tensor, held)
        end = self.length + key.shape[2]
        if key.shape[2] != value.shape[2]:
            raise ValueError(f"key and value must have the same length, got {key.shape[2]} and {value.shape[2]}")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("a cache holds no gradients: write under torch.no_grad(), got a key or value with one")
        if end > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens: it holds {self.length}, and {key.shape[2]} more were "
                "given. Make a larger one, or call reset()"
            )
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        return self.keys[:, :, :end], self.values[:, :, :end]


def check_fits(name: str, tensor: Tensor, held: Tensor) -> None:
    """A tensor like those that the cache holds, of any length."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    (batch, heads, _, size), shape = held.shape, tuple(tensor.shape)
    if len(shape) != 4 or (*shape[:2], shape[3]) != (batch, heads, size):
        raise ValueError(f"{name} must fit the cache, of shape ({batch}, {heads}, tokens, {size}), got {shape}")
    if tensor.dtype != held.dtype:
        raise TypeError(f"{name} must have the dtype of the cache, {held.dtype}, got {tensor.dtype}")
    if tensor.device != held.device:
        raise ValueError(f"{name} must be on the device of the cache, {held.device}, got {tensor.device}")
