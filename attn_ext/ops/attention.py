"""The attention family: torch.ops.attn_ext.attention_fwd and varlen_attention_fwd, typed.

Argument checks live in csrc/ops/attention.cpp, once for every target; here are only the options
that never reach a kernel, the fake kernels that give shapes to torch.compile, and the refusal to be
differentiated.
"""

import torch
from torch import Tensor

CAUSAL_ALIGN = ("top_left", "bottom_right")


def window(op: str, window_size: tuple[int, int], is_causal: bool) -> tuple[int, int]:
    """The (left, right) window with causality folded in: causal is a right side of 0."""
    if len(window_size) != 2:
        raise ValueError(f"{op}: expected window_size (left, right); got {window_size!r}")
    left, right = window_size
    return (left, 0 if is_causal else right)


def bottom_right(op: str, causal_align: str) -> bool:
    """Whether the diagonal ends at the last query and the last key."""
    if causal_align not in CAUSAL_ALIGN:
        raise ValueError(f"{op}: expected causal_align of {CAUSAL_ALIGN}; got {causal_align!r}")
    return causal_align == "bottom_right"


def default_scale(query: Tensor) -> float:
    """1/sqrt(D); 1 for the empty head dimension, which the compiled checks refuse."""
    return max(query.shape[-1], 1) ** -0.5


def no_dropout(op: str, dropout_p: float) -> None:
    """Dropout belongs to training and arrives with the backward."""
    if dropout_p != 0.0:
        raise ValueError(
            f"{op}: dropout has no kernel yet; got dropout_p={dropout_p}. Pass dropout_p=0.0."
        )


def no_gradients(op: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would record a call that has no backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: the backward has no kernel yet, but an input requires gradients. "
            "Call it under torch.no_grad() or torch.inference_mode(), or detach the inputs."
        )


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """Return o [..., Hq, Sq, Dv] and lse [..., Hq, Sq] of q, k and v [..., H, S, D]."""
    no_gradients("attention", q, k, v, attn_mask, alibi_slopes, sinks)
    return torch.ops.attn_ext.attention_fwd(
        q, k, v, attn_mask, alibi_slopes, sinks, None, 0.0, scale, softcap, *window, bottom_right,
        enable_gqa,
    )  # fmt: skip


def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """Return o [total_q, Hq, Dv] and lse [Hq, total_q] of packed sequences."""
    no_gradients("varlen_attention", q, k, v, alibi_slopes, sinks)
    return torch.ops.attn_ext.varlen_attention_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, None, 0.0,
        max_seqlen_q, max_seqlen_k, scale, softcap, *window, bottom_right,
    )  # fmt: skip


def _accumulation_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_devices(op, q, *others):
    for t in others:
        if t is not None and t.device != q.device:
            raise RuntimeError(
                f"{op}: expected every tensor on q's device; got {q.device} and {t.device}. "
                "Move them with .to(q.device)."
            )


@torch.library.register_fake("attn_ext::attention_fwd")
def _attention_fwd_fake(
    q, k, v, attn_mask, alibi_slopes, sinks, seed, dropout, scale, softcap, left, right, br, gqa
):
    _check_devices("attention", q, k, v, attn_mask, alibi_slopes, sinks)
    rank = max(q.dim(), k.dim(), v.dim())
    torch._check(
        min(q.dim(), k.dim(), v.dim()) >= 2, lambda: "attention: q, k, v need 2 dimensions"
    )
    lead = [[1] * (rank - t.dim()) + list(t.shape[:-2]) for t in (q, k, v)]
    shape = []
    for d in range(rank - 2):
        sizes = [x[d] for x in lead]
        # the last leading dimension is heads: grouped queries keep q's
        shape.append(sizes[0] if gqa and d == rank - 3 else _broadcast(*sizes))
    lse = q.new_empty([*shape, q.shape[-2]], dtype=_accumulation_dtype(q))
    if rank == 4 and q.dim() == 4 and q.stride(1) < q.stride(2):
        o = q.new_empty([shape[0], q.shape[-2], shape[1], v.shape[-1]]).transpose(1, 2)
    else:
        o = q.new_empty([*shape, q.shape[-2], v.shape[-1]])
    return o, lse


def _broadcast(*sizes):
    size = 1
    for s in sizes:
        size = s if size == 1 else size
    return size


@torch.library.register_fake("attn_ext::varlen_attention_fwd")
def _varlen_attention_fwd_fake(q, k, v, cu_q, cu_k, alibi_slopes, sinks, *options):
    _check_devices("varlen_attention", q, k, v, cu_q, cu_k, alibi_slopes, sinks)
    total, heads = q.shape[0], q.shape[1]
    return q.new_empty([total, heads, v.shape[-1]]), q.new_empty(
        [heads, total], dtype=_accumulation_dtype(q)
    )


def python_reasons(op, tensors, window_size, causal_align, dropout_p=0.0) -> list[str]:
    """Every message that the checks of this file would raise."""
    reasons = []
    for check in (
        lambda: no_dropout(op, dropout_p),
        lambda: window(op, window_size, False),
        lambda: bottom_right(op, causal_align),
        lambda: no_gradients(op, *tensors),
    ):
        try:
            check()
        except (ValueError, RuntimeError) as error:
            reasons.append(str(error))
    return reasons


def compiled_reasons(why_not_op, *args) -> list[str]:
    """Every message that the compiled checks would raise."""
    with torch.no_grad():
        return why_not_op(*args).splitlines()
