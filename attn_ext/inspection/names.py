"""Names of kernels: mangled, as compilers agree on them, and as people read them."""

import ctypes
import functools
import re

# The template arguments that a demangler prints as (atx::gpu::Pass)0; heuristics.h has the enum.
PASSES = ("Q", "K", "V", "KV", "MASK")


@functools.cache
def demangle(mangled: str) -> str:
    """Return the C++ declaration that a mangled name stands for.

    >>> demangle("_ZN3atx3gpu1fILi64EEEvi")
    'void atx::gpu::f<64>(int)'
    """
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(mangled.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        raise ValueError(f"demangle: expected a mangled name; got {mangled!r}")
    try:
        return ctypes.string_at(text).decode()
    finally:
        libc = ctypes.CDLL(None)
        libc.free.argtypes = [ctypes.c_void_p]
        libc.free(text)


def label(mangled: str) -> str:
    """Return a kernel's name and template arguments, the same for every target.

    >>> label("_ZN3atx3gpu13attention_fwdINS0_7FwdTileINS_4bf16ELi64ELb1EEENS0_6WindowIfEEEEvi")
    'attention_fwd<FwdTile<bf16, 64, true>, Window<float>>'
    """
    text = demangle(mangled).removeprefix("void ")
    text = text[: text.rindex("(")]
    text = re.sub(r"\((?:\w+::)*Pass\)(\d)", lambda m: f"Pass::{PASSES[int(m[1])]}", text)
    text = re.sub(r"\(anonymous namespace\)::|\b(?:atx|gpu|simt)::", "", text)
    return text.replace("> >", ">>").replace("> >", ">>")
