"""Files that others may read: the safetensors library writes with mode 0600, whatever the process's umask says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def follow_umask(files: Iterable[str | Path]) -> None:
    """Give each file the mode that a new one beside it gets."""
    modes: dict[Path, int] = {}
    for path in map(Path, files):
        if path.parent not in modes:
            modes[path.parent] = _mode_of_new_file(path.parent)
        path.chmod(modes[path.parent])


def _mode_of_new_file(folder: Path) -> int:
    """By making one: reading the umask means setting it, for all threads, and a folder may have rules of its own."""
    probe = folder / f".mode-{os.getpid()}"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    try:
        return probe.stat().st_mode & 0o666
    finally:
        probe.unlink()
