"""The attention family: torch.ops.attn_ext.attention_fwd and varlen_attention_fwd, typed.

Argument checks live in csrc/ops/attention_request.cpp, once for every target; here are only the
options that never reach a kernel, and the shortcuts past autograd and past the dispatcher. Fakes,
gradients and transforms are registered by the files beside this one.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attn_ext import _C
from attn_ext.ops.differentiable import call

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


def dropout_seed(query: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The seed of a call's dropout: the one given, or a number from torch's default generator."""
    if dropout_p == 0.0 or seed is not None:
        return seed if dropout_p else None
    return torch.randint(2**63 - 1, (1,), device=query.device)


def no_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode AD would lose a tangent: there is no kernel for it."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            f"{op}: expected inputs without tangents; got a dual tensor, and forward-mode AD has "
            "no kernel. Use reverse mode: torch.autograd.grad, torch.func.vjp or torch.func.grad."
        )


# looked up once: a call of one query takes microseconds
_OPS = {
    n: getattr(torch.ops.attn_ext, n).default for n in ("attention_fwd", "varlen_attention_fwd")
}


def _call(name: str, tensors: tuple[Tensor | None, ...], *options):
    """Call the op, past autograd's kernel in Python where there is nothing to record."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
    ):
        return call(name, *tensors, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS[name](*tensors, *options)


def direct_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
    enable_gqa: bool,
) -> Tensor | None:
    """Return o past torch's dispatcher, or None where that has more to do than call a kernel.

    csrc/ops/direct.cpp has the conditions, but for those that only Python knows.
    """
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or type(q) is not Tensor
        or not q.is_cpu
    ):
        return None
    return _C.direct_attention(q, k, v, scale, softcap, *window, bottom_right, enable_gqa)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *,
    dropout: float,
    scale: float,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """Return o [..., Hq, Sq, Dv] and lse [..., Hq, Sq] of q, k and v [..., H, S, D]."""
    tensors = (q, k, v, attn_mask, alibi_slopes, sinks, seed)
    no_tangents("attention", *tensors)
    return _call(
        "attention_fwd", tensors, dropout, scale, softcap, *window, bottom_right, enable_gqa
    )


def varlen_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *,
    dropout: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """Return o [total_q, Hq, Dv] and lse [Hq, total_q] of packed sequences."""
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed)
    no_tangents("varlen_attention", *tensors)
    lengths = (max_seqlen_q, max_seqlen_k)
    return _call(
        "varlen_attention_fwd", tensors, dropout, *lengths, scale, softcap, *window, bottom_right
    )


def python_reasons(op, tensors, window_size, causal_align) -> list[str]:
    """Every message that the checks of this file would raise."""
    reasons = []
    for check in (
        lambda: window(op, window_size, False),
        lambda: bottom_right(op, causal_align),
        lambda: no_tangents(op, *tensors),
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
