"""Attention as modules: they hold parameters and call the functions of `attn_ext`, nothing else."""

from attn_ext.nn.attention import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from attn_ext.nn.local_attention import LocalAttention

__all__ = [
    "GroupedQueryAttention",
    "LocalAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
]
