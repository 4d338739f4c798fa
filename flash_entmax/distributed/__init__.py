"""Attention over sequences that are sharded over the processes of a group of ``torch.distributed``."""

from .attention import context_parallel_attention
from .decode import decode_sharded
from .shards import positions, shard, unshard

__all__ = ["context_parallel_attention", "decode_sharded", "positions", "shard", "unshard"]
