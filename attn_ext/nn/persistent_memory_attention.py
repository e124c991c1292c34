"""Self-attention with a persistent memory: the module of `attn_ext.persistent_memory_attention`."""

import torch
from torch import Tensor, nn

from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.persistent_memory_attention import persistent_memory_attention


class PersistentMemoryAttention(GroupedQueryAttention):
    """Attention that also reads N learned keys and values per head, with its four projections.

    Enough of them take the place of a feed-forward layer.

    Args:
        embed_dim: width of the inputs and of the result.
        heads: Hq.
        memory: N.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the projections add a bias.
        dropout: share of the attention weights that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers of heads that do not divide.

    Reference:
        Sukhbaatar et al., 2019, arXiv:1907.01470.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.PersistentMemoryAttention(embed_dim=64, heads=8, memory=32)
    >>> layer(torch.randn(3, 100, 64), is_causal=True).shape
    torch.Size([3, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        memory: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate projections and memory and initialize them."""
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
        shape = (self.kv_heads, memory, self.head_dim)
        # unit variance, that of projected inputs of unit variance
        self.memory_key = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        self.memory_value = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Return the attention of every position of `x` to the others and the memory, projected.

        Args:
            x: `[..., S, embed_dim]`.
            attn_mask: as in `attn_ext.attention`; a padding mask `[B, S]` as `mask[:, None, None]`.
            is_causal: as in `attn_ext.attention`, like everything that follows.
            window_size: (left, right), inclusive; -1: unlimited.
            alibi_slopes: `[Hq]` or `[batch, Hq]`.

        Returns:
            `[..., S, embed_dim]`.
        """
        o = persistent_memory_attention(
            self._split(self.q_proj(x)),
            self._split(self.k_proj(x)),
            self._split(self.v_proj(x)),
            self.memory_key,
            self.memory_value,
            attn_mask,
            self._dropout_p,
            is_causal,
            enable_gqa=self.heads != self.kv_heads,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
        )
        return self._join(o)
