"""Builders of block masks: which pairs (i, j) the published sparse attentions keep.

Each returns a `BlockMask`; they combine with `&` and `|`:

>>> from attn_ext import masks
>>> tail = masks.window(512, left=64, right=0) | masks.global_tokens(512, [0])
>>> print((tail & masks.causal(512)).picture())
▒···
▒▒··
▒▒▒·
▒·▒▒
"""

from attn_ext.masks.band import causal, dilated, window
from attn_ext.masks.bigbird import bigbird
from attn_ext.masks.factorized import fixed, strided
from attn_ext.masks.segments import document, prefix
from attn_ext.masks.sets import keys, lsh
from attn_ext.masks.tokens import global_tokens, longformer

__all__ = [
    "bigbird", "causal", "dilated", "document", "fixed", "global_tokens", "keys", "longformer",
    "lsh", "prefix", "strided", "window",
]  # fmt: skip
