"""A subset of the suite with the emulated kernels under AddressSanitizer, in a process of its own.

Minutes, because the sanitized library is compiled first: `pytest -m slow tests/test_sanitizers.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from attn_ext.testing.simt import asan_environment, build_library

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_emulated_kernels_under_address_sanitizer():
    build_library("asan")  # here, without the sanitizer in the compiler's own process
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["--backends", "simt:asan", "--every", "5", "tests/test_equivalence.py"]
    done = subprocess.run(command, cwd=ROOT, env=asan_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
