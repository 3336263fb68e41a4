"""Runs a script's main: errors become one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch

from training_arb.ranks.rank_loss import RankLostError, RanksPartedError

BAD_INPUT, RUN_FAILED = 2, 1
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
ALLOCATOR = "DefaultCPUAllocator: "  # torch's words for no memory begin behind it


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every option, and the module docstring's examples as they are written."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit. An error that is no bug is one line; ARB_TRACEBACK=1 shows where it came from.

    Exit codes: 2, what was given is wrong: an option, data, a checkpoint, a disk (ValueError, OSError), or it
    asks for more memory than there is; 1, the run itself went wrong: a loss or a gradient is not finite or explodes
    (FloatingPointError), ranks differ (RanksPartedError); 75, another rank was lost, and the same command may well go
    on (RankLostError).
    """
    try:
        sys.exit(main() or 0)
    except Exception as error:
        code = exit_code(error)
        if code is None or os.environ.get("ARB_TRACEBACK"):
            raise
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        if code == TRY_AGAIN:
            _leave(code)
        sys.exit(code)


def exit_code(error: Exception) -> int | None:
    """What the process ends with for it; None: it is a bug, to be shown whole."""
    if isinstance(error, RankLostError):
        return TRY_AGAIN
    if isinstance(error, FloatingPointError | RanksPartedError):
        return RUN_FAILED
    return BAD_INPUT if isinstance(error, ValueError | OSError) or _out_of_memory(error) else None


def _out_of_memory(error: Exception) -> bool:
    refused = isinstance(error, RuntimeError) and ALLOCATOR in str(error)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if _out_of_memory(error):
        reason = lines[0].rpartition(ALLOCATOR)[2].partition(". ")[0]
        return f"out of memory ({reason}): a smaller batch, ctx or model needs less"
    return lines[0]


def _leave(code: int) -> None:
    """End this process now: to tidy up broken connections may take a timeout, or abort it with another exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
