"""Every record, every case, every type, every backend against the float64 reference."""

import pytest
import torch

from attn_ext.testing import Backend, check
from attn_ext.variants.record import Case, Variant

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_reference(variant: Variant, case: Case, dtype: torch.dtype, backend: Backend):
    if dtype not in backend.dtypes:
        x = backend.put(case.inputs(dtype))
        with backend.context(), pytest.raises(TypeError, match="has no float64 kernel"):
            variant.fn(**x)
        return
    check(variant, case, dtype, backend)
