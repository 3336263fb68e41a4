"""The checkpoints of a run's folder: numbered ones, pointers to the latest and the best, checksums, which are sound.

A pointer is a relative symlink, so that `runs/mine/best` is a folder to any tool; where the file system refuses links
it is a text file with the same content, which only `--resume_from_checkpoint` understands.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from modeling_arb.checkpoints.integrity import (
    check_headers,
    check_json_files,
    load_pickle,
    read_config,
    read_headers,
    read_json_object,
)
from training_arb.common.atomic_files import write_json
from training_arb.memory.state_audit import unallocated_model, weight_files

LATEST, BEST = "latest", "best"
CHECKSUMS_FILE = "checksums.json"
RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
REMOVING = ".removing"
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
NUMBERED = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: str | Path) -> int:
    """The step that a numbered checkpoint was written at."""
    return int(NUMBERED.fullmatch(Path(checkpoint).name)[1])


def numbered_checkpoints(run_dir: str | Path) -> list[Path]:
    """Oldest first."""
    found = (path for path in Path(run_dir).glob("checkpoint-*") if NUMBERED.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def point(run_dir: str | Path, pointer: str, name: str) -> None:
    """Make `pointer` (latest or best) stand for the checkpoint called `name`, in one move."""
    staged = Path(run_dir) / f".{pointer}.writing"
    staged.unlink(missing_ok=True)
    try:
        staged.symlink_to(name)
    except OSError:
        staged.write_text(name, encoding="utf-8")
    os.replace(staged, Path(run_dir) / pointer)


def pointed(run_dir: str | Path, pointer: str) -> Path | None:
    """The checkpoint that `pointer` stands for, if it is there."""
    path = Path(run_dir) / pointer
    try:
        name = os.readlink(path) if path.is_symlink() else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    target = path.with_name(name) if NUMBERED.fullmatch(name) else None
    return target if target is not None and target.is_dir() else None


def remove_old(run_dir: str | Path, limit: int | None, kept: Collection[Path]) -> None:
    """Delete numbered checkpoints until `limit` are left, never one of `kept`, the last of which was just written.

    Those with a higher number, of a run that was taken up again further back, go first, then the oldest. Each loses its
    name before it is deleted: what bears a checkpoint's name is whole.
    """
    if not limit or limit < 0:
        return
    found = numbered_checkpoints(run_dir)
    newest = step_of(list(kept)[-1])
    spare = sorted(
        (path for path in found if path not in kept), key=lambda path: (step_of(path) < newest, step_of(path))
    )
    going = Path(run_dir) / REMOVING
    shutil.rmtree(going, ignore_errors=True)
    for path in spare[: max(0, len(found) - limit)]:
        os.replace(path, going)
        shutil.rmtree(going, ignore_errors=True)


def write_checksums(folder: str | Path) -> None:
    """checksums.json: the sha256 of every file below `folder`. To be written last."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS_FILE)
    write_json(folder / CHECKSUMS_FILE, {path.relative_to(folder).as_posix(): _sha256(path) for path in files})


def verify_checksums(folder: str | Path) -> None:
    """Raises ValueError naming the first file that is missing or not as it was written. Without checksums.json,
    a checkpoint from before them, nothing is checked."""
    folder = Path(folder)
    if not (folder / CHECKSUMS_FILE).exists():
        return
    for name, wanted in read_json_object(folder / CHECKSUMS_FILE).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing")
        if _sha256(folder / name) != wanted:
            raise ValueError(f"{folder / name}: damaged, its sha256 is not the one in {CHECKSUMS_FILE}")


def check_checkpoint(folder: str | Path) -> None:
    """Raises ValueError, naming the file, unless `folder` is a whole and undamaged training checkpoint."""
    folder = Path(folder)
    for name in ("config.json", STATE_FILE, RUN_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no training checkpoint, {name} is missing")
    verify_checksums(folder)
    check_tensor_files(folder)
    read_json_object(folder / RUN_FILE)
    _check_trainer_state(folder / STATE_FILE)
    for path in sorted(path for pattern in PICKLES for path in folder.glob(pattern)):
        _check_pickle(path)


def check_tensor_files(folder: str | Path) -> None:
    """Hold the headers of a local checkpoint's weight files against its config. Raises ValueError when one is damaged,
    or a tensor is missing or of another dtype or shape."""
    folder, config = Path(folder), Path(folder) / "config.json"
    check_json_files(str(folder))
    stored = {name: tensor for path in weight_files(folder) for name, tensor in read_headers(path).items()}
    expected = unallocated_model(read_config(config)).state_dict()
    check_headers(str(folder), stored, expected, read_json_object(config), asking=config.name)


def newest_sound_checkpoint(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Where a run stands: its newest whole checkpoint, and what is wrong with those written after it.

    Raises ValueError when there are checkpoints and each is damaged.
    """
    found, latest = numbered_checkpoints(run_dir), pointed(run_dir, LATEST)
    if latest is not None:  # what has a higher number is of a run that was taken up again further back
        found = found[: found.index(latest) + 1]
    checkpoint, faults = newest_passing(found, check_checkpoint)
    if checkpoint is None and faults:
        raise ValueError("; ".join(faults) if len(faults) == 1 else f"{faults[0]}; no other checkpoint is whole either")
    return checkpoint, faults


def newest_passing(found: Sequence[Path], check: Callable[[Path], None]) -> tuple[Path | None, list[str]]:
    """The last checkpoint that `check` raises no ValueError for, and what it said of those after it."""
    faults = []
    for checkpoint in reversed(found):
        try:
            check(checkpoint)
        except ValueError as fault:
            faults.append(str(fault))
        else:
            return checkpoint, faults
    return None, faults


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_trainer_state(path: Path) -> None:
    fields = read_json_object(path)
    try:
        state = TrainerState(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: no trainer state ({str(error).splitlines()[0]})") from error
    if not isinstance(state.global_step, int) or not isinstance(state.log_history, list):
        raise ValueError(f"{path}: no trainer state (global_step={state.global_step!r})")


def _check_pickle(path: Path) -> None:
    with safe_globals():
        load_pickle(path)
