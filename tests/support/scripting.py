"""Running the scripts in this process, as a shell would."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(name, *arguments):
    """Run scripts/NAME.py, or scripts/developer/NAME.py, with arguments; returns its exit code."""
    path = next((ROOT / "scripts").rglob(f"{name}.py"))
    before = sys.argv
    sys.argv = [f"scripts/{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    raise AssertionError(f"{name} ended without an exit code")
