"""What the scripts share: user errors as one line with exit code 2, and loading a model by folder or hub name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from modeling_arb import ArbForCausalLM

from .checkpoint_source import find_checkpoint



class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every option, and the module docstring's examples as they are written."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit. ValueError and OSError, the user's errors, become one line and exit code 2.

    A gradient that is not finite, a run's error, ends with exit code 1. ARB_TRACEBACK=1 shows where it came from.
    """
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("ARB_TRACEBACK"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def load_model(name: str, revision: str | None = None) -> ArbForCausalLM:
    """An ArbForCausalLM in evaluation mode, from a folder or a hub name. Raises ValueError when there is none."""
    return ArbForCausalLM.from_pretrained(find_checkpoint(name, revision).folder).eval()
