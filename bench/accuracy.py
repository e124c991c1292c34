"""How far results are from float64, ours and torch's: largest errors on standard-normal inputs."""

import math
from dataclasses import dataclass

import torch

from attn_ext.testing import Backend
from attn_ext.variants import VARIANTS

from .ceilings import name
from .correctness import Verdict, verify
from .peers import peers
from .suites import BenchCase

# The project's goals at S 1024, D 64 and 128.
GOALS = {torch.float32: 4e-7, torch.bfloat16: 1e-3, torch.float16: 1.5e-4}


@dataclass(frozen=True)
class Accuracy:
    """Largest errors of one case; `torch` is nan where torch has no such call."""

    case: BenchCase
    dtype: torch.dtype
    verdict: Verdict
    torch: float = float("nan")

    @property
    def reached(self) -> bool:
        """Whether our error is within the project's goal."""
        return self.verdict.ok and self.verdict.error <= GOALS[self.dtype]

    def as_json(self) -> dict[str, object]:
        """The same in plain types."""
        return {
            "case": self.case.name,
            "dtype": name(self.dtype),
            "ok": self.verdict.ok,
            "message": self.verdict.message,
            "max_error": self.verdict.error if self.verdict.ok else None,
            "torch_max_error": None if math.isnan(self.torch) else self.torch,
        }


def measure_accuracy(case: BenchCase, dtype: torch.dtype, backend: Backend) -> Accuracy:
    """Compare one case with the reference in float64."""
    variant = VARIANTS[case.variant]
    verdict = verify(variant, case.case, dtype, backend)
    inputs = case.case.inputs(dtype)
    wide = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    theirs = peers(backend.put(inputs)).get("torch")
    if not verdict.ok or theirs is None:
        return Accuracy(case, dtype, verdict)
    error = float((theirs().cpu().double() - variant.reference(**wide)).abs().max())
    return Accuracy(case, dtype, verdict, error)
