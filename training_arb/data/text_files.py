"""Which files a run reads: paths, folders, globs and their weights; the standard library; whole files held out."""

from __future__ import annotations

import glob
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

HELD_OUT_SHARE = 0.05
STANDARD_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
# encodings: character maps, near copies of each other, of which some would be held out
STANDARD_LIBRARY_SKIPS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"}


def standard_library_files() -> list[Path]:
    """Source and docs of the running Python's own standard library: real text that needs no download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*") if path.suffix in STANDARD_LIBRARY_SUFFIXES and path.is_file())
    return sorted(path for path in files if not STANDARD_LIBRARY_SKIPS.intersection(path.relative_to(root).parts))


def collect_files(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (recursively, hidden ones left out) and globs, sorted, each once.

    Links to folders are not followed below what a pattern names. Raises ValueError naming the pattern without a file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        if not pattern:
            raise ValueError("data='' is empty; for the current folder give .")
        path = Path(pattern)
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file())
            files = {p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)}
        elif path.is_file():
            files = {path}
        else:
            files = {Path(p) for p in _expand(pattern) if Path(p).is_file()}
        if not files:
            raise ValueError(f"data={pattern!r}: no such file, or no file in it")
        found |= {file.resolve() for file in files}
    return sorted(found)


def _expand(pattern: str) -> Iterator[str]:
    """Files that match a glob. `**` does not follow links, which could form a cycle."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    cut = parts.index("**")
    head, tail = "/".join(parts[:cut]), "/".join(parts[cut + 1 :]) or "*"
    for base in glob.glob(f"{head}/") if cut else ["."]:
        for folder, names, _ in os.walk(base):
            names[:] = [name for name in names if not name.startswith(".")]
            yield from _expand(os.path.join(glob.escape(folder), tail))


def parse_weights(items: Sequence[str]) -> list[tuple[str, float | None]]:
    """(path or glob, weight or None) of each PATH[:WEIGHT]; a path with a colon that exists is a path.

    Raises ValueError naming the item whose weight is not a positive finite number.
    """
    parsed: list[tuple[str, float | None]] = []
    for item in items:
        pattern, colon, tail = item.rpartition(":")
        if not colon or Path(item).exists() or next(_expand(item), None) is not None:
            parsed.append((item, None))
            continue
        try:
            weight = float(tail)
        except ValueError:
            raise ValueError(f"data={item!r}: no such file, and {tail!r} is not a weight") from None
        if not pattern or not 0 < weight < math.inf:
            raise ValueError(f"data={item!r}: must be PATH:WEIGHT, the weight a positive finite number")
        parsed.append((pattern, weight))
    return parsed


def by_name_hash(files: Sequence[Path]) -> list[Path]:
    """Sort key by the last three parts of the path: the same wherever the folder is."""
    return sorted(files, key=lambda path: zlib.crc32(str(Path(*path.parts[-3:])).encode()))


def split_files(files: Sequence[Path], share: float = HELD_OUT_SHARE) -> tuple[list[Path], list[Path]]:
    """Train and held-out files: whole files, chosen by a hash of their names, until they hold `share` of the bytes.

    A file that alone would more than double the share stays in training; held out is then nothing, or less.
    """
    wanted = share * sum(path.stat().st_size for path in files)
    held_out, size = set(), 0
    for path in by_name_hash(files):
        if size < wanted and size + path.stat().st_size <= 2 * wanted:
            held_out.add(path)
            size += path.stat().st_size
    return sorted({*files} - held_out), sorted(held_out)
