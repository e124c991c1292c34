"""What tests are made of: the emulator and its PTX twin, backends, the equivalence check.

`with simt():` runs the CUDA kernels on CPU tensors, compiled by g++ for the emulator of
`csrc/simt`; `with ptx():` runs what nvcc made of them. `check()` holds one call to its float64
reference by the house's tolerance rule, `check_gradients()` its gradients. `dropout_mask()` is what
dropout with a given seed does.
"""

from attn_ext.ops.dropout import dropout_mask
from attn_ext.testing.backends import Backend, backend, backends, cpu_target
from attn_ext.testing.equivalence import Comparison, check
from attn_ext.testing.gradients import check_gradients
from attn_ext.testing.ptx import ptx, ptx_available
from attn_ext.testing.simt import simt

__all__ = [
    "Backend",
    "Comparison",
    "backend",
    "backends",
    "check",
    "check_gradients",
    "cpu_target",
    "dropout_mask",
    "ptx",
    "ptx_available",
    "simt",
]
