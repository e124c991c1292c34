"""The asan build: AddressSanitizer sees a kernel's accesses to memory that torch or numpy own."""

import subprocess
import sys
from pathlib import Path

import pytest

from attn_ext.testing.simt import asan_environment

pytestmark = pytest.mark.slow  # the sanitized machine is compiled first

SCRIPT = """
import sys
from carriers import Case
for name in sys.argv[1:]:
    kernel, plant = name.split("-")
    case = Case(kernel, padding=0)
    error = case.run("asan", int(plant))
    print(name, error, case.difference())
"""


def run(*names: str) -> subprocess.CompletedProcess:
    """Run planted kernels on arrays that end where their elements end."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=asan_environment(),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )


def test_correct_kernels_pass():
    """Fibers and shared memory raise no false alarm; what the machine finds itself is reported."""
    done = run("tiled-0", "flash-0", "split-0", "split-8")
    assert done.returncode == 0, done.stderr
    *correct, deadlock = done.stdout.splitlines()[:4]
    assert correct == [f"{kernel}-0 None None" for kernel in ("tiled", "flash", "split")]
    assert "deadlock" in deadlock


@pytest.mark.parametrize("name", ["tiled-5", "flash-12", "split-13"])
def test_access_past_the_end_of_an_array(name):
    """The process ends with the sanitizer's report, which names the line."""
    done = run(name)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert f"{name.split('-')[0]}.cu:" in done.stderr
