"""Autocast: q, k, v and a float mask are cast, as for scaled_dot_product_attention."""

import torch

_LIBRARY = torch.library.Library("attn_ext", "IMPL")


def _autocast(op, device: str, cast: tuple[int, ...]) -> None:
    """Register a kernel that casts the arguments at `cast` and calls the op without autocast."""
    key = getattr(torch._C.DispatchKey, "Autocast" + device.upper())
    below = torch._C.DispatchKeySet(key)

    def kernel(*arguments):
        dtype = torch.get_autocast_dtype(device)
        arguments = list(arguments)
        for n in cast:
            x = arguments[n]
            if x is not None and x.is_floating_point() and x.dtype != torch.float64:
                arguments[n] = x.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*arguments)

    op.py_impl(key)(kernel)
    _LIBRARY.impl(op, kernel, key.name)


for _device in ("cpu", "cuda"):
    _autocast(torch.ops.attn_ext.attention_fwd.default, _device, (0, 1, 2, 3))
    _autocast(torch.ops.attn_ext.varlen_attention_fwd.default, _device, (0, 1, 2))
    _autocast(torch.ops.attn_ext.block_sparse_attention_fwd.default, _device, (0, 1, 2))
    _autocast(torch.ops.attn_ext.forgetting_attention_fwd.default, _device, (0, 1, 2))
    _autocast(torch.ops.attn_ext.topk_attention_fwd.default, _device, (0, 1, 2))
