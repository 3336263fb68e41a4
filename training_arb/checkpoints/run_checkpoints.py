"""Checkpoints of a run: numbered folders, pointers to the latest and the best, and the choice of the one to resume.

A pointer is a relative symlink, so that `runs/mine/best` is a folder to any tool. On file systems without symlinks it
is a text file with the same content, which only `--resume_from_checkpoint` reads.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .checkpoint_files import CHECKSUMS_FILE, RUN_FILE, check_checkpoint, check_finished, is_finished

LATEST, BEST = "latest", "best"
NUMBERED = re.compile(r"checkpoint-(\d+)")

Check = Callable[[Path], None]


def step_of(checkpoint: str | Path) -> int:
    """The step that a numbered checkpoint was written at."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def _numbered_folders(run_dir: str | Path) -> Iterator[Path]:
    return (path for path in Path(run_dir).glob("checkpoint-*") if NUMBERED.fullmatch(path.name) and path.is_dir())


def numbered_checkpoints(run_dir: str | Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(filter(is_finished, _numbered_folders(run_dir)), key=step_of)


def unfinished_checkpoints(run_dir: str | Path) -> list[Path]:
    """Numbered folders that were not written completely, oldest first, without folders of other programs."""
    ours = (
        path
        for path in _numbered_folders(run_dir)
        if (path / RUN_FILE).is_file() or all(file.name.startswith(".") for file in path.iterdir())
    )
    return sorted((path for path in ours if not is_finished(path)), key=step_of)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; without its checksums, which go first, it counts as unfinished."""
    (checkpoint / CHECKSUMS_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_old(run_dir: str | Path, limit: int | None, kept: Collection[Path]) -> None:
    """Delete numbered checkpoints until `limit` are left, never one of `kept`, the last of which was just written.

    Those with a higher number, of a run that was resumed from an earlier step, go first, then the oldest.
    """
    if not limit or limit < 0:
        return
    found = numbered_checkpoints(run_dir)
    newest = step_of(list(kept)[-1])
    spare = sorted(
        (path for path in found if path not in kept), key=lambda path: (step_of(path) < newest, step_of(path))
    )
    for path in spare[: max(0, len(found) - limit)]:
        discard(path)


def point(run_dir: str | Path, pointer: str, name: str) -> None:
    """Point `pointer` (latest or best) at the checkpoint `name`, atomically."""
    staged = Path(run_dir) / f".{pointer}.writing"
    staged.unlink(missing_ok=True)
    try:
        staged.symlink_to(name)
    except OSError:
        staged.write_text(name, encoding="utf-8")
    os.replace(staged, Path(run_dir) / pointer)


def pointed(run_dir: str | Path, pointer: str) -> Path | None:
    """The finished checkpoint that `pointer` points at; None if it does not exist."""
    path = Path(run_dir) / pointer
    try:
        name = os.readlink(path) if path.is_symlink() else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    target = path.with_name(name) if NUMBERED.fullmatch(name) else None
    return target if target is not None and is_finished(target) else None


def newest_sound_checkpoint(run_dir: str | Path, check: Check = check_checkpoint) -> tuple[Path | None, list[str]]:
    """The newest finished checkpoint that passes `check`, and the errors of later ones.

    Raises ValueError if there are checkpoints and all are damaged.
    """
    found, latest = numbered_checkpoints(run_dir), pointed(run_dir, LATEST)
    if latest is not None:  # those with a higher number are of a run that was resumed from an earlier step
        found = found[: found.index(latest) + 1]
    faults = []
    for checkpoint in reversed(found):
        try:
            check(checkpoint)
        except ValueError as fault:
            faults.append(str(fault))
        else:
            return checkpoint, faults
    if faults:
        raise ValueError(
            "; ".join(faults) if len(faults) == 1 else f"{faults[0]}; all other checkpoints are damaged too"
        )
    return None, []


def checkpoint_to_resume(
    output_dir: str | Path, wanted: str | None, check: Check = check_checkpoint
) -> tuple[str | None, list[str]]:
    """The checkpoint for `wanted`, the value of --resume_from_checkpoint, and warnings.

    `latest` (or `true`) and `best` must exist; `auto` may, and is None at the beginning of a run. A damaged newest
    checkpoint gives way to the one before it. A folder is taken as it is. Raises ValueError when the checkpoint is not
    found, and when a run from scratch would overwrite another run.
    """
    output_dir = Path(output_dir)
    beginning = wanted is None or wanted == "auto"
    unfinished = unfinished_checkpoints(output_dir)
    if beginning and (output_dir / "final").exists():
        _refuse(output_dir)
    if wanted is None:
        if unfinished or numbered_checkpoints(output_dir):
            _refuse(output_dir)
        return None, []
    asked = f"resume_from_checkpoint={wanted!r}"
    if not beginning and wanted.lower() not in (LATEST, "true"):
        checkpoint = pointed(output_dir, BEST) if wanted == BEST else Path(wanted)
        if checkpoint is None or not checkpoint.is_dir():
            raise ValueError(f"{asked}: no such {'checkpoint' if wanted == BEST else 'folder'}")
        check_finished(checkpoint)
        return str(checkpoint), []
    checkpoint, faults = newest_sound_checkpoint(output_dir, check)
    if checkpoint is None and not beginning:
        unusable = f"; {unfinished[-1].name} is unfinished" if unfinished else ""
        raise ValueError(f"{asked}: output_dir={str(output_dir)!r} has no whole checkpoint{unusable}")
    if checkpoint is None and unfinished:
        return None, [f"{unfinished[-1]}: unfinished, {CHECKSUMS_FILE} is missing; the run begins from scratch"]
    if faults:
        return str(checkpoint), [f"{'; '.join(faults)}; continuing from {checkpoint} instead"]
    return None if checkpoint is None else str(checkpoint), []


def _refuse(output_dir: Path) -> None:
    raise ValueError(
        f"output_dir={str(output_dir)!r} already holds a run: choose another, or continue an unfinished one with"
        " --resume_from_checkpoint auto"
    )
