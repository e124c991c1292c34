"""Build attn_ext: each kernel source is compiled once per target, inside that target's namespace.

CUDA is built when nvcc is found and torch is a CUDA build; ATTN_EXT_CUDA=1 insists on it,
ATTN_EXT_CUDA=0 leaves it out. TORCH_CUDA_ARCH_LIST is honored; its default is the visible GPU's
architecture, else "8.0 9.0a".
"""

import os
import platform
import re
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent.resolve()
WRAPPERS = Path("build") / "targets"
STABLE_ABI = "0x020a000000000000"  # torch 2.10

# Standard headers come before the pragma: their inline functions must not be compiled for the
# target's ISA.
STANDARD_HEADERS = "#include <cmath>\n#include <cstdint>\n#include <cstring>\n#include <new>\n"
X86_HEADERS = "#include <immintrin.h>\n"

# target -> (folder of its sources, instruction sets for #pragma GCC target, bytes of a vector)
AVX512 = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
CPU_TARGETS = {
    "x86_64": {
        "scalar": ("cpu", "", 16),
        "avx2": ("cpu", "avx2,fma,f16c", 32),
        "avx512": ("cpu", AVX512, 64),
        "amx": ("cpu/amx", f"{AVX512},avx512bf16,amx-tile,amx-bf16", 64),
    },
    "aarch64": {"scalar": ("cpu", "", 16), "neon": ("cpu", "", 16)},
}.get(platform.machine(), {"scalar": ("cpu", "", 16)})


def wrapper(source: Path, target: str, prelude: str, suffix: str) -> str:
    """Write the file that compiles `source` for `target` and return its path; keep a right one."""
    path = WRAPPERS / target / (source.stem + suffix)
    text = f'{prelude}#define ATX_TARGET {target}\n#include "{source.relative_to(ROOT)}"\n'
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    if not (ROOT / path).exists() or (ROOT / path).read_text() != text:
        (ROOT / path).write_text(text)
    return str(path)


def cpu_sources() -> list[str]:
    sources = []
    for target, (folder, isa, vector_bytes) in CPU_TARGETS.items():
        prelude = STANDARD_HEADERS + (X86_HEADERS if platform.machine() == "x86_64" else "")
        prelude += f'#pragma GCC target("{isa}")\n' if isa else ""
        prelude += f"#define ATX_VEC_BYTES {vector_bytes}\n"
        sources += [
            wrapper(s, target, prelude, ".cpp")
            for s in sorted((ROOT / "csrc" / folder).glob("*.cpp"))
        ]
    return sources


def gpu_sources() -> list[str]:
    return [
        wrapper(s, "gpu", STANDARD_HEADERS, ".cu")
        for s in sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    ]


def wants_cuda() -> bool:
    setting = os.environ.get("ATTN_EXT_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"ATTN_EXT_CUDA: expected 0, 1 or nothing; got {setting!r}")
    possible = CUDA_HOME is not None and torch.version.cuda is not None
    if setting == "1" and not possible:
        missing = "nvcc" if CUDA_HOME is None else "a CUDA build of torch"
        raise SystemExit(f"ATTN_EXT_CUDA=1, but {missing} was not found")
    return possible and setting != "0"


def cuda_architectures() -> str:
    """Return what nvcc will be asked for as in TORCH_CUDA_ARCH_LIST, its names resolved."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags  # no CPU build hangs on its name

    built = {}
    for flag in _get_cuda_arch_flags():
        kind, major, minor = re.search(r"code=(sm|compute)_(\d+)(\d[a-z]?)$", flag).groups()
        built.setdefault(f"{major}.{minor}", set()).add(kind)
    return " ".join(x + "+PTX" * ("compute" in kinds) for x, kinds in built.items())


def cuda_macros() -> list[tuple[str, str | None]]:
    return [
        ("ATX_WITH_CUDA", None),
        ("USE_CUDA", None),
        ("ATX_CUDA_ARCHITECTURES", f'"{cuda_architectures()}"'),
    ]


def cuda_library_folders() -> list[str]:
    """Ask nvcc where its runtime is: CUDA_HOME is a guess where nvcc is a wrapper or a link."""
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    dry_run = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    plan = subprocess.run(dry_run, capture_output=True, text=True, check=True).stderr
    return re.findall(r'"-L([^"]+)"', next(x for x in plan.splitlines() if "LIBRARIES=" in x))


with_cuda = wants_cuda()
if with_cuda and not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0 9.0a")

flags = [
    "-std=c++20",
    "-O2",
    "-fpeel-loops",
    "-g0",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-Wno-psabi",
]
# With -lineinfo, 60 % of an image is the text of its PTX; compressed, it is a fifth of what it was.
# A file's image is unpacked when the first of its kernels is called. nvcc 13's --compress-mode=size
# makes the library a fifth smaller, and took 7 % of a file's time.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xfatbin=-compress-all",
]
extension = (CUDAExtension if with_cuda else CppExtension)(
    "attn_ext._C",
    [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc/ops").glob("*.cpp"))]
    + cpu_sources()
    + (gpu_sources() if with_cuda else []),
    include_dirs=[str(ROOT), pybind11.get_include()],
    define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)] + (cuda_macros() if with_cuda else []),
    library_dirs=cuda_library_folders() if with_cuda else [],
    extra_compile_args={
        "cxx": [*flags, "-fvisibility=hidden"],
        "nvcc": NVCC_FLAGS,
    },
    extra_link_args=["-Wl,-s"],
)

# The sources go with the package: attn_ext.testing builds the emulator from them on first use.
SOURCE_FOLDERS = sorted({str(p.parent.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")})
SOURCE_PACKAGES = {"attn_ext." + d.replace("/", "."): d for d in SOURCE_FOLDERS}
PYTHON_PACKAGES = [
    str(p.parent.relative_to(ROOT)).replace("/", ".")
    for p in sorted((ROOT / "attn_ext").rglob("__init__.py"))
]
setup(
    packages=[*PYTHON_PACKAGES, "attn_ext.bench", *SOURCE_PACKAGES],
    package_dir={"attn_ext.bench": "bench"} | SOURCE_PACKAGES,
    package_data={"": ["*.h", "*.cuh", "*.cu", "*.cpp", "*.csv", "*.json"]},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
