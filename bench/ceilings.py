"""What this machine can do at most, measured in the same run: matrix products and reading memory.

The compute ceiling is the rate of torch's own matrix product, the memory ceiling the fastest of
torch's reductions over a large tensor. A share of the roofline is the time that the ceilings allow
over the time taken.
"""

from dataclasses import asdict, dataclass

import torch

from attn_ext.variants.record import Cost

from .measure import FLUSH_BYTES, best

GEMM_SIZES = {"cpu": (384, 768), "cuda": (4096, 8192)}
READ_BYTES = {"cpu": FLUSH_BYTES, "cuda": 4 * FLUSH_BYTES}


@dataclass(frozen=True)
class Ceilings:
    """Largest rates with so many threads: flop/s of a matrix product by dtype, bytes/s read."""

    device: str
    threads: int
    gemm: dict[str, float]
    read: float

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """The roofline: the longer of computing and reading at these rates."""
        return max(cost.flops / self.gemm[name(dtype)], cost.bytes / self.read)

    def memory_bound(self, cost: Cost, dtype: torch.dtype) -> bool:
        """Whether moving the bytes takes longer than the arithmetic."""
        return cost.bytes / self.read > cost.flops / self.gemm[name(dtype)]

    def as_json(self) -> dict:
        """The same in plain types."""
        return asdict(self)


def name(dtype: torch.dtype) -> str:
    """`"float32"` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Flop/s of torch.mm on square matrices, the better of two sizes."""
    rates = []
    for n in GEMM_SIZES[device]:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n**3 / best(lambda a=a, b=b: torch.mm(a, b), device))
    return max(rates)


def read_rate(device: str) -> float:
    """Bytes/s of reading a large tensor once, the best of three reductions."""
    x = torch.ones(1 << 8, READ_BYTES[device] // 4 >> 8, device=device)
    flat, vector = x.view(-1), torch.ones(x.shape[1], device=device)
    calls = (x.sum, lambda: torch.dot(flat, flat), lambda: torch.mv(x, vector))
    return x.nbytes / min(best(c, device) for c in calls)


def measure_ceilings(device: str, threads: int, dtypes: set[torch.dtype]) -> Ceilings:
    """Measure this device with the number of threads that torch has now.

    16-bit inputs may be multiplied as float32, so their ceiling is the better of both rates.
    """
    gemm = {name(d): gemm_rate(d, device) for d in dtypes | {torch.float32}}
    for d in dtypes & {torch.bfloat16, torch.float16}:
        gemm[name(d)] = max(gemm[name(d)], gemm["float32"])
    return Ceilings(device, threads, gemm, read_rate(device))
