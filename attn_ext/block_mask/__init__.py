"""Which pairs of queries and keys a sparse attention keeps: `BlockMask`."""

from attn_ext.block_mask.mask import BlockMask

__all__ = ["BlockMask"]
