"""Chooses the implementation of each kernel; ARB_BACKEND or, in tests, `use_backend` overrides the choice.

All backends give the same integers, so the choice affects speed only. `native` has kernels for the CPU, `triton` for
GPUs (and for the CPU under TRITON_INTERPRET=1), `torch` for every device. A backend that is named runs or fails: it
raises ValueError at the first kernel called on a device that it has no kernels for. Where a backend lacks one kernel,
or cannot take strided tensors or that many trits a weight, torch runs that call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .native_library import AVX2, AVX512_VNNI, find_native_library, native_library
from .triton_support import triton, triton_runs_on

BACKENDS = ("torch", "native", "triton")
INSTALL = "run `pip install PATH`, PATH being a checkout of the ARB repository (it needs a C++ compiler)"
INSTRUCTION_SETS = ("best", "avx2")
KERNEL_TRITS = 2  # trits a weight that the native and Triton kernels support at most; torch also supports three
CPU = torch.device("cpu")
_override: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the kernels called in the block on one backend. Raises ValueError if it is not installed."""
    global _override
    _check_installed(name)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def _check_installed(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"ARB_BACKEND={name!r} is not one of {', '.join(BACKENDS)}")
    if name == "native" and native_library() is None:
        raise ValueError(f"ARB_BACKEND='native': {find_native_library().fault}; {INSTALL}")
    if name == "triton" and triton is None:
        raise ValueError("ARB_BACKEND='triton', but triton is not installed: pip install triton")


def _check_runs_on(name: str, device: torch.device) -> None:
    _check_installed(name)
    if name == "native" and device.type != "cpu":
        raise ValueError(f"ARB_BACKEND='native': does not support {device.type} tensors; set torch, or unset it")
    if name == "triton" and not triton_runs_on(device):
        needs = "set TRITON_INTERPRET=1" if device.type == "cpu" else "use a GPU of compute capability 8.0 or more"
        raise ValueError(f"ARB_BACKEND='triton': does not run on {device.type} tensors here; {needs}, or unset it")


def backend_for(device: torch.device) -> str:
    """The fastest backend for tensors on `device`, or the one asked for. Raises ValueError where that one does not run
    on the device. Warns once where the native kernels are not found on a CPU."""
    wanted = _override or os.environ.get("ARB_BACKEND")
    if wanted:
        _check_runs_on(wanted, device)
        return wanted
    if device.type == "cpu" and native_library() is not None:
        return "native"
    if device.type == "cpu":
        _warn_of_slow_kernels()
        return "torch"
    return "triton" if triton_runs_on(device) else "torch"


@cache
def _warn_of_slow_kernels() -> None:
    """Warn, once per process, that the native kernels were not found and would be faster."""
    logging.getLogger(__name__).warning(
        f"ARB runs on torch's CPU kernels, the native ones are faster: {find_native_library().fault}; {INSTALL}, or set"
        " ARB_BACKEND=torch to keep torch's"
    )


def _all_contiguous(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    # a list: a generator takes twice as long, at every linear layer of every token
    return all([tensor is None or tensor.is_contiguous() for tensor in tensors])  # noqa: C419


def uses_native(first: torch.Tensor, *others: torch.Tensor | None, trits: int = 1) -> bool:
    """Whether the native kernels accept these tensors, of weights of so many trits: they must be on the CPU, and those
    that are not None contiguous."""
    supported = first.is_cpu and backend_for(CPU) == "native" and trits <= KERNEL_TRITS
    return supported and _all_contiguous((first, *others))


def uses_triton(first: torch.Tensor, *others: torch.Tensor | None, trits: int = 1) -> bool:
    """Whether the Triton kernels accept these tensors, of weights of so many trits: Triton must run on their device,
    and those that are not None must be contiguous."""
    supported = backend_for(first.device) == "triton" and trits <= KERNEL_TRITS
    return supported and _all_contiguous((first, *others))


def instruction_set() -> int:
    """The best matmul instruction set of this CPU: AVX512_VNNI, AVX2, or 0 for none. ARB_ISA=avx2 limits it to AVX2."""
    wanted = os.environ.get("ARB_ISA") or "best"
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f"ARB_ISA={wanted!r} is not one of {', '.join(INSTRUCTION_SETS)}")
    best = _best_instruction_set()
    return min(best, AVX2) if wanted == "avx2" else best


@cache
def _best_instruction_set() -> int:
    library = native_library()
    return library.arb_instruction_set() if library is not None else 0


def describe_backend(device: torch.device) -> str:
    """A description of the kernels that run on `device`, in one line."""
    backend, instructions = backend_for(device), instruction_set()
    if backend != "native":
        return f"{backend} kernels on {device.type}"
    names = {AVX512_VNNI: "AVX-512 VNNI", AVX2: "AVX2"}
    return f"native kernels on {device.type}, {names.get(instructions, 'portable')}"
