"""What scripts share: the form of their help, checks of their numbers, and errors as one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping

import torch
from transformers.utils.logging import disable_progress_bar

from configuration_arb.trits_per_weight import ROLES, TritsPerWeight, parse_trits
from training_arb.common.error_lines import first_line
from training_arb.ranks.rank_loss import RankLostError, RanksPartedError

BAD_INPUT, RUN_FAILED = 2, 1
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
ALLOCATOR = "DefaultCPUAllocator: "  # what torch says of missing memory follows it
TRITS_HELP = (
    f"Trits a weight: 1, 2, or numbers by role, such as embedding:2,head:2; the roles are {', '.join(ROLES)}."
    " Default: the preset's"
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option, and keeps the line breaks of the description."""


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def add_trits_option(parser: argparse.ArgumentParser) -> None:
    """--trits_per_weight, also with dashes. `trits_field` reads it."""
    parser.add_argument("--trits_per_weight", "--trits-per-weight", metavar="TRITS", help=TRITS_HELP)


def trits_field(text: str | None) -> dict[str, TritsPerWeight]:
    """The config field that --trits_per_weight sets; none where the option was not given. Raises ValueError."""
    return {} if text is None else {"trits_per_weight": parse_trits(text)}


def check_least(options: object, least: Mapping[str, float]) -> None:
    """Raises ValueError naming the first option below its least value; those that are None pass."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not value >= smallest:
            raise ValueError(f"{name}={value} must be at least {smallest}")


def check_known(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError naming the first of an option's values that is not known."""
    known = list(known)
    for value in values:
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


def quiet_transformers() -> None:
    """Show errors of transformers only, and no progress bar for each file that it reads or writes."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit. An error that is not a bug is one line; ARB_TRACEBACK=1 shows where it came from.

    Exit codes: 2, the input is wrong: an option, data, a checkpoint, a disk (ValueError, OSError), or it needs more
    memory than there is; 1, the run itself failed: a loss or a gradient is not finite or explodes
    (FloatingPointError), ranks differ (RanksPartedError); 75, another rank was lost, and the same command may succeed
    (RankLostError).
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
    """The exit code for an error; None for a bug, whose traceback is shown."""
    if isinstance(error, RankLostError):
        return TRY_AGAIN
    if isinstance(error, FloatingPointError | RanksPartedError):
        return RUN_FAILED
    return BAD_INPUT if isinstance(error, ValueError | OSError) or _out_of_memory(error) else None


def _out_of_memory(error: Exception) -> bool:
    refused = isinstance(error, RuntimeError) and ALLOCATOR in str(error)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _in_one_line(error: Exception) -> str:
    line = first_line(error)
    if _out_of_memory(error):
        reason = line.rpartition(ALLOCATOR)[2].partition(". ")[0]
        return f"out of memory ({reason}): a smaller batch, ctx or model needs less"
    return line


def _leave(code: int) -> None:
    """End this process now: closing broken connections may take a timeout, or abort it with another exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
