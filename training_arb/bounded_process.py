"""Run a command for at most so long, and keep its last lines: what is left to read when it fails or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

LAST_LINES = 25
LONGEST_LINE = 500  # characters
GRACE_SECONDS = 10  # to die in: a process inside a GPU's driver may not


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, None where it was killed at its bound."""

    code: int | None
    seconds: float
    last_lines: list[str]

    @property
    def hung(self) -> bool:
        return self.code is None


def run_bounded(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command; after `seconds` kill it and every process that it started."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
        output.seek(0)
        lines = output.read().decode(errors="replace").replace("\r", "\n").splitlines()
    written = [line[:LONGEST_LINE] for line in lines if line.strip()]
    return Ended(code, time.monotonic() - started, written[-LAST_LINES:])


def _kill_group(process: subprocess.Popen) -> None:
    """The process and its children, if any of them is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_SECONDS)
