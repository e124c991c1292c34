"""What the suites rely on to run where they say: moving inputs, and refusing tensors of the CPU."""

from contextlib import nullcontext

import pytest
import torch
from conftest import OnTheGpu

import attn_ext
from attn_ext.testing import Backend


def test_put_keeps_how_tensors_lie():
    meta = Backend("meta", nullcontext, device="meta")
    gaps = torch.zeros(2, 5, 3, 7)[:, 1:, :, 2:].transpose(1, 2)
    mask = attn_ext.masks.window(40, 40, left=3, right=0)
    call = {"query": gaps, "key": torch.zeros(1).expand(4, 2), "block_mask": mask, "scale": 0.5}
    moved = meta.put(call)
    for n in ("query", "key"):
        was, now = call[n], moved[n]
        assert now.device.type == "meta" and now.dtype == was.dtype
        assert (now.shape, now.stride(), now.storage_offset()) == (
            was.shape, was.stride(), was.storage_offset(),
        )  # fmt: skip
    assert moved["block_mask"].device.type == "meta" and moved["scale"] == 0.5
    assert meta.put((gaps, None))[1] is None
    leaf = meta.put(torch.zeros(3, requires_grad=True))
    assert leaf.is_leaf and leaf.requires_grad


def test_a_test_of_the_gpu_cannot_pass_on_the_cpu():
    q = torch.randn(1, 2, 5, 8)
    with OnTheGpu(), pytest.raises(AssertionError, match="attention_fwd.* on ..cpu"):
        attn_ext.attention(q, q, q)
