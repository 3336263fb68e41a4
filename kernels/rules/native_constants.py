"""Writes native/constants.h, the numbers that the C++ kernels share with the Python modules which set them.

    python -m arb_kernels.rules.native_constants

A test compares the header with what this module writes. Its namespaces have the names of the modules.
"""

from __future__ import annotations

from pathlib import Path

import arb_kernels.formats.decode_layout as decode_layout
import arb_kernels.formats.exponents as exponents
import arb_kernels.formats.gradient_sum_format as gradient_sum_format
import arb_kernels.formats.momentum_format as momentum_format
import arb_kernels.formats.packing as packing
import arb_kernels.native_library as native_library
import arb_kernels.random_bits as random_bits

HEADER = Path(__file__).parents[1] / "native" / "constants.h"
FORMAT = momentum_format.MomentumFormat(4)  # the only one with a native kernel
CONSTANTS: dict[str, dict[str, int | float]] = {
    "native_library": {
        "ABI_VERSION": native_library.ABI_VERSION,
        "AVX2": native_library.AVX2,
        "AVX512_VNNI": native_library.AVX512_VNNI,
    },
    "random_bits": {
        "MULTIPLIER_1": random_bits.MIX_MULTIPLIERS[0],
        "MULTIPLIER_2": random_bits.MIX_MULTIPLIERS[1],
        "GOLDEN_STEP": random_bits.GOLDEN_STEP,
    },
    "packing": {
        "TRITS_PER_BYTE": packing.TRITS_PER_BYTE,
        "LARGEST_BYTE": packing.LARGEST_BYTE,
    },
    "decode_layout": {
        "ROWS": decode_layout.ROWS,
        "COLUMNS": decode_layout.COLUMNS,
        "PARTS": decode_layout.PARTS,
        "VECTOR": decode_layout.VECTOR_BYTES,
    },
    "exponents": {
        "SQRT_HALF": exponents.SQRT_HALF,
    },
    "momentum_format": {
        "BITS": FORMAT.bits,
        "CELL": FORMAT.cell,
        "LARGEST_CODE": FORMAT.largest_code,
        "BLOCK": momentum_format.BLOCK,
        "CLIP_RMS": momentum_format.CLIP_RMS,
        "STATISTIC_BITS": momentum_format.STATISTIC_BITS,
        "STATISTIC_OCTAVES": momentum_format.STATISTIC_OCTAVES,
        "UPDATE_STEPS": momentum_format.UPDATE_STEPS,
        "UPDATE_LIMIT": momentum_format.UPDATE_LIMIT,
    },
    "gradient_sum_format": {
        "BLOCK": gradient_sum_format.BLOCK,
        "LEAST_EXPONENT": gradient_sum_format.LEAST_EXPONENT,
        "LARGEST_EXPONENT": gradient_sum_format.LARGEST_EXPONENT,
        "EXPONENT_OFFSET": gradient_sum_format.EXPONENT_OFFSET,
        "BEYOND_127": gradient_sum_format.BEYOND_127,
    },
}
TOP = """\
// Written by rules/native_constants.py from the Python modules that the namespaces are named after; not to be edited.
#pragma once

#include <cstdint>
"""


def _type_of(value: int | float) -> str:
    return "double" if isinstance(value, float) else "int" if value < 1 << 31 else "uint32_t"


def _literal(value: int | float) -> str:
    return repr(value) if isinstance(value, float) or value < 1 << 16 else f"0x{value:X}"


def header() -> str:
    """The text of native/constants.h: one declaration for each module and C++ type."""
    lines = [TOP]
    for module, constants in CONSTANTS.items():
        lines.append(f"namespace {module} {{")
        for kind in ("int", "uint32_t", "double"):
            of_kind = [f"{name} = {_literal(value)}" for name, value in constants.items() if _type_of(value) == kind]
            lines += [f"constexpr {kind} {', '.join(of_kind)};"] if of_kind else []
        lines.append("}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    HEADER.write_text(header())
