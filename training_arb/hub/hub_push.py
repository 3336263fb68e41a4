"""Uploads an exported folder in one commit: either all files change or none."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import RepositoryNotFoundError

from training_arb.checkpoints.checkpoint_source import MODEL_TYPE
from training_arb.common.hub_errors import hub_errors

REPLACED = (
    ".safetensors",
    ".safetensors.index.json",
    ".py",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
)  # what an older commit left


def whole_name(name: str, token: str | None = None) -> str:
    """USER/NAME; without a user, that of the token. Raises ValueError without a token."""
    _require_token(name, token)
    if "/" in name:
        return name
    with hub_errors(f"push to {name!r}"):
        return f"{HfApi(token=token).whoami()['name']}/{name}"


def _require_token(name: str, token: str | None) -> None:
    if (token or get_token()) is None:
        raise ValueError(f"push to {name!r}: no token found; log in with `hf auth login`, or set HF_TOKEN")


def check_target(repo_id: str, private: bool = False, token: str | None = None) -> None:
    """Raises ValueError when no token is found, when the hub cannot be reached, and when the repository is there and
    holds another type of model, or is public where `private` was asked for."""
    asked = f"push to {repo_id!r}"
    _require_token(repo_id, token)
    api = HfApi(token=token)
    with hub_errors(asked):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return
        if private and not info.private:
            raise ValueError(f"{asked}: the repository exists and is public")
        if "config.json" in [file.rfilename for file in info.siblings or []]:
            model_type = json.loads(Path(api.hf_hub_download(repo_id, "config.json")).read_bytes()).get("model_type")
            if model_type != MODEL_TYPE:
                raise ValueError(f"{asked}: the repository holds a model of type {model_type!r}")


def push_folder(
    folder: Path,
    repo_id: str,
    message: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Create the repository and the branch if they are missing, and commit every file of `folder`.

    Weights and code of an older commit that the folder does not have are deleted in the same commit. Raises ValueError
    if the hub refuses.
    """
    api = HfApi(token=token)
    with hub_errors(f"push to {repo_id!r}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        there = api.list_repo_files(repo_id, revision=branch)
        stale = [name for name in there if "/" not in name and name.endswith(REPLACED) and name not in names]
        operations = [CommitOperationAdd(name, path) for name, path in names.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        # not upload_folder, which may spread a large folder over several commits
        return api.create_commit(repo_id, operations, commit_message=message, revision=branch)
