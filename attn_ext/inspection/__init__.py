"""What can be known of a CUDA kernel without a GPU: `attn-ext inspect`.

`registers` is what ptxas reports, beside the committed table of it; `occupancy` what follows for a
multiprocessor; `machine_code` the instructions of the main loop; `requests` what the emulator
counts, `ptx_requests` what `ptxrun` counts in the PTX of the same call. None of it is a time.
"""

from attn_ext.inspection.machine_code import Loop, compile_kernel, main_loop
from attn_ext.inspection.names import label
from attn_ext.inspection.occupancy import GPUS, Occupancy, occupancy
from attn_ext.inspection.problems import FAMILIES, SCORES, Problem
from attn_ext.inspection.ptx_requests import count_ptx
from attn_ext.inspection.registers import Resources, read_table
from attn_ext.inspection.requests import Launch, count, launches

__all__ = [
    "FAMILIES",
    "GPUS",
    "SCORES",
    "Launch",
    "Loop",
    "Occupancy",
    "Problem",
    "Resources",
    "compile_kernel",
    "count",
    "count_ptx",
    "label",
    "launches",
    "main_loop",
    "occupancy",
    "read_table",
]
