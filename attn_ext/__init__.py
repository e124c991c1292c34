"""Hand-written attention kernels for CPU and CUDA behind one PyTorch extension.

>>> import torch, attn_ext
>>> q, k, v = torch.randn(3, 1, 8, 128, 64)
>>> attn_ext.attention(q, k, v, is_causal=True).shape
torch.Size([1, 8, 128, 64])
"""

import torch as _torch  # noqa: F401  first: _C links against its libraries

from attn_ext import _C as _C  # registers torch.ops.attn_ext
from attn_ext import masks as masks
from attn_ext.block_mask import BlockMask
from attn_ext.ops.attention_stats import AttentionStats
from attn_ext.support import why_not
from attn_ext.variants import VARIANTS
from attn_ext.variants.adaptive_span_attention import adaptive_span_attention
from attn_ext.variants.attention import attention
from attn_ext.variants.attention_pool import attention_pool
from attn_ext.variants.block_sparse_attention import block_sparse_attention
from attn_ext.variants.dual_chunk_attention import dual_chunk_attention
from attn_ext.variants.forgetting_attention import forgetting_attention
from attn_ext.variants.global_local_attention import global_local_attention
from attn_ext.variants.latent_attention import latent_attention
from attn_ext.variants.local_attention import local_attention
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.neighborhood_attention import neighborhood_attention
from attn_ext.variants.persistent_memory_attention import persistent_memory_attention
from attn_ext.variants.relative_bias_attention import relative_bias_attention
from attn_ext.variants.shifted_sparse_attention import shifted_sparse_attention
from attn_ext.variants.shifted_window_attention import shifted_window_attention
from attn_ext.variants.space_time_attention import space_time_attention
from attn_ext.variants.topk_attention import topk_attention
from attn_ext.variants.varlen_attention import varlen_attention

__version__ = "0.1.0"
__all__ = [
    "VARIANTS",
    "AttentionStats",
    "BlockMask",
    "adaptive_span_attention",
    "attention",
    "attention_pool",
    "block_sparse_attention",
    "dual_chunk_attention",
    "forgetting_attention",
    "global_local_attention",
    "latent_attention",
    "local_attention",
    "masks",
    "merge_states",
    "neighborhood_attention",
    "persistent_memory_attention",
    "relative_bias_attention",
    "shifted_sparse_attention",
    "shifted_window_attention",
    "space_time_attention",
    "topk_attention",
    "varlen_attention",
    "why_not",
]
