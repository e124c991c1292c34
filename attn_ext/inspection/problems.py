"""Calls that launch the kernels one wants to look at."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_ext import masks
from attn_ext.ops.attention import default_scale
from attn_ext.ops.attention_stats import attention_stats
from attn_ext.variants.attention import attention
from attn_ext.variants.block_sparse_attention import block_sparse_attention
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.topk_attention import topk_attention

DENSE_FAMILIES = ("attention_fwd", "attention_bwd", "attention_stats")
LISTED_FAMILIES = ("topk_attention_fwd", "topk_attention_bwd")
WIDE_FAMILIES = ("attention_fwd", "attention_bwd")
FAMILIES = (*DENSE_FAMILIES, *LISTED_FAMILIES, "merge_states")
# What each score policy is asked for with.
SCORES = {
    "window": {}, "general": {"softcap": 30.0},
    "blocks": {}, "general_blocks": {"softcap": 30.0},
}  # fmt: skip
UNDER_BLOCK_MASKS = ("blocks", "general_blocks")
LISTED = 64  # keys per query


@dataclass(frozen=True)
class Problem:
    """One head of self attention, with the score policy that a kernel is compiled for."""

    family: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    score: str = "window"
    seq: int = 256
    is_causal: bool = False

    @property
    def causal(self) -> bool:
        """Whether a query sees the keys up to its own place only."""
        return self.is_causal or self.score in UNDER_BLOCK_MASKS

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it attends to."""
        if self.family in LISTED_FAMILIES:
            return self.seq * LISTED
        return self.seq * (self.seq + 1) // 2 if self.causal else self.seq**2

    def reason(self) -> str | None:
        """Return None if there are such kernels, else why there are none."""
        if self.family == "attention_stats" and self.score in UNDER_BLOCK_MASKS:
            return f"attention_stats has no kernels of policy {self.score}"
        wide = self.family in WIDE_FAMILIES and self.dtype != torch.float32
        if self.head_dim > 256 and not wide:
            return f"{self.family} has no {self.dtype} kernels beyond head dimensions of 256"
        if self.family not in DENSE_FAMILIES and self.score != "window":
            return f"{self.family} has no score policies"
        return None

    def prepare(self) -> Callable[[], object]:
        """Return the call. Run it where the kernels are to run: its inputs are ready."""
        random = torch.Generator().manual_seed(0)
        shape = (1, 1, self.seq, self.head_dim)
        q, k, v, d_o = (torch.randn(shape, generator=random).to(self.dtype) for _ in range(4))
        if self.family == "merge_states":
            lse = torch.zeros(shape[:-1])
            return lambda: merge_states(q, lse, k, lse)
        if self.family == "attention_stats":
            _, lse = attention(
                q, k, v, return_lse=True, is_causal=self.causal, **SCORES[self.score]
            )
            options = {"window": (-1, 0 if self.causal else -1), "bottom_right": False}
            options |= {"softcap": SCORES[self.score].get("softcap", 0.0)}
            scale = default_scale(q)
            return lambda: attention_stats(q, k, lse, None, None, scale=scale, **options)
        if not self.family.endswith("bwd"):
            return lambda: self._forward(q, k, v)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        o = self._forward(*inputs)
        return lambda: torch.autograd.grad(o, inputs, d_o, retain_graph=True)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.family in LISTED_FAMILIES:
            lists = torch.arange(LISTED) * (self.seq // LISTED)
            return topk_attention(q, k, v, lists.expand(1, 1, self.seq, LISTED))
        if self.score in UNDER_BLOCK_MASKS:
            mask = masks.causal(self.seq, self.seq)
            return block_sparse_attention(q, k, v, mask, **SCORES[self.score])
        return attention(q, k, v, is_causal=self.is_causal, **SCORES[self.score])
