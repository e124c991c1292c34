"""Local multi-head attention: the module of `attn_ext.local_attention`."""

import torch
from torch import Tensor

from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.local_attention import local_attention


class LocalAttention(GroupedQueryAttention):
    """Self-attention in which a position sees a window around it, with its four projections.

    The parameters are those of `GroupedQueryAttention`, so that the weights of any of its kind
    load with `load_state_dict`.

    Args:
        embed_dim: width of the inputs and of the result.
        heads: Hq.
        window_size: keys on each side, one number or (left, right); -1: unlimited.
        dilation: distance of neighboring keys of a window.
        is_causal: no keys on the right.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the projections add a bias.
        dropout: share of the attention weights that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers of heads that do not divide.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.LocalAttention(embed_dim=64, heads=8, window_size=16, dilation=2)
    >>> layer(torch.randn(3, 100, 64)).shape
    torch.Size([3, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        window_size: int | tuple[int, int],
        *,
        dilation: int = 1,
        is_causal: bool = False,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projections and initialize them."""
        super().__init__(
            embed_dim,
            heads,
            kv_heads,
            head_dim=head_dim,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.window_size, self.dilation, self.is_causal = window_size, dilation, is_causal

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return the attention of every position of `x` to its window, projected.

        Args:
            x: `[..., S, embed_dim]`.
            attn_mask: as in `attn_ext.attention`; a padding mask `[B, S]` as `mask[:, None, None]`.
            alibi_slopes: `[Hq]` or `[batch, Hq]`.
            sinks: `[Hq]` or `[batch, Hq]`.

        Returns:
            `[..., S, embed_dim]`.
        """
        o = local_attention(
            self._split(self.q_proj(x)),
            self._split(self.k_proj(x)),
            self._split(self.v_proj(x)),
            self.window_size,
            attn_mask,
            self._dropout_p,
            self.is_causal,
            enable_gqa=self.heads != self.kv_heads,
            dilation=self.dilation,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
        return self._join(o)

    def extra_repr(self) -> str:
        """What the projections do not show."""
        window = f", window_size={self.window_size}, dilation={self.dilation}"
        return super().extra_repr() + window + ", is_causal=True" * self.is_causal
