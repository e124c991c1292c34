"""Multi-head, grouped-query and multi-query attention: one module, any number of key heads.

Y = concat_h(attention(X Wq_h, Z Wk_g, Z' Wv_g)) Wo with g = h // (heads // kv_heads).
"""

import torch
from torch import Tensor, nn

from attn_ext.variants.attention import attention


class GroupedQueryAttention(nn.Module):
    r"""Attention whose query heads share key and value heads in groups, with its four projections.

    .. math::
        Y = \mathrm{concat}_h\big(\mathrm{attention}(X W^q_h, Z W^k_g, Z' W^v_g)\big)\, W^o,
        \qquad g = \lfloor h / (H_q / H_{kv}) \rfloor

    for self-attention Z = Z' = X. Batch dimensions come first, always: `[..., S, embed_dim]`, which
    in `torch.nn.MultiheadAttention` is `batch_first=True`.

    Args:
        embed_dim: width of the queries and of the result; a multiple of `heads`.
        heads: Hq.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        kdim: width of the tensors that keys are made of; `None`: `embed_dim`.
        vdim: width of the tensors that values are made of; `None`: `kdim`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the projections add a bias.
        dropout: share of the attention weights that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: `embed_dim`, `heads` and `kv_heads` that do not divide.

    Note:
        2 · S · embed_dim · D · (2 Hq + 2 Hkv) operations for the projections, besides
        `attn_ext.attention`. A key and value cache holds 2 · Hkv · D numbers per token.

    Reference:
        Ainslie et al., 2023, arXiv:2305.13245; Shazeer, 2019, arXiv:1911.02150 (one key head);
        Vaswani et al., 2017, arXiv:1706.03762 (a key head per query head).

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.GroupedQueryAttention(embed_dim=64, heads=8, kv_heads=2, kdim=48)
    >>> x, image = torch.randn(3, 10, 64), torch.randn(3, 25, 48)
    >>> layer(x, image).shape
    torch.Size([3, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        kv_heads: int | None,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projections and initialize them."""
        super().__init__()
        name = type(self).__name__
        kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and embed_dim % heads:
            raise ValueError(
                f"{name}: expected embed_dim a multiple of heads; got {embed_dim} and {heads}. "
                "Or pass head_dim."
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"{name}: expected heads a multiple of kv_heads; got {heads} and {kv_heads}."
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"{name}: expected dropout of 0 to 1; got {dropout}.")
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.head_dim = embed_dim // heads if head_dim is None else head_dim
        kdim = embed_dim if kdim is None else kdim
        vdim = kdim if vdim is None else vdim
        q_width, kv_width = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, q_width, bias, device, dtype)
        self.k_proj = nn.Linear(kdim, kv_width, bias, device, dtype)
        self.v_proj = nn.Linear(vdim, kv_width, bias, device, dtype)
        self.out_proj = nn.Linear(q_width, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier-uniform, and set the biases to 0."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        causal_align: str = "top_left",
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the attention of `query` over `key`, projected.

        Args:
            query: `[..., Sq, embed_dim]`.
            key: `[..., Sk, kdim]`; `None`: `query` (self-attention).
            value: `[..., Sk, vdim]`; `None`: `key`.
            attn_mask: broadcasts to `[..., Hq, Sq, Sk]`. Boolean: True = attend, the opposite of
                `torch.nn.MultiheadAttention`. Pass a padding mask `[B, Sk]` as
                `mask[:, None, None]`.
            is_causal: as in `attn_ext.attention`, like everything that follows.
            scale: `None` means 1/sqrt(D).
            window_size: (left, right), inclusive; -1: unlimited.
            softcap: 0 means none.
            alibi_slopes: `[Hq]` or `[batch, Hq]`.
            sinks: `[Hq]` or `[batch, Hq]`.
            causal_align: `"top_left"` or `"bottom_right"`.
            return_lse: also return the log-sum-exp.

        Returns:
            `[..., Sq, embed_dim]`, and with `return_lse` lse, `[..., Hq, Sq]`. A query that keeps
            no key yields the bias of `out_proj`, and lse -inf.

        Raises:
            ValueError: `value` without `key`; what `attn_ext.attention` raises.
        """
        if key is None and value is not None:
            raise ValueError(f"{type(self).__name__}: expected key with value; got value alone.")
        key = query if key is None else key
        value = key if value is None else value
        result = attention(
            self._split(self.q_proj(query)),
            self._split(self.k_proj(key)),
            self._split(self.v_proj(value)),
            attn_mask,
            self._dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=self.heads != self.kv_heads,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            causal_align=causal_align,
            return_lse=return_lse,
        )
        o, lse = result if return_lse else (result, None)
        y = self._join(o)
        return (y, lse) if return_lse else y

    def extra_repr(self) -> str:
        """The numbers that the projections do not show."""
        text = f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return text + f", dropout={self.dropout}" * (self.dropout > 0)

    @classmethod
    def from_mha(cls, mha: "GroupedQueryAttention", kv_heads: int) -> "GroupedQueryAttention":
        """Return `mha` with fewer key heads, each the mean of those whose queries it serves.

        The start for uptraining, as in Ainslie et al., 2023, arXiv:2305.13245, section 2.1. Queries
        and output are as before.

        Args:
            mha: any module of this file.
            kv_heads: a divisor of `mha.kv_heads`; 1: multi-query.

        Raises:
            ValueError: `kv_heads` is no divisor.

        >>> import attn_ext.nn
        >>> mha = attn_ext.nn.MultiHeadAttention(embed_dim=64, heads=8)
        >>> attn_ext.nn.GroupedQueryAttention.from_mha(mha, kv_heads=2).k_proj
        Linear(in_features=64, out_features=16, bias=True)
        """
        if kv_heads < 1 or mha.kv_heads % kv_heads:
            raise ValueError(
                f"from_mha: expected kv_heads a divisor of {mha.kv_heads}; got {kv_heads}."
            )
        module = GroupedQueryAttention(
            mha.q_proj.in_features,
            mha.heads,
            kv_heads,
            kdim=mha.k_proj.in_features,
            vdim=mha.v_proj.in_features,
            head_dim=mha.head_dim,
            bias=mha.q_proj.bias is not None,
            dropout=mha.dropout,
            device=mha.q_proj.weight.device,
            dtype=mha.q_proj.weight.dtype,
        )
        state = mha.state_dict()
        for name, tensor in state.items():
            if name.startswith(("k_proj", "v_proj")):
                groups = tensor.unflatten(0, (kv_heads, -1, mha.head_dim))
                state[name] = groups.mean(1).flatten(0, 1)
        module.load_state_dict(state)
        return module

    def _split(self, x: Tensor) -> Tensor:
        """[..., S, H D] as [..., H, S, D], without a copy."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def _join(self, o: Tensor) -> Tensor:
        """[..., H, S, D] as [..., S, H D], projected."""
        return self.out_proj(o.transpose(-3, -2).flatten(-2))

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


class MultiHeadAttention(GroupedQueryAttention):
    """Attention with a key and value head per query head: kv_heads = heads.

    >>> import torch, attn_ext.nn
    >>> theirs = torch.nn.MultiheadAttention(64, 8, batch_first=True).eval()
    >>> ours = attn_ext.nn.MultiHeadAttention.from_torch(theirs)
    >>> x = torch.randn(3, 10, 64)
    >>> torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-5)
    True
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As in `GroupedQueryAttention`."""
        super().__init__(
            embed_dim, heads, heads,
            kdim=kdim, vdim=vdim, head_dim=head_dim, bias=bias, dropout=dropout,
            device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_torch(cls, mha: nn.MultiheadAttention) -> "MultiHeadAttention":
        """Return a module with the weights and the dropout of `mha`, which computes the same.

        Two conventions differ: inputs here are batch-first whatever `mha.batch_first` says; a
        boolean mask is True where `mha`'s is False (a float mask is the same).

        Args:
            mha: with packed or separate projections, any `kdim` and `vdim`.

        Raises:
            ValueError: `mha` adds keys of its own (`add_bias_kv`, `add_zero_attn`).
        """
        if mha.bias_k is not None or mha.add_zero_attn:
            option = "add_zero_attn" if mha.add_zero_attn else "add_bias_kv"
            raise ValueError(
                f"from_torch: expected a module that attends only to its keys; got {option}=True. "
                "Append that key and value to the inputs instead."
            )
        bias = mha.in_proj_bias is not None
        state = mha.out_proj.state_dict(prefix="out_proj.")
        if mha.in_proj_weight is None:
            weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        else:
            weights = mha.in_proj_weight.chunk(3)
        state |= zip(("q_proj.weight", "k_proj.weight", "v_proj.weight"), weights, strict=True)
        if bias:
            biases = mha.in_proj_bias.chunk(3)
            state |= zip(("q_proj.bias", "k_proj.bias", "v_proj.bias"), biases, strict=True)
        module = cls(
            mha.embed_dim,
            mha.num_heads,
            kdim=mha.kdim,
            vdim=mha.vdim,
            bias=bias,
            dropout=mha.dropout,
            device=weights[0].device,
            dtype=weights[0].dtype,
        )
        module.load_state_dict(state)
        return module


class MultiQueryAttention(GroupedQueryAttention):
    """Attention whose query heads share one key and value head: kv_heads = 1.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.MultiQueryAttention(embed_dim=64, heads=8)
    >>> layer(torch.randn(3, 10, 64), is_causal=True).shape
    torch.Size([3, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As in `GroupedQueryAttention`."""
        super().__init__(
            embed_dim, heads, 1,
            kdim=kdim, vdim=vdim, head_dim=head_dim, bias=bias, dropout=dropout,
            device=device, dtype=dtype,
        )  # fmt: skip
