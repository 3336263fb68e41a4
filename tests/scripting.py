"""Running the scripts in this process, as a shell would."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_script(name, *arguments):
    """Run scripts/NAME.py with arguments; returns its exit code."""
    before = sys.argv
    sys.argv = [f"scripts/{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    raise AssertionError(f"{name} ended without an exit code")
