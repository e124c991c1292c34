"""BigBird's self-attention: whole blocks near the diagonal, at both ends, and drawn at random."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attn_ext.block_mask import BlockMask
from attn_ext.masks import keys
from attn_ext.masks.bigbird import BigBirdPlan
from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.block_sparse_attention import block_sparse_attention
from attn_ext.variants.merge_states import merge_states

if TYPE_CHECKING:
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention


class BigBirdAttention(GroupedQueryAttention):
    r"""Self-attention to a window of blocks, to the blocks at both ends, and to blocks at random.

    .. math::
        Y = \mathrm{concat}_h\big(
            \mathrm{block\_sparse\_attention}(X W^q_h, X W^k_g, X W^v_g, M_h)\big)\, W^o,
        \qquad M = \mathrm{masks.bigbird}(S)

    Args:
        embed_dim: width of the inputs and of the result.
        heads: Hq, each with random blocks of its own.
        window_blocks: odd: blocks around the diagonal, its own included.
        global_blocks: blocks that see all and that all see, half of them at either end.
        random_blocks: blocks drawn for each block row and head that is not global.
        block_size: side of a block, a power of two up to 256. Kernels have blocks of 32 and more,
            which below are partial.
        seed: of the draws, which are the same in every call; another one for each layer.
        max_seqlen: as in `attn_ext.masks.bigbird`.
        as_transformers: draw and count as transformers does. Out of training every draw is block
            0. Where a row keeps anyway what it draws, the softmax counts that block's keys once
            more for each draw.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the projections add a bias.
        project: whether a projection of the result follows.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers of heads that do not divide; what `attn_ext.masks.bigbird` raises of its
            arguments.

    Note:
        2 · S · (w + g + r) · block_size · 2 D operations per head for w, g and r blocks of each
        kind, besides the projections. Memory O(S), plus a bit per pair of blocks and head. Blocks
        that count more than once are a second call, whose lse is raised by the logarithm of how
        often before the two are merged.

    Reference:
        Zaheer et al., 2020, arXiv:2007.14062.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.BigBirdAttention(embed_dim=64, heads=4, seed=1)
    >>> layer(torch.randn(2, 1500, 64)).shape
    torch.Size([2, 1500, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        window_blocks: int = 3,
        global_blocks: int = 2,
        random_blocks: int = 3,
        block_size: int = 64,
        seed: int = 0,
        max_seqlen: int = 4096,
        as_transformers: bool = False,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        project: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projections and initialize them."""
        super().__init__(
            embed_dim, heads, kv_heads, head_dim=head_dim, bias=bias, device=device, dtype=dtype
        )
        self.plan = BigBirdPlan(
            heads, window_blocks, global_blocks, random_blocks, seed, block_size, max_seqlen
        )
        self.as_transformers = as_transformers
        if not project:
            self.out_proj = nn.Identity()

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Return the attention of every position of `x`, projected.

        Args:
            x: `[..., S, embed_dim]`, of any length: the last block may be cut off.
            key_mask: boolean `[S]` or, for `x` `[B, S, embed_dim]`, `[B, S]`. True: a token, False:
                padding, which nobody attends to and whose attention is 0.

        Returns:
            `[..., S, embed_dim]`.

        Raises:
            ValueError: fewer blocks than are drawn; with `as_transformers` in training only.
            TypeError: a `key_mask` that is not boolean.
        """
        once, again, count = self._masks_of_tokens(x, key_mask)
        qkv = [self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj)]
        options = {"enable_gqa": self.heads != self.kv_heads, "return_lse": True}
        o, lse = block_sparse_attention(*qkv, once, **options)
        if again is not None:
            o_again, lse_again = block_sparse_attention(*qkv, again, **options)
            o, _ = merge_states(o, lse, o_again, lse_again + math.log(count))
        o = o.transpose(-3, -2).flatten(-2)
        if key_mask is not None:
            o = o.masked_fill(~key_mask[..., None], 0)
        return self.out_proj(o)

    def block_masks(
        self, seqlen: int, device: torch.device | str | None = None
    ) -> tuple[BlockMask, BlockMask | None, int]:
        """Return the pairs that count once, those that count several times, and how often these.

        >>> import attn_ext.nn
        >>> layer = attn_ext.nn.BigBirdAttention(64, 4, as_transformers=True).eval()
        >>> once, again, count = layer.block_masks(448)
        >>> count
        4
        >>> print(once.picture())
        ███████
        ·██···█
        ·███··█
        ··███·█
        ···████
        ····███
        ███████
        >>> print(again.picture())
        ·······
        █······
        █······
        █······
        █······
        █······
        ·······
        """
        first = self.as_transformers and not self.training
        if not self.as_transformers or not self._repeats(seqlen, first):
            return self.plan.mask("all", seqlen, device, first), None, 1
        once, again = (self.plan.mask(part, seqlen, device, first) for part in ("once", "again"))
        return once, again, 1 + self.plan.random_blocks if first else 2

    def _repeats(self, seqlen: int, first: bool) -> bool:
        """Whether blocks may count more than once; torch.compile does not see the draws."""
        if torch.compiler.is_compiling() or not self.plan.random_blocks:
            return self.plan.random_blocks > 0
        return bool(self.plan.chosen("again", self.plan.num_blocks(seqlen), first).any())

    def _masks_of_tokens(
        self, x: Tensor, key_mask: Tensor | None
    ) -> tuple[BlockMask, BlockMask | None, int]:
        once, again, count = self.block_masks(x.shape[-2], x.device)
        if key_mask is None:
            return once, again, count
        tokens = keys(key_mask, block_size=once.block_size)
        return once & tokens, None if again is None else again & tokens, count

    def extra_repr(self) -> str:
        """What the projections do not show."""
        plan = self.plan
        text = super().extra_repr() + f", window_blocks={plan.window_blocks}"
        text += f", global_blocks={plan.global_blocks}, random_blocks={plan.random_blocks}"
        text += f", block_size={plan.block_size}, seed={plan.seed}"
        return text + ", as_transformers=True" * self.as_transformers

    @classmethod
    def from_transformers(cls, module: "BigBirdBlockSparseAttention") -> "BigBirdAttention":
        """Return a module with the weights of `module`, which computes the same.

        In training it draws the same blocks, in evaluation it draws none (`as_transformers`). Its
        `to_mask` and `from_mask` are `key_mask`. Lengths need not be a multiple of the block: where
        `BigBirdModel` appends padding, the last block is cut off.

        Args:
            module: of transformers' BigBird; the projection of the result is not part of it. One
                that has no seed draws other blocks in each call of training; ours then has seed 0.
        """
        weight = module.query.weight
        ours = cls(
            weight.shape[1],
            module.num_attention_heads,
            random_blocks=module.num_random_blocks,
            block_size=module.block_size,
            seed=module.seed or 0,
            max_seqlen=module.max_seqlen,
            as_transformers=True,
            bias=module.query.bias is not None,
            project=False,
            device=weight.device,
            dtype=weight.dtype,
        )
        for name, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            getattr(ours, name).load_state_dict(getattr(module, theirs).state_dict())
        return ours.train(module.training)
