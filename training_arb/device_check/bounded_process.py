"""Run a command with a time limit and keep its last lines, for the report of a failure."""

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
    """The end of a command: its exit code, None if it was killed at its time limit."""

    code: int | None
    seconds: float
    last_lines: list[str]

    @property
    def hung(self) -> bool:
        return self.code is None


def run_bounded(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, own_group: bool = True
) -> Ended:
    """Run a command; after `seconds` kill it and every process that it started.

    own_group: False for a command inside another bounded command: it stays in the outer process group, is killed with
    it, and is killed alone at its own limit.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process, own_group)
        output.seek(0)
        lines = output.read().decode(errors="replace").replace("\r", "\n").splitlines()
    written = [line[:LONGEST_LINE] for line in lines if line.strip()]
    return Ended(code, time.monotonic() - started, written[-LAST_LINES:])


def _kill(process: subprocess.Popen, own_group: bool) -> None:
    """The process and its group, if anything of it is left."""
    if own_group:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_SECONDS)
