"""Keep freed memory in the process instead of giving it back to the system after every step.

Each step allocates and frees the same activations and transients. By default glibc maps and unmaps every large one, and
the page faults cost a tenth to a quarter of a training step on a CPU (LOG.md).
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGEST_BLOCK = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> bool:
    """Tell glibc's malloc so, for this process; elsewhere do nothing. Returns whether it was told."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_THRESHOLD: LARGEST_BLOCK, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20}
    return all(mallopt(name, value) for name, value in settings.items())
