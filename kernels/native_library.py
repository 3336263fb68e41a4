"""The native CPU kernels: found, loaded and checked once, through a plain C ABI. Absent, torch does the work.

`pip install` compiles kernels/native/*.cpp where there is a compiler (setup.py). The library takes its threads from the
OpenMP runtime that torch brings, so `torch.set_num_threads` governs it too.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

ABI_VERSION = 3
AVX512_VNNI, AVX2 = 2, 1
_POINTER, _INT, _LONG, _FLOAT, _KEY = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_uint32
_SIGNATURES = {
    "arb_instruction_set": (_INT, []),
    "arb_advise_huge_pages": (None, [_POINTER, _LONG]),
    "arb_momentum_fold": (None, [_POINTER] * 3 + [_LONG] * 2 + [_KEY, _POINTER] + [_FLOAT] * 2),
    "arb_momentum_update": (_LONG, [_POINTER] * 4 + [_LONG] * 2 + [_KEY, _POINTER] + [_FLOAT] * 6),
    "arb_add_gradient": (None, [_POINTER] * 3 + [_LONG] * 2 + [_KEY]),
    "arb_add_sum": (None, [_POINTER] * 3 + [_LONG] * 2),
    "arb_quantise_tokens": (None, [_POINTER] + [_LONG] * 2 + [_POINTER] * 2),
    "arb_quantise_gradient": (None, [_POINTER] + [_LONG] * 2 + [_POINTER] * 6),
    "arb_unpack_trits": (None, [_POINTER] + [_LONG] * 2 + [_POINTER]),
    "arb_int8_matmul": (None, [_INT] + [_POINTER] * 2 + [_INT] * 2 + [_LONG] * 3 + [_POINTER] * 3),
    "arb_two_bit_matmul": (None, [_INT] + [_POINTER] * 2 + [_LONG] * 3 + [_POINTER] * 3),
    "arb_two_bit_matvec": (None, [_INT] + [_POINTER] * 2 + [_LONG] * 3 + [_POINTER] * 2),
    "arb_read_memory": (_LONG, [_POINTER, _LONG]),
    "arb_multiply_registers": (_LONG, [_INT, _LONG]),
}


@cache
def native_library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built, is of another version, or cannot be loaded."""
    for path in sorted(Path(__file__).parent.glob("arb_native*.so")):
        try:
            library = ctypes.CDLL(str(path))
            if library.arb_abi_version() != ABI_VERSION:
                continue
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name, None)  # the matmuls exist on x86 only
                if function is None:
                    continue
                function.restype, function.argtypes = result, arguments
            return library
        except (OSError, AttributeError):  # not loadable here, or not ours
            continue
    return None


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a contiguous CPU tensor's first element."""
    if tensor is None:
        return None
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    return tensor.data_ptr()
