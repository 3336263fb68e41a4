"""Times jobs, describes the machine, and measures its physical limits.

Jobs are timed round-robin in a random order, so that noise on a shared machine affects all of them alike. Rows hold
percentiles instead of a mean. The physical limits are measured in the same rounds and are medians too: on a shared
machine DRAM bandwidth changes by a factor of two within seconds.
"""

from __future__ import annotations

import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from arb_kernels.backend import describe_backend, instruction_set
from arb_kernels.formats.decode_layout import in_huge_pages
from arb_kernels.native_library import native_kernels, pointer

MICROSECONDS, MILLISECONDS = 1e6, 1e3  # in a second
REGISTER_ROUNDS = 300_000  # about ten milliseconds of vector instructions
READ_UNIT = 512  # bytes: what arb_read_memory takes a multiple of


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, over all rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(*np.percentile(seconds, [20, 50, 80]).tolist())

    def row(self, name: str, per_second: float) -> dict[str, float]:
        """`{name}_p20`, `{name}_p50` and `{name}_p80` in units of which a second has `per_second`."""
        return {f"{name}_{key}": getattr(self, key) * per_second for key in ("p20", "p50", "p80")}


def interleaved(
    jobs: Mapping[str, Callable[[], object]], repeats: int, burst_seconds: float = 0.0, label: str = ""
) -> dict[str, Timing]:
    """Time every job `repeats` times, after a warm-up, one round of all of them after the other.

    burst_seconds: repeat a fast job until a sample takes about this long, and report the time per call. 0: one call per
    sample.
    """
    calls = {name: _calls_in(job, burst_seconds) for name, job in jobs.items()}
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    shuffle = random.Random(0)
    for _ in tqdm(range(repeats), desc=label, mininterval=2, leave=False):
        for name in shuffle.sample(list(jobs), len(jobs)):
            started = time.perf_counter()
            for _ in range(calls[name]):
                jobs[name]()
            samples[name].append((time.perf_counter() - started) / calls[name])
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def _calls_in(job: Callable[[], object], burst_seconds: float) -> int:
    """Warm up: the first call may compile and allocate; the second gives the time."""
    job()
    started = time.perf_counter()
    job()
    return max(1, math.ceil(burst_seconds / (time.perf_counter() - started)))


def rotating(call: Callable[[int], object], copies: int) -> Callable[[], object]:
    """A job that calls with 0, 1, ... copies - 1, 0, ...: with enough copies of a matrix, each comes from DRAM."""
    position = -1

    def job() -> object:
        nonlocal position
        position = (position + 1) % copies
        return call(position)

    return job


@dataclass(frozen=True)
class Limits:
    """What the machine can do, with the threads that torch has; None without the native kernels."""

    dram_gb_per_s: float | None = None
    int8_gops: float | None = None

    def gops(self, operations: float, dram_bytes: float) -> float | None:
        """The most operations (a multiply or an add is one) in 1e9/s for work that must read `dram_bytes`."""
        if self.dram_gb_per_s is None or self.int8_gops is None:
            return None
        return min(self.dram_gb_per_s * operations / dram_bytes, self.int8_gops)


class LimitJobs:
    """The physical limits as jobs for `interleaved`, and what their timings mean."""

    READ, MULTIPLY = "limit: read DRAM", "limit: multiply registers"

    def __init__(self, buffer_bytes: int = 512_000_000):
        self.buffer = in_huge_pages(torch.ones(max(1, buffer_bytes // READ_UNIT) * READ_UNIT, dtype=torch.uint8))
        self.instructions = instruction_set()
        self.operations = 0
        self.jobs: dict[str, Callable[[], object]] = {}
        if self.instructions:
            self.jobs = {self.READ: self._read, self.MULTIPLY: self._multiply}

    def _read(self) -> None:
        native_kernels().arb_read_memory(pointer(self.buffer), self.buffer.numel())

    def _multiply(self) -> None:
        self.operations = native_kernels().arb_multiply_registers(self.instructions, REGISTER_ROUNDS)

    def limits(self, timings: Mapping[str, Timing]) -> Limits:
        if not self.jobs:
            return Limits()
        return Limits(
            dram_gb_per_s=self.buffer.numel() / timings[self.READ].p50 / 1e9,
            int8_gops=self.operations / timings[self.MULTIPLY].p50 / 1e9,
        )


def measure_limits(repeats: int = 10, buffer_bytes: int = 512_000_000) -> Limits:
    """The limits, measured separately, for benchmarks that cannot include them in their rounds."""
    jobs = LimitJobs(buffer_bytes)
    return jobs.limits(interleaved(jobs.jobs, repeats, label="limits"))


def set_threads(threads: int | None) -> int:
    """Set the threads of torch and of the native kernels; returns their number. Raises ValueError if it is below 1."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def describe_environment(device: str = "cpu") -> dict[str, object]:
    """Where and with what a row was measured; no host name and no path."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "backend": describe_backend(torch.device(device)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
