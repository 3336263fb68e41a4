"""Memory in use at a moment, without what the allocator keeps, and the peak of resident memory."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

from training_arb.common.cpu_allocator import return_freed_memory

MEGABYTE = 2**20


class _Mallinfo2(ctypes.Structure):
    """Of malloc.h; uordblks: bytes in use in arenas, hblkhd: bytes in blocks that malloc mapped one by one."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def live_memory_mb(device: torch.device) -> float:
    """Allocated memory in MB: of the device; on the CPU of the process's heap, or, without glibc, what is resident."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / MEGABYTE
    describe = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform.startswith("linux") else None
    if describe is None:
        return resident_mb()
    describe.restype, describe.argtypes = _Mallinfo2, []
    heap = describe()
    return (heap.uordblks + heap.hblkhd) / MEGABYTE


def peak_device_mb(device: torch.device) -> float:
    """The peak of allocated memory on an accelerator in MB; 0 on the CPU, where the process's peak counts."""
    return torch.cuda.max_memory_allocated(device) / MEGABYTE if device.type == "cuda" else 0.0


def reset_device_peak(device: torch.device) -> None:
    """Reset an accelerator's peak; does nothing on the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def resident_mb() -> float:
    """Resident memory of the process, in MB."""
    import psutil  # not needed on machines where /proc says as much

    return psutil.Process().memory_info().rss / MEGABYTE


def reset_peak_memory() -> None:
    """Reset the process's peak memory, if the system supports it (Linux)."""
    gc.collect()
    return_freed_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_memory_mb() -> float:
    """Peak resident memory in MB since the last reset; on other systems, the current one."""
    try:
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    except (OSError, StopIteration):
        return resident_mb()
