"""Sets the mode of files by the umask: the safetensors library writes with mode 0600."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def follow_umask(files: Iterable[str | Path]) -> None:
    """Give each file the mode of a newly created file in its folder."""
    modes: dict[Path, int] = {}
    for path in map(Path, files):
        if path.parent not in modes:
            modes[path.parent] = _mode_of_new_file(path.parent)
        path.chmod(modes[path.parent])


def _mode_of_new_file(folder: Path) -> int:
    """Creates a file to find out: reading the umask would set it for all threads, and a folder can have its own
    defaults."""
    probe = folder / f".mode-{os.getpid()}"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    try:
        return probe.stat().st_mode & 0o666
    finally:
        probe.unlink()
