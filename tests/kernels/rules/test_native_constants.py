"""The C++ kernels share their numbers with Python through one generated header."""

import re

import pytest

from arb_kernels.rules.native_constants import CONSTANTS, HEADER, header

SOURCES = sorted(path for path in HEADER.parent.iterdir() if path.suffix in (".cpp", ".h") and path != HEADER)


def test_the_header_is_what_python_says():
    assert HEADER.read_text() == header(), "write it: python -m arb_kernels.rules.native_constants"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_sets_a_shared_constant_again(path):
    names = {name for constants in CONSTANTS.values() for name in constants}
    declared = re.findall(r"\b(\w+)\s*=\s*[-\d.]\w*[,;]", path.read_text())
    assert not names & set(declared)
