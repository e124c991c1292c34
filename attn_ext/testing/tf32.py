"""Products of float32 numbers as tensor cores take them: in tf32.

`with tf32_allowed():` lets the kernels do so, which is torch's setting; `with Tf32Products():` has
torch do the same on any device, which is what such kernels are measured by.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The records of the ops that have such kernels; other variants are made of these.
TF32_VARIANTS = (
    "attention",
    "varlen_attention",
    "block_sparse_attention",
    "forgetting_attention",
)

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.mv.default,
    torch.ops.aten.dot.default,
}


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Return float32 x with 10 bits of fraction, to nearest, ties away from 0."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class Tf32Products(TorchDispatchMode):
    """Rounds the operands of every float32 matrix product to tf32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one op of torch."""
        if func in _PRODUCTS and args[-1].dtype == torch.float32:
            args = (*args[:-2], *map(rounded_to_tf32, args[-2:]))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def tf32_allowed(allowed: bool = True) -> Iterator[None]:
    """Set torch's float32 matmul precision inside the context: "high", or "highest"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
