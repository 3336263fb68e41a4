"""CheckedLoading: transformers' `from_pretrained` with a check of every checkpoint, whatever its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, overload

from transformers import PreTrainedModel

from .integrity import (
    by_loaded_name,
    check_headers,
    check_json_files,
    check_values,
    read_headers,
    read_json_object,
)

LOCATING = (
    "revision",
    "subfolder",
    "cache_dir",
    "token",
    "local_files_only",
)  # a checkpoint on the hub


class CheckedLoading(PreTrainedModel):
    """PreTrainedModel that checks a checkpoint's tensors before and after they are loaded."""

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Reports missing tensors before loading, in one line instead of transformers' table."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self.__dict__["_missing_keys"] = set(loading_info.missing_keys)
        loading_info.missing_keys.clear()

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Called for every way to load (folder, hub name, any format, state dict), when the files are present and not
        yet read. Checks dtypes and shapes from the headers first, then the values that were loaded."""
        source = str(load_config.pretrained_model_name_or_path or "state_dict")
        stored, stored_config = state_dict, model.config.to_dict()
        if stored is None:
            stored = {name: tensor for path in checkpoint_files for name, tensor in read_headers(path).items()}
            beside = Path(checkpoint_files[0]).with_name("config.json")
            stored_config = read_json_object(beside) if beside.is_file() else stored_config
        expected = model.state_dict()
        stored = by_loaded_name(source, stored, expected, model.base_model_prefix, load_config.weight_mapping or [])
        check_headers(source, stored, expected, stored_config, load_config.ignore_mismatched_sizes)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        check_values(source, model)
        return loaded

    def _load_and_finalize_distributed_pretrained_model(self, distributed_checkpoint_dir, *args, **kwargs):
        raise ValueError(
            f"{distributed_checkpoint_dir}: a distributed checkpoint is not supported; write it with save_pretrained"
        )

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: Literal[False] = False, **kwargs
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: Literal[True], **kwargs
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers. Raises ValueError if tensors are missing, have the wrong dtype or shape, or hold illegal
        values."""
        if pretrained_model_name_or_path is not None:
            located = {name: kwargs[name] for name in LOCATING if kwargs.get(name) is not None}
            check_json_files(str(pretrained_model_name_or_path), kwargs.get("variant"), **located)
        load: Any = super().from_pretrained
        model, info = load(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        info["missing_keys"] = model.__dict__.pop("_missing_keys", set())
        return (model, info) if output_loading_info else model
