"""Finds a checkpoint: a folder, or a repository on the hub at a revision. Neither code nor pickles are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from modeling_arb.checkpoints.integrity import read_json_object
from training_arb.common.hub_errors import hub_errors

from .checkpoint_files import check_finished

FETCHED = ("*.json", "*.safetensors")
MODEL_TYPE = "arb"


class CheckpointSource(NamedTuple):
    """A checkpoint's local folder. commit: the hash of the hub revision; None for a folder."""

    folder: Path
    commit: str | None


def find_checkpoint(name: str, revision: str | None = None, option: str = "model") -> CheckpointSource:
    """The folder `name`, or the hub repository of that name, downloaded into the cache.

    Raises ValueError, which begins with `option` and the name, when nothing is found there, when it is another type of
    model, or when it is an unfinished checkpoint.
    """
    folder, asked = Path(name), f"{option}={name!r}"
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {name} is a local folder, which has no revisions; leave it out")
        source = CheckpointSource(folder, None)
    elif folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ValueError(f"{asked}: no such folder")
    else:
        with hub_errors(f"{asked}, no folder here" if revision is None else f"{asked}, revision={revision!r}"):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
        source = CheckpointSource(folder, folder.name)
    _check_folder(source.folder, asked)
    return source


def _check_folder(folder: Path, asked: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{asked}: config.json not found")
    model_type = read_json_object(folder / "config.json").get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"{asked}: model_type={model_type!r} in its config.json must be {MODEL_TYPE!r}")
    if not list(folder.glob("model*.safetensors")):
        raise ValueError(f"{asked}: model.safetensors not found")
    check_finished(folder)
