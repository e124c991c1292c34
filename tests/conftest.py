"""Shared by every suite: which backends there are, and how cases become test ids."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT.parent / "shared" / "tools"
if TOOLS.is_dir():
    sys.path.append(str(TOOLS))  # ptxrun, where the workplace has it

from attn_ext import VARIANTS  # noqa: E402
from attn_ext.testing import Backend, backend, backends  # noqa: E402
from attn_ext.testing.simt import build_library  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends", help="comma-separated, cpu: each of its targets; default: all but ptx"
    )
    parser.addoption("--every", type=int, help="take every so manieth case only; 1: all of them")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, before the workers start and all want it
        build_library()


class OnTheGpu(TorchDispatchMode):
    """Refuses our ops tensors of the CPU, so that no test of the GPU can pass on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attn_ext":
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            devices = sorted({x.device.type for x in given})
            assert devices in ([], ["cuda"]), f"{func} in a test of the GPU, on {devices}"
        return func(*args, **(kwargs or {}))


def _backend(name: str) -> Backend:
    found = backend(name)
    return replace(found, context=OnTheGpu) if found.device == "cuda" else found


# By default every case runs on the widest CPU target and one of so many elsewhere: on the other
# CPUs, which have the same source, and in the emulator, which is slow; there fewer gradients, and
# fewer of variants made of another's op. `--backends` takes every case, as .ci/run does.
CPU_SHARE, SIMT_SHARE, SIMT_SHARE_OF_OTHERS = 4, 3, 9


def _runs(cases, names: list[str], every: int | None, chosen: bool, gradients: bool) -> list:
    """Each case on each backend, or its share of them."""
    widest = next(n for n in backends() if n.startswith("cpu-"))
    first = {v.op: v.name for v in reversed(VARIANTS.values())}  # the op's own record

    def share(variant, n: str) -> int:
        if every or chosen or n in (widest, "cuda"):
            return every or 1
        if n.startswith("cpu-"):
            return CPU_SHARE
        own = not gradients and first[variant.op] == variant.name
        return SIMT_SHARE if own else SIMT_SHARE_OF_OTHERS

    return [
        pytest.param(v, c, _backend(n), id=f"{v.name}-{c.name}-{n}")
        for n in names
        for at, (v, c) in enumerate(cases)
        if at % share(v, n) == 0
    ]


def _names(chosen: str) -> list[str]:
    cpu = [n for n in backends() if n.startswith("cpu-")]
    return [n for name in chosen.split(",") for n in (cpu if name == "cpu" else [name])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen, every = config.getoption("--backends"), config.getoption("--every")
    names = _names(chosen) if chosen else [n for n in backends() if n != "ptx"]
    used = metafunc.fixturenames
    gradients = "gradient_case" in used
    if gradients or {"variant", "case", "backend"} <= {*used}:
        cases = [(v, c) for v in VARIANTS.values() for c in v.cases if not (gradients and c.poison)]
        of = "gradient_" if gradients else ""
        runs = _runs(cases, names, every, bool(chosen), gradients)
        metafunc.parametrize((f"{of}variant", f"{of}case", "backend"), runs)
    elif "backend" in used:
        metafunc.parametrize("backend", [pytest.param(_backend(n), id=n) for n in names])


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws is the same in every run: bounds on sums of it hold or do not."""
    torch.manual_seed(0)


@pytest.fixture
def cpu_backends() -> list[Backend]:
    return [b for n, b in backends().items() if n.startswith("cpu-")]
