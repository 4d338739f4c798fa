"""Attention over sequences that are sharded over the processes of a group of ``torch.distributed``."""

from .attention import context_parallel_attention
from .decode import decode_sharded
from .layers import ContextParallel
from .shards import positions, shard, unshard

__all__ = ["ContextParallel", "context_parallel_attention", "decode_sharded", "positions", "shard", "unshard"]
