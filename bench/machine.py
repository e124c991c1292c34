"""What a table of times must say about where it was taken; no host or user names."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import attn_ext
from attn_ext import _C


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        short, changed = (
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return short + "+" * bool(changed)


# What a GPU's times depend on, as nvidia-smi calls it.
GPU_STATE = (
    "driver_version", "memory.total", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu", "ecc.mode.current",
)  # fmt: skip


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU; empty without one or without nvidia-smi."""
    if not torch.cuda.is_available():
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = [
        "nvidia-smi",
        "-i",
        uuid,
        f"--query-gpu={','.join(GPU_STATE)}",
        "--format=csv,noheader",
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_STATE, (x.strip() for x in said.split(",")), strict=True))


def describe() -> dict[str, str | int | dict[str, str] | None]:
    """Processor, GPU if there is one and its state now, and versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_state": gpu_state(),
        "cuda": torch.version.cuda,
        "cuda_architectures": _C.cuda_architectures,
        "attn_ext": attn_ext.__version__,
        "commit": commit(),
        "compiler": _C.compiler,
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
