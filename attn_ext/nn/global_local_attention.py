"""Global and local self-attention: the module of `attn_ext.global_local_attention`."""

from typing import Any

import torch
from torch import Tensor, nn

from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.global_local_attention import global_local_attention


class GlobalLocalAttention(GroupedQueryAttention):
    """Self-attention to a window and to global tokens, which have projections of their own.

    Args:
        embed_dim: width of the inputs and of the result.
        heads: Hq.
        window_size: keys on each side, one number or (left, right); -1: unlimited.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the projections add a bias.
        project: whether a projection of the result follows.
        dropout: share of the attention weights that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers of heads that do not divide.

    Reference:
        Beltagy et al., 2020, arXiv:2004.05150.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.GlobalLocalAttention(embed_dim=64, heads=8, window_size=16)
    >>> layer(torch.randn(3, 100, 64), torch.tensor([0])).shape
    torch.Size([3, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        window_size: int | tuple[int, int],
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        project: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate both sets of projections and initialize them alike."""
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
        self.window_size = window_size
        for name in ("q_proj", "k_proj", "v_proj"):
            local = getattr(self, name)
            own = nn.Linear(local.in_features, local.out_features, bias, device, dtype)
            own.load_state_dict(local.state_dict())
            setattr(self, "global_" + name, own)
        if not project:
            self.out_proj = nn.Identity()

    def forward(self, x: Tensor, global_index: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Return the attention of every position of `x`, projected.

        Args:
            x: `[B, S, embed_dim]`.
            global_index: int64 `[G]` or `[B, G]`: positions of the global tokens, padded with -1.
                `index_of` makes it from a mask.
            key_mask: boolean `[B, S]`, True: a token, False: padding, whose attention is 0.

        Returns:
            `[B, S, embed_dim]`.
        """
        rows = global_index.clamp(min=0).expand(*x.shape[:-2], global_index.shape[-1])
        tokens = torch.take_along_dim(x, rows[..., None], -2)
        o = global_local_attention(
            self._split(self.q_proj(x)),
            self._split(self.k_proj(x)),
            self._split(self.v_proj(x)),
            global_index,
            self.window_size,
            key_mask,
            self._dropout_p,
            enable_gqa=self.heads != self.kv_heads,
            global_query=self._split(self.global_q_proj(tokens)),
            global_key=self._split(self.global_k_proj(x)),
            global_value=self._split(self.global_v_proj(x)),
        )
        o = o.transpose(-3, -2).flatten(-2)
        if key_mask is not None:
            o = o.masked_fill(~key_mask[..., None], 0)
        return self.out_proj(o)

    def extra_repr(self) -> str:
        """What the projections do not show."""
        return super().extra_repr() + f", window_size={self.window_size}"

    @staticmethod
    def index_of(global_mask: Tensor) -> Tensor:
        """Return the positions where a boolean mask `[B, S]` is True, int64 `[B, G]`.

        G is their largest number, which a GPU has to be asked for; the rest is -1.

        >>> import torch, attn_ext.nn
        >>> mask = torch.tensor([[True, False, True], [False, True, False]])
        >>> attn_ext.nn.GlobalLocalAttention.index_of(mask)
        tensor([[ 0,  2],
                [ 1, -1]])
        """
        counts = global_mask.sum(-1, keepdim=True)
        order = global_mask.int().argsort(dim=-1, descending=True, stable=True)
        index = torch.where(torch.arange(order.shape[-1], device=order.device) < counts, order, -1)
        return index[:, : int(counts.max())] if index.numel() else index[:, :0]

    @classmethod
    def from_transformers(cls, module: Any) -> "GlobalLocalAttention":
        """Return a module with the weights of a `LongformerSelfAttention`, which computes the same.

        Its `attention_mask` becomes `index_of(attention_mask > 0)` and `key_mask=attention_mask >=
        0`. The length need not be a multiple of the window.

        Args:
            module: `LongformerSelfAttention`; the projection of the result is not part of it.
        """
        weight = module.query.weight
        ours = cls(
            module.embed_dim,
            module.num_heads,
            module.one_sided_attn_window_size,
            project=False,
            dropout=module.dropout,
            device=weight.device,
            dtype=weight.dtype,
        )
        for ours_name, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            getattr(ours, ours_name).load_state_dict(getattr(module, name).state_dict())
            own = getattr(module, name + "_global")
            getattr(ours, "global_" + ours_name).load_state_dict(own.state_dict())
        return ours
