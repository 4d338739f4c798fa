"""What a caller keeps beside a key cache, so that decoding reads fewer bytes."""

import torch
from torch import Tensor

from .backends import Impl, choose
from .core.call import SUMMARY_BLOCK, RoundedKeys
from .core.checks import check_flag, check_index, check_keys, checked_device, is_int
from .core.modes import as_autocast
from .core.summary_checks import SummarySizes, check_appended, check_room, check_summary_sizes
from .core.tensors import aligned_size, ceil_div
from .operators.eager import is_eager
from .operators.key_summaries import append

APPENDED = 2**22  # numbers that one call of `append` takes in KeySummaries.of


class KeySummaries:
    """The keys of a cache in 8 bits, for ``entmax_attention(key_summary=...)``, appended to as the cache grows.

    A decoding call reads these in place of the keys, half of their bytes, with a bound on what the 8 bits leave out. It
    then reads the few keys that may have support, and computes their scores from the keys themselves. So the result is
    as exact as without. A key of 128 numbers takes 132 bytes more: where it is of 16 bits, it has 256 itself. On
    an H200 a call takes 0.9 of the time without at 32,768 keys, 0.7 at 131,072, and 0.6 with 16 batch rows.

    A key that the call sees and that was not appended is read as it is, which is right and takes longer. A key that
    changed after it was appended gives wrong results: ``append`` it again, at its place. So where the cache takes keys
    back, as those of drafts that were rejected, ``key_lengths`` of ``append`` says where the next ones stand::

        summaries = KeySummaries.of(key[:, :, :length], capacity=key.shape[2])
        for each token:
            key[:, :, length] = new_key
            summaries.append(new_key.unsqueeze(2))
            output = entmax_attention(query, key, value, key_lengths=..., key_summary=summaries)

    All buffers keep their addresses, and with the kernels nothing waits for the device. So a CUDA graph of ``append``
    and attention replays.

    Args:
        batch, key_heads, head_size: those of the keys.
        capacity: the most keys of a batch row.
        dtype: of the keys: float16, bfloat16 or float32.
        device: of the keys.
        skips_blocks: also keep a centre and a radius of each block of 64 keys. Blocks that these prove to have no
            support are not read. This pays where blocks hold similar keys, such as topics. On the trained models that
            were looked at it ruled out at most 0.5 % of the blocks, and costs some microseconds.
        impl: who appends, as for :func:`flash_entmax.entmax_attention`: ``"triton"``, ``"torch"`` or ``"auto"``.

    Attributes:
        lengths: (batch,) int32, how many keys of each batch row stand here; the next ones go behind them.

    Raises:
        TypeError, ValueError: sizes out of range, another dtype, or an ``impl`` that cannot run here.
    """

    def __init__(
        self, batch: int, key_heads: int, capacity: int, head_size: int, *, dtype: torch.dtype,
        device: torch.device | str, skips_blocks: bool = False, impl: Impl = "auto",
    ) -> None:  # fmt: skip
        sizes = SummarySizes(batch, key_heads, capacity, head_size, dtype, checked_device(device))
        check_summary_sizes(sizes)
        check_flag("skips_blocks", skips_blocks)
        with torch.inference_mode(False):  # wherever they are made, they can be written under torch.no_grad() too
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.sizes = sizes._replace(device=self.lengths.device)  # with the number of the device
            self.rounded_keys = empty_summaries(self.sizes, skips_blocks)
        self.backend = choose(dtype, self.lengths.device, impl)

    @classmethod
    def of(
        cls, key: Tensor, *, capacity: int | None = None, skips_blocks: bool = False, impl: Impl = "auto"
    ) -> "KeySummaries":
        """Those of keys (batch, key heads, key length, head size), with room for ``capacity``, by default just these.

        Raises:
            TypeError, ValueError: a key of another kind, or a capacity that is smaller than its length.
        """
        (key,) = as_autocast(key)
        check_keys(key, None)
        batch, key_heads, length, head_size = key.shape
        capacity = length if capacity is None else capacity
        if is_int(capacity) and capacity < length:
            raise ValueError(f"capacity must be at least {length}, the length of the keys, got {capacity}")
        summaries = cls(
            batch, key_heads, capacity, head_size, dtype=key.dtype, device=key.device, skips_blocks=skips_blocks,
            impl=impl,
        )  # fmt: skip
        numbers = batch * key_heads * head_size * SUMMARY_BLOCK
        for part in key.split(max(1, APPENDED // max(1, numbers)) * SUMMARY_BLOCK, 2):
            summaries.append(part)
        return summaries

    def append(self, key: Tensor, key_lengths: Tensor | None = None) -> None:
        """Take these keys for those from position ``lengths`` on.

        What stood there before is replaced. On a GPU, where reading lengths would wait for the device, and in graphs of
        torch.compile, what lies past the capacity is left out; no call may have such keys.

        Args:
            key: (batch, key heads, new keys, head size), of any strides, in the dtype of these summaries.
            key_lengths: (batch,) int32 or int64, in place of ``lengths``: how many keys of each batch row stand before
                these. ``lengths`` then goes on from them.

        Raises:
            TypeError, ValueError: a key of another kind, or more new keys than the capacity; on a CPU, outside of
                graphs of torch.compile, also new keys that end past it.
        """
        (key,) = as_autocast(key)
        check_appended(self.sizes, key, key_lengths)
        standing = self.lengths if key_lengths is None else key_lengths
        if self.sizes.device.type == "cpu" and is_eager((key, standing)):
            check_room(self.sizes, key, standing)
        with torch.no_grad():
            if key_lengths is not None:
                self.lengths.copy_(key_lengths)
            append(self.rounded_keys, key.detach(), self.lengths, self.backend)
            self.lengths.add_(key.shape[2])

    def reset(self) -> None:
        """Forget all keys."""
        self.lengths.zero_()
        self.rounded_keys.unit.fill_(torch.nan)
        self.rounded_keys.error.zero_()
        for bound in (self.rounded_keys.radius, self.rounded_keys.centre_error):
            if bound is not None:
                bound.fill_(torch.inf)

    def reorder(self, indices: Tensor) -> None:
        """Batch row n becomes a copy of batch row indices[n], (batch,) int32 or int64, as a beam search does it.

        Raises:
            TypeError, ValueError: indices of another kind; on a CPU, also of rows that there are not.
        """
        check_index("indices", indices, self.lengths, ((self.sizes.batch,),), "these summaries")
        if indices.device.type == "cpu" and not all(0 <= row < self.sizes.batch for row in indices.tolist()):
            raise ValueError(f"indices must be from 0 to {self.sizes.batch - 1}, got {indices.tolist()}")
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, indices))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All buffers; the batch is the first dimension of each."""
        return [tensor for tensor in (self.lengths, *self.rounded_keys) if tensor is not None]


def empty_summaries(sizes: SummarySizes, skips_blocks: bool) -> RoundedKeys:
    """Room for keys in 8 bits, and for the bounds on their blocks if these are to be skipped."""
    batch, heads, capacity, head_size, dtype, device = sizes
    numbers, width = (batch, heads, ceil_div(capacity, SUMMARY_BLOCK)), aligned_size(head_size)
    bounds: tuple[Tensor, ...] = ()
    if skips_blocks:
        centre = torch.zeros(*numbers, width, dtype=dtype, device=device)
        bounds = centre, *(torch.full(numbers, torch.inf, dtype=torch.float32, device=device) for _ in range(2))
    return RoundedKeys(
        torch.zeros(batch, heads, capacity, width, dtype=torch.int8, device=device),
        torch.full((batch, heads, capacity), torch.nan, dtype=torch.float32, device=device),
        torch.zeros(numbers, dtype=torch.float32, device=device),
        *bounds,
    )
