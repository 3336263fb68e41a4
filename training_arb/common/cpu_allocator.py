"""Keeps freed memory in the process instead of returning it to the system after every step.

Each step allocates and frees the same activations and transients. By default glibc maps and unmaps every large block,
and the page faults take a tenth to a quarter of a training step on a CPU (LOG.md).
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGEST_THRESHOLD = 32 << 20  # bytes; the most that glibc accepts


def _libc_function(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def keep_freed_memory() -> bool:
    """Set glibc's malloc so for this process; without glibc do nothing. Returns whether it was set."""
    mallopt = _libc_function("mallopt")
    if mallopt is None:
        return False
    settings = {M_MMAP_THRESHOLD: LARGEST_THRESHOLD, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20}
    return all(mallopt(name, value) for name, value in settings.items())


def return_freed_memory() -> bool:
    """Return free memory to the system, so that a peak measured from here on belongs to the next job."""
    malloc_trim = _libc_function("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(0))
