"""Every number of 16 bits, as kernels read and write it: merged with nothing, it stays the same."""

import pytest
import torch

import attn_ext
from attn_ext.testing import Backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dv", [64, 63])  # whole pieces of 16 bytes; element by element
def test_every_number_is_read_and_written_as_it_is(dtype: torch.dtype, dv: int, backend: Backend):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    o = torch.cat([numbers, numbers[: -numbers.numel() % dv]]).view(-1, dv)
    lse = torch.zeros(o.shape[0])
    x = backend.put({"o_a": o, "lse_a": lse, "o_b": torch.zeros_like(o), "lse_b": lse - torch.inf})
    with backend.context():
        merged, _ = attn_ext.merge_states(**x)
    torch.testing.assert_close(merged.cpu(), o, rtol=0, atol=0, equal_nan=True)
