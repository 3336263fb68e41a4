"""Atomic writes of files and folders: under a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeling_arb.checkpoints.file_modes import follow_umask

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# how libraries that write by themselves put it: the system's words, or torch's zip writer's file
FULL_IN_WORDS = (*map(os.strerror, FULL), "inline_container")


def out_of_space(error: BaseException) -> bool:
    """Whether an error met while writing files means that no space is left for them."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(words in str(error) for words in FULL_IN_WORDS)


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Set file modes below `folder` by the umask, and fsync every file and folder."""
    follow_umask(folder.rglob("*.safetensors"))
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def move_into_place(staged: Path, target: Path) -> None:
    """Rename a finished, synced folder or file to its final name, replacing an existing one."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.is_dir():
        os.replace(target, replaced)
        try:
            os.replace(staged, target)
        except OSError:
            os.replace(replaced, target)
            raise
        shutil.rmtree(replaced)
    else:
        os.replace(staged, target)
    sync_path(target.parent)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A staging folder. It replaces `target` when the block ends, and is deleted when the block raises."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        sync_tree(staging)
        move_into_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.writing")
    try:
        staged.write_bytes(data)
        sync_path(staged)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    move_into_place(staged, path)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())
