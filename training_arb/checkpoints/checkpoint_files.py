"""The files of a training checkpoint, their checksums, and the check that all are sound.

A trainer writes run.json first and checksums.json last, after everything else has reached the disk. A folder with
run.json and without checksums.json is therefore unfinished, whatever ended its writing, and is not a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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
from training_arb.common.error_lines import first_line
from training_arb.memory.state_audit import unallocated_model, weight_files

CHECKSUMS_FILE = "checksums.json"
RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def is_finished(folder: str | Path) -> bool:
    """Whether a checkpoint was written completely."""
    return (Path(folder) / CHECKSUMS_FILE).is_file()


def check_finished(folder: str | Path) -> None:
    """Raises ValueError on a training checkpoint that was not written completely. Any other folder passes."""
    if (Path(folder) / RUN_FILE).is_file() and not is_finished(folder):
        raise ValueError(
            f"{folder}: unfinished checkpoint, {CHECKSUMS_FILE} is missing, which is written last; use an earlier one"
        )


def write_checksums(folder: str | Path) -> None:
    """Write checksums.json with the sha256 of every file below `folder`. Must be written last."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS_FILE)
    write_json(folder / CHECKSUMS_FILE, {path.relative_to(folder).as_posix(): _sha256(path) for path in files})


def verify_checksums(folder: str | Path) -> None:
    """Raises ValueError naming the first file that is missing or not as it was written, or when a training checkpoint
    is unfinished. A model folder without checksums.json, written by other programs, passes unchecked."""
    folder = Path(folder)
    check_finished(folder)
    if not (folder / CHECKSUMS_FILE).exists():
        return
    for name, wanted in read_json_object(folder / CHECKSUMS_FILE).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing")
        if _sha256(folder / name) != wanted:
            raise ValueError(f"{folder / name}: damaged, its sha256 is not the one in {CHECKSUMS_FILE}")


def check_training_files(folder: str | Path, names: Iterable[str], kind: str = "training checkpoint") -> None:
    """Checks that the checkpoints of all trainers share. names: the files that must exist.

    Raises ValueError, naming the file, unless the checkpoint is finished, undamaged and can be read.
    """
    folder = Path(folder)
    check_finished(folder)
    for name in (*names, STATE_FILE, RUN_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not a whole {kind}, {name} is missing")
    verify_checksums(folder)
    read_json_object(folder / RUN_FILE)
    _check_trainer_state(folder / STATE_FILE)
    for path in sorted(path for pattern in PICKLES for path in folder.glob(pattern)):
        _check_pickle(path)


def check_checkpoint(folder: str | Path) -> None:
    """Raises ValueError, naming the file, unless `folder` is a whole and undamaged checkpoint of an ArbTrainer."""
    check_training_files(folder, ["config.json"])
    check_tensor_files(folder)


def check_tensor_files(folder: str | Path) -> None:
    """Compare the headers of a local checkpoint's weight files with its config. Raises ValueError when one is damaged,
    or a tensor is missing or of another dtype or shape."""
    folder, config = Path(folder), Path(folder) / "config.json"
    check_json_files(str(folder))
    stored = {name: tensor for path in weight_files(folder) for name, tensor in read_headers(path).items()}
    expected = unallocated_model(read_config(config)).state_dict()
    check_headers(str(folder), stored, expected, read_json_object(config), asking=config.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_trainer_state(path: Path) -> None:
    fields = read_json_object(path)
    try:
        state = TrainerState(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a trainer's state ({first_line(error)})") from error
    if not isinstance(state.global_step, int) or not isinstance(state.log_history, list):
        raise ValueError(f"{path}: not a trainer's state (global_step={state.global_step!r})")


def _check_pickle(path: Path) -> None:
    with safe_globals():
        load_pickle(path)
