"""`python -m attn_ext.inspection [SOURCE...]`: compile kernels and write the table of registers."""

import sys

from attn_ext.inspection.registers import record

record(sys.argv[1:])
