"""Shifted-window attention of images, with its projections and its table of relative positions."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attn_ext.variants.shifted_window_attention import shifted_window_attention

if TYPE_CHECKING:
    from transformers.models.swin.modeling_swin import SwinLayer


class ShiftedWindowAttention(nn.Module):
    r"""Attention within the windows of an image, whose borders every other layer shifts.

    .. math::
        Y = \mathrm{concat}_h\big(
            \mathrm{shifted\_window\_attention}(X W^q_h, X W^k_h, X W^v_h, T)\big)\, W^o

    Args:
        embed_dim: width of the pixels; a multiple of `heads`.
        heads: H.
        window_size: (height, width) of a window.
        shift: how far down and to the right the windows' borders move.
        bias: whether the projections of queries, keys and values add a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: `embed_dim` and `heads` that do not divide.

    Note:
        2 · S · embed_dim² · 4 operations for the projections of S pixels, besides
        `attn_ext.shifted_window_attention`.

    Reference:
        Liu et al., 2021, arXiv:2103.14030.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.ShiftedWindowAttention(32, 4, window_size=(7, 7), shift=(3, 3))
    >>> layer(torch.randn(2, 20, 30, 32)).shape
    torch.Size([2, 20, 30, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        window_size: tuple[int, int],
        shift: tuple[int, int] = (0, 0),
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projections and the table, and initialize them."""
        super().__init__()
        if heads < 1 or embed_dim % heads:
            raise ValueError(
                "ShiftedWindowAttention: expected embed_dim a multiple of heads; "
                f"got {embed_dim} and {heads}."
            )
        self.heads, self.window_size, self.shift = heads, window_size, shift
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(embed_dim, embed_dim, bias, device, dtype) for _ in range(3)
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, True, device, dtype)
        entries = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.bias_table = nn.Parameter(torch.empty(entries, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and table anew, normal with a deviation of 0.02, and set the biases to 0."""
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each pixel attends to in its window, projected.

        Args:
            x: `[..., height, width, embed_dim]`. An image that the windows do not divide is
                extended to the right and down by zeros, which are attended to as pixels, as Swin
                does. One no larger than a window in some direction is not shifted.

        Returns:
            `[..., height, width, embed_dim]`.
        """
        height, width = x.shape[-3:-1]
        down, right = (-n % size for n, size in zip((height, width), self.window_size, strict=True))
        if down or right:
            x = nn.functional.pad(x, (0, 0, 0, right, 0, down))
        one_window = height <= self.window_size[0] or width <= self.window_size[1]
        o = shifted_window_attention(
            *(self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj)),
            self.window_size,
            (0, 0) if one_window else self.shift,
            self.bias_table,
        )
        return self.out_proj(o.movedim(-4, -2).flatten(-2)[..., :height, :width, :])

    def extra_repr(self) -> str:
        """The numbers that the projections do not show."""
        return f"heads={self.heads}, window_size={self.window_size}, shift={self.shift}"

    @classmethod
    def from_transformers(cls, layer: "SwinLayer") -> "ShiftedWindowAttention":
        """Return a module with the weights of `layer.attention`, its window and its shift.

        It computes what stands between the two layer norms of `layer`, without the residual and
        without dropout: `x + ours(layer.layernorm_before(x))` goes into `layer.layernorm_after`.

        Args:
            layer: of transformers' Swin; also a `SwinAttention` alone, which has no shift.
        """
        attention = getattr(layer, "attention", layer)
        table = attention.relative_position_bias
        shift = getattr(layer, "shift_size", 0)
        projection = attention.q_proj
        module = cls(
            projection.in_features,
            attention.num_attention_heads,
            tuple(table.window_size),
            (shift, shift),
            bias=projection.bias is not None,
            device=projection.weight.device,
            dtype=projection.weight.dtype,
        )
        state = {
            n.replace("o_proj", "out_proj"): x
            for n, x in attention.state_dict().items()
            if not n.startswith("relative_position_bias")
        }
        module.load_state_dict(state | {"bias_table": table.relative_position_bias_table})
        return module

    def _split(self, x: Tensor) -> Tensor:
        """[..., height, width, H D] as [..., H, height, width, D], without a copy."""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, -4)
