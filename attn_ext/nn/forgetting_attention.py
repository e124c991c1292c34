"""Multi-head attention with forget gates: the module of `attn_ext.forgetting_attention`."""

import torch
from torch import Tensor, nn

from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.forgetting_attention import forgetting_attention


class ForgettingAttention(GroupedQueryAttention):
    """Causal self-attention of the Forgetting Transformer: a gate per head, made from the input.

    The parameters are those of `GroupedQueryAttention`, and `forget_proj`, of whose result the
    logistic function is the gate. There is no position embedding; the gates take its place.

    Args:
        embed_dim: width of the inputs and of the result.
        heads: Hq.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the four projections add a bias; that of the gates always does.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers of heads that do not divide.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.ForgettingAttention(embed_dim=64, heads=8)
    >>> layer(torch.randn(3, 100, 64)).shape
    torch.Size([3, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projections and initialize them."""
        super().__init__(
            embed_dim, heads, kv_heads, head_dim=head_dim, bias=bias, device=device, dtype=dtype
        )
        self.forget_proj = nn.Linear(embed_dim, heads, True, device, dtype)
        nn.init.xavier_uniform_(self.forget_proj.weight)
        nn.init.zeros_(self.forget_proj.bias)

    def forward(self, x: Tensor, *, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        """Return the attention of every position of `x` to those before it, projected.

        Args:
            x: `[..., S, embed_dim]`.
            window_size: as in `attn_ext.forgetting_attention`.

        Returns:
            `[..., S, embed_dim]`.
        """
        gates = nn.functional.logsigmoid(self.forget_proj(x).float()).transpose(-2, -1)
        o = forgetting_attention(
            self._split(self.q_proj(x)),
            self._split(self.k_proj(x)),
            self._split(self.v_proj(x)),
            gates,
            enable_gqa=self.heads != self.kv_heads,
            window_size=window_size,
        )
        return self._join(o)
