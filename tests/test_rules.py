"""The laws of the house: includes point downward, kernels know no torch, targets stay apart."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.M)

# room -> rooms it may include
MAY_INCLUDE = {
    "core": {"core"},
    "simt": {"simt", "core"},
    "cpu": {"cpu", "core"},
    "cuda": {"cuda", "simt", "core"},
    "ops": {"ops", "core"},
}
# Headers with templates or inline functions would leak one target's instructions into another (see
# target.h).
KERNEL_HEADERS = {
    "cmath",
    "cstdint",
    "cstring",
    "cstddef",
    "cstdlib",
    "new",
    "immintrin.h",
    "arm_neon.h",
    "type_traits",
}


def sources(room: str):
    return [
        p
        for p in sorted((CSRC / room).rglob("*"))
        if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc")
    ]


def room_of(source: Path, include: str) -> str | None:
    for base in (source.parent, ROOT, CSRC):
        path = (base / include).resolve()
        if path.is_file() and path.is_relative_to(CSRC):
            return path.relative_to(CSRC).parts[0]
    return None


@pytest.mark.parametrize("room", MAY_INCLUDE)
def test_includes_point_downward(room):
    assert sources(room)
    for source in sources(room):
        for _, include in INCLUDE.findall(source.read_text()):
            target = room_of(source, include)
            assert target is None or target in MAY_INCLUDE[room], (
                f"{source.name} includes {include}"
            )


@pytest.mark.parametrize("room", ["core", "cpu", "cuda"])
def test_kernels_include_neither_torch_nor_std(room):
    for source in sources(room):
        for kind, include in INCLUDE.findall(source.read_text()):
            if room_of(source, include) is None:
                assert kind == "<" and include in KERNEL_HEADERS, (
                    f"{source.name} includes {include}"
                )


# What may hold instructions that the compiler has no name for.
INLINE_ASSEMBLY = {CSRC / "cpu" / "amx" / "tiles.h", CSRC / "core" / "numeric.h"}


@pytest.mark.parametrize("room", ["core", "cpu", "cuda"])
def test_kernels_use_neither_exceptions_nor_inline_assembly(room):
    for source in sources(room):
        code = re.sub(r"//.*", "", source.read_text())
        found = re.findall(r"\b(throw|try|catch|asm|__asm__|std::function|std::vector)\b", code)
        if source in INLINE_ASSEMBLY:
            found = [word for word in found if word != "__asm__"]
        assert not found, f"{source.name} uses {found[0]}"


def test_only_ops_includes_torch():
    for room in ("core", "simt", "cpu", "cuda"):
        for source in sources(room):
            assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", source.read_text()), (
                source
            )


def wrappers() -> list[Path]:
    found = sorted((ROOT / "build" / "targets").glob("*/*.cpp"))
    known = {s.stem for s in sources("cpu")}
    return [w for w in found if w.parent.name not in ("gpu", "simt") and w.stem in known]


@pytest.mark.slow  # minutes: compiles every CPU kernel, without optimization
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols with nm")
def test_targets_keep_to_their_own_namespace_and_run_nothing_when_loaded(tmp_path):
    # A weak function outside atx::<target> may be kept from the AVX-512 object and run on a CPU
    # without AVX-512.
    assert wrappers(), "build in place first: python setup.py build_ext --inplace"
    present = {w.parent.name for w in wrappers()}
    by_width = sorted(present - {"amx"}, key=("scalar", "neon", "avx2", "avx512").index)
    for wrapper in wrappers():
        if wrapper.parent.name not in (by_width[-1], "amx"):
            continue
        target, out = wrapper.parent.name, tmp_path / "one.o"
        # unoptimized: inlining would hide some of them, and takes four times as long
        flags = ["-std=c++20", "-O0", "-Wno-psabi", "-fPIC", f"-I{ROOT}"]
        subprocess.run(["g++", *flags, "-c", str(wrapper), "-o", str(out)], check=True)
        symbols = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True)
        for line in symbols.stdout.splitlines():
            match = re.match(r"[0-9a-f]+ ([WVu]) (.*)", line)
            if match and match[2].startswith(
                "DW.ref."
            ):  # data: where the unwinder finds its routine
                continue
            # binutils leaves some lambdas' names as the compiler writes them
            own = (f"atx::{target}::", f"_ZN3atx{len(target)}{target}")
            assert not match or any(x in match[2] for x in own), f"{wrapper}: {line}"
            # an initializer would run, with this target's instructions, wherever the library loads
            assert "_GLOBAL__" not in line, f"{wrapper}: {line}"


def test_no_path_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        path = ROOT / name
        if (
            path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml")
            and path.name != Path(__file__).name
        ):
            assert not re.search(r"/(work|root|home/[a-z]+)/", path.read_text()), name
