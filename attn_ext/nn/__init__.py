"""Attention as modules: they hold parameters and call the functions of `attn_ext`, nothing else."""

from attn_ext.nn.adaptive_span import AdaptiveSpanAttention
from attn_ext.nn.attention import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from attn_ext.nn.attention_pool import AttentionPool, HierarchicalAttentionPool
from attn_ext.nn.bigbird_attention import BigBirdAttention
from attn_ext.nn.forgetting_attention import ForgettingAttention
from attn_ext.nn.global_local_attention import GlobalLocalAttention
from attn_ext.nn.latent_attention import LatentAttention, PerceiverAttention
from attn_ext.nn.local_attention import LocalAttention
from attn_ext.nn.persistent_memory_attention import PersistentMemoryAttention
from attn_ext.nn.position import LearnedPosition, RelativePositionBias, SinusoidalPosition
from attn_ext.nn.shifted_window_attention import ShiftedWindowAttention
from attn_ext.nn.space_time import SpaceTimeLayer

__all__ = [
    "AdaptiveSpanAttention",
    "AttentionPool",
    "BigBirdAttention",
    "ForgettingAttention",
    "GlobalLocalAttention",
    "GroupedQueryAttention",
    "HierarchicalAttentionPool",
    "LatentAttention",
    "LearnedPosition",
    "LocalAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "PerceiverAttention",
    "PersistentMemoryAttention",
    "RelativePositionBias",
    "ShiftedWindowAttention",
    "SinusoidalPosition",
    "SpaceTimeLayer",
]
