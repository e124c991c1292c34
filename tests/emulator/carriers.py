"""The carriers of planted bugs: three attention kernels, their inputs and their reference."""

import ctypes
from dataclasses import dataclass, field

import numpy as np
from harness import bf16, execution, from_bf16, machine, run


class Problem(ctypes.Structure):
    """The struct of kernels/problem.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "lse")),
        *((name, ctypes.c_int) for name in ("H", "Sq", "Sk")),
        *((name, ctypes.c_int64) for name in ("q_row", "kv_row", "o_row")),
        *((name, ctypes.c_int64) for name in ("q_head", "kv_head", "o_head")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int),
        ("plant", ctypes.c_int),
        ("part_o", ctypes.c_void_p),
        ("part_lse", ctypes.c_void_p),
        ("splits", ctypes.c_int),
    ]


@dataclass
class Case:
    """One attention problem for a carrier kernel: inputs, and outputs full of NaN."""

    kernel: str
    H: int = 2
    Sq: int = 96
    Sk: int = 100
    causal: bool = False
    seed: int = 0
    splits: int = 3
    padding: int = 8  # rows of storage after each head's
    outputs: dict = field(default_factory=dict)

    def __post_init__(self):
        """Make the inputs. Keys and values are views into longer storages full of NaN."""
        rng = np.random.default_rng(self.seed)
        self.D = {"tiled": 32, "flash": 64, "split": 64}[self.kernel]
        self.Sq = 1 if self.kernel == "split" else self.Sq
        wide = self.kernel == "flash"
        self.dtype = np.uint16 if wide else np.float32
        encode = bf16 if wide else (lambda x: x.astype(np.float32))
        decode = from_bf16 if wide else (lambda x: x)

        def padded(length):
            storage = np.full((self.H, length + self.padding, self.D), np.nan)
            storage[:, :length] = rng.standard_normal((self.H, length, self.D))
            return encode(storage)[:, :length]

        self.q, self.k, self.v = padded(self.Sq), padded(self.Sk), padded(self.Sk)
        self.values = [
            decode(np.ascontiguousarray(x)).astype(np.float64) for x in (self.q, self.k, self.v)
        ]
        self.scale = self.D**-0.5

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Return o and lse in float64."""
        q, k, v = self.values
        s = np.einsum("hid,hjd->hij", q, k) * self.scale
        if self.causal:
            i, j = np.ogrid[: self.Sq, : self.Sk]
            s = np.where(j <= i + self.Sk - self.Sq, s, -np.inf)
        lse = np.logaddexp.reduce(s, axis=-1)
        return np.exp(s - lse[..., None]) @ v, lse

    def run(self, build: str, plant: int = 0, **settings) -> str | None:
        """Run the kernel with a planted bug; return the error, and keep the outputs."""
        lib = machine(build, f"{self.kernel}.cu")
        lib.configure(**{"workers": 2, "watchdog": 20, **settings})
        guard = np.full(
            (self.H, self.Sq + 8 * self.padding, self.D),
            0x7FC0 if self.dtype == np.uint16 else np.nan,
            self.dtype,
        )
        o = guard[:, : self.Sq]
        lse = np.full((self.H, self.Sq), np.nan, np.float32)
        part_o = np.full((self.H, self.splits, self.D), np.nan, np.float32)
        part_lse = np.full((self.H, self.splits), np.nan, np.float32)
        item = o.itemsize
        problem = Problem(
            *(x.ctypes.data for x in (self.q, self.k, self.v, o, lse)),
            *(self.H, self.Sq, self.Sk),
            *(x.strides[1] // item for x in (self.q, self.k, o)),
            *(x.strides[0] // item for x in (self.q, self.k, o)),
            *(self.scale, self.causal, plant),
            *(part_o.ctypes.data, part_lse.ctypes.data, self.splits),
        )
        exec_ = execution(
            q=(self.q, False),
            k=(self.k, False),
            v=(self.v, False),
            o=(o, True),
            lse=(lse, True),
            part_o=(part_o, True),
            part_lse=(part_lse, True),
        )
        error = run(lib, f"run_{self.kernel}", ctypes.byref(problem), ctypes.byref(exec_))
        self.outputs = {"o": o.copy(), "lse": lse}
        self.overrun = guard[:, self.Sq :]
        return error

    def difference(self) -> str | None:
        """Compare the outputs with the reference: None, `"NaN"` or `"wrong"`."""
        o = self.outputs["o"]
        o = from_bf16(o) if self.dtype == np.uint16 else o
        lse = self.outputs["lse"]
        if np.isnan(o).any() or np.isnan(lse).any():
            return "NaN"
        want_o, want_lse = self.reference()
        tolerance = 2e-2 if self.dtype == np.uint16 else 1e-5
        close = np.allclose(o, want_o, atol=tolerance, rtol=0)
        if close and np.allclose(lse, want_lse, atol=1e-4, rtol=0):
            written = self.overrun != 0x7FC0 if self.dtype == np.uint16 else ~np.isnan(self.overrun)
            return "wrong" if written.any() else None
        return "wrong"
