"""Attention whose heads learn how far back they look, with its four projections."""

import math

import torch
from torch import Tensor, nn

from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.adaptive_span_attention import adaptive_span_attention


class AdaptiveSpanAttention(GroupedQueryAttention):
    r"""Self-attention within spans that are learned with the weights.

    .. math::
        Y = \mathrm{concat}_h\big(
            \mathrm{adaptive\_span\_attention}(X W^q_h, X W^k_g, X W^v_g, z_h)\big)\, W^o

    `span_share` holds z / max_span per head. Add a multiple of `mean_span()` to the loss, so that
    heads look no further than they need.

    Args:
        embed_dim: width of the input and of the result; a multiple of `heads`.
        heads: Hq.
        max_span: the largest span, in positions.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        ramp: over how many positions the weights fade out.
        initial_share: of `max_span` that every head starts with.
        bias: whether the projections add a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: `embed_dim`, `heads` and `kv_heads` that do not divide.

    Reference:
        Sukhbaatar et al., 2019, arXiv:1905.07799.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.AdaptiveSpanAttention(64, heads=4, max_span=1024)
    >>> layer(torch.randn(2, 100, 64)).shape, layer.mean_span().item()
    (torch.Size([2, 100, 64]), 0.0)
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        max_span: int,
        *,
        kv_heads: int | None = None,
        ramp: int = 32,
        initial_share: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projections and the spans, and initialize them."""
        super().__init__(embed_dim, heads, kv_heads, bias=bias, device=device, dtype=dtype)
        self.max_span, self.ramp = max_span, ramp
        share = torch.full((heads,), initial_share, device=device, dtype=dtype)
        self.span_share = nn.Parameter(share)

    def span(self) -> Tensor:
        """Return z, the span of every head in positions, `[heads]`."""
        return self.span_share.clamp(0, 1) * self.max_span

    def mean_span(self) -> Tensor:
        """Return the mean of the spans, differentiable: what the paper penalizes."""
        return self.span().mean()

    def largest_span(self) -> int:
        """Return the largest span there is, rounded up; waits for the device."""
        return math.ceil(self.span().max().item())

    def forward(self, x: Tensor, *, is_causal: bool = True, max_span: int | None = None) -> Tensor:
        """Return what each position attends to within the spans, projected.

        Args:
            x: `[..., S, embed_dim]`.
            is_causal: query i keeps keys j <= i.
            max_span: pass `largest_span()` to compute no more than is needed; `None`: the largest
                possible one.

        Returns:
            `[..., S, embed_dim]`.
        """
        o = adaptive_span_attention(
            *(self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj)),
            self.span(),
            self.max_span if max_span is None else max_span,
            self.ramp,
            is_causal=is_causal,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self._join(o)

    def extra_repr(self) -> str:
        """The numbers that the projections do not show."""
        return f"{super().extra_repr()}, max_span={self.max_span}, ramp={self.ramp}"
