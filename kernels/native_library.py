"""The native CPU kernels: a shared library, found, checked and loaded once, and called through a plain C ABI.

`pip install` compiles kernels/native/*.cpp where there is a compiler (setup.py), and puts the library into the package
arb_kernels. It is searched beside this file first, then in the installed package: in a model from the hub this code
lies elsewhere. The library takes its threads from the OpenMP runtime that torch brings, so `torch.set_num_threads`
governs it too.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

ABI_VERSION = 5
AVX512_VNNI, AVX2 = 2, 1
_POINTER, _INT, _LONG, _FLOAT, _KEY = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_uint32
_SIGNATURES = {
    "arb_instruction_set": (_INT, []),
    "arb_advise_huge_pages": (None, [_POINTER, _LONG]),
    "arb_momentum_update": (_LONG, [_POINTER] * 4 + [_LONG] * 2 + [_INT] + [_KEY, _POINTER] + [_FLOAT] * 4),
    "arb_add_gradient": (None, [_POINTER] * 3 + [_LONG] * 2 + [_KEY]),
    "arb_add_sum": (None, [_POINTER] * 3 + [_LONG] * 2),
    "arb_quantise_tokens": (None, [_POINTER] + [_LONG] * 2 + [_POINTER] * 2),
    "arb_quantise_gradient": (None, [_POINTER] + [_LONG] * 2 + [_POINTER] * 6),
    "arb_unpack_levels": (None, [_POINTER] + [_LONG] * 2 + [_INT, _POINTER]),
    "arb_int8_matmul": (None, [_INT] + [_POINTER] * 2 + [_INT] * 2 + [_LONG] * 3 + [_POINTER] * 3),
    "arb_layout_matmul": (None, [_INT] * 2 + [_POINTER] * 2 + [_LONG] * 3 + [_POINTER] * 3),
    "arb_layout_matvec": (None, [_INT] * 2 + [_POINTER] * 2 + [_LONG] * 3 + [_POINTER] * 2),
    "arb_read_memory": (_LONG, [_POINTER, _LONG]),
    "arb_multiply_registers": (_LONG, [_INT, _LONG]),
}


class NativeSearch(NamedTuple):
    """The loaded library; if it is None, `fault` has the reason."""

    library: ctypes.CDLL | None
    fault: str = ""


def native_kernels() -> ctypes.CDLL:
    """The loaded library. Call it only where `uses_native` is true or `instruction_set` is not 0."""
    library = native_library()
    assert library is not None
    return library


@cache  # asked by every kernel call
def native_library() -> ctypes.CDLL | None:
    """The loaded library, or None where it is not installed, is of another version, or cannot be loaded."""
    return find_native_library().library


@cache
def find_native_library() -> NativeSearch:
    """Load the first library of this code's ABI version, beside this file or in the installed package arb_kernels."""
    installed = find_spec("arb_kernels")
    folders = [Path(__file__).parent, *map(Path, (installed and installed.submodule_search_locations) or ())]
    faults = []
    for path in [path for folder in folders for path in sorted(folder.glob("arb_native*.so"))]:
        try:
            library = ctypes.CDLL(str(path))
            version = library.arb_abi_version()
        except (OSError, AttributeError) as error:  # not loadable here, or not ours
            faults.append(f"{path} cannot be loaded ({error})")
            continue
        if version == ABI_VERSION:
            return NativeSearch(_with_signatures(library))
        faults.append(f"{path} has ABI version {version}, not {ABI_VERSION}")
    return NativeSearch(None, faults[0] if faults else "no library of the package arb_kernels was found")


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)  # the matmuls exist on x86 only
        if function is not None:
            function.restype, function.argtypes = result, arguments
    return library


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a contiguous CPU tensor's first element."""
    if tensor is None:
        return None
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    return tensor.data_ptr()
