"""Typed wrappers of the compiled ops, one file per kernel family: defaults, fakes, autograd."""

from attn_ext.ops import (  # noqa: F401  importing them registers with torch
    attention_autocast,
    attention_autograd,
    attention_double_backward,
    attention_fakes,
    block_sparse_attention,
    forgetting_attention,
    merge_states,
    topk_attention,
)
