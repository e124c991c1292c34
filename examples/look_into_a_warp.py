"""What a warp holds: a tile's places in shared memory, and the registers of four lanes.

The emulator runs look_into_a_warp.cu, which uses the verbs of the attention kernels
(csrc/cuda/tile.cuh): change it and look again. docs/cuda-kernels.md explains what it prints.
"""

import ctypes
import sys
from pathlib import Path

import torch

from attn_ext.testing.simt import Library, build_library


def main(build: str = "plain") -> None:
    """Build the kernel with the emulator and run one block of it; `build`: attn_ext.testing's."""
    machine = Library(build_library(build, [Path(__file__).with_suffix(".cu")]))
    machine.configure(workers=1)
    rows = torch.zeros(16, 64, dtype=torch.bfloat16)
    rows[:, :16] = torch.arange(256).reshape(16, 16)
    machine.handle.look.restype = ctypes.c_char_p
    error = machine.handle.look(ctypes.byref(ctypes.c_void_p(rows.data_ptr())))
    if error is not None:
        raise RuntimeError(error.decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
