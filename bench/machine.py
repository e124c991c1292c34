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


def describe() -> dict[str, str | int | None]:
    """Processor, GPU if there is one, and versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "attn_ext": attn_ext.__version__,
        "commit": commit(),
        "compiler": _C.compiler,
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
