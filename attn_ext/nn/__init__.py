"""Attention as modules: they hold parameters and call the functions of `attn_ext`, nothing else."""

from attn_ext.nn.attention import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention

__all__ = ["GroupedQueryAttention", "MultiHeadAttention", "MultiQueryAttention"]
