"""Every attention variant: one file each with its maths, reference, function and record."""

from attn_ext.variants import (
    adaptive_span_attention,
    attention,
    attention_pool,
    block_sparse_attention,
    dual_chunk_attention,
    forgetting_attention,
    global_local_attention,
    latent_attention,
    local_attention,
    merge_states,
    neighborhood_attention,
    persistent_memory_attention,
    relative_bias_attention,
    shifted_sparse_attention,
    shifted_window_attention,
    space_time_attention,
    topk_attention,
    varlen_attention,
)
from attn_ext.variants.record import Variant

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        attention.VARIANT,
        varlen_attention.VARIANT,
        block_sparse_attention.VARIANT,
        topk_attention.VARIANT,
        local_attention.VARIANT,
        neighborhood_attention.VARIANT,
        global_local_attention.VARIANT,
        shifted_sparse_attention.VARIANT,
        shifted_window_attention.VARIANT,
        dual_chunk_attention.VARIANT,
        adaptive_span_attention.VARIANT,
        forgetting_attention.VARIANT,
        relative_bias_attention.VARIANT,
        persistent_memory_attention.VARIANT,
        latent_attention.VARIANT,
        space_time_attention.VARIANT,
        attention_pool.VARIANT,
        merge_states.VARIANT,
    )
}
