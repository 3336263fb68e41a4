"""What the scripts share: errors as one line with an exit code, and loading a model by folder or hub name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from modeling_arb import ArbForCausalLM

from .checkpoint_source import find_checkpoint
from .rank_loss import RankLostError

BAD_INPUT, RUN_FAILED = 2, 1
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every option, and the module docstring's examples as they are written."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit. An error that is no bug is one line; ARB_TRACEBACK=1 shows where it came from.

    Exit codes: 2, what was given is wrong: an option, data, a checkpoint, a disk (ValueError, OSError); 1, the run
    itself went wrong: a loss or a gradient that is not finite or explodes (FloatingPointError); 75, another rank was
    lost, and the same command may well go on (RankLostError).
    """
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, FloatingPointError, RankLostError) as error:
        if os.environ.get("ARB_TRACEBACK"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        if isinstance(error, RankLostError):
            _leave(TRY_AGAIN)
        sys.exit(RUN_FAILED if isinstance(error, FloatingPointError) else BAD_INPUT)


def _leave(code: int) -> None:
    """End this process now: to tidy up broken connections may take a timeout, or abort it with another exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def load_model(name: str) -> ArbForCausalLM:
    """An ArbForCausalLM in evaluation mode, from a folder or a hub name. Raises ValueError when there is none.

    The folder of a peft adapter gives its base with the adapter on it.
    """
    if (Path(name) / "adapter_config.json").is_file():
        from .lora_adapter import load_adapter  # peft is needed here alone

        return load_adapter(name)
    return ArbForCausalLM.from_pretrained(find_checkpoint(name).folder).eval()
