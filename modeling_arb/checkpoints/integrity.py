"""Checks of a checkpoint's files. Every error is one line that names the file, the tensor and the value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import logging
from transformers.utils.hub import cached_file

from arb_kernels.formats.state_layout import StateTensor
from configuration_arb.configuration_arb import ArbConfig
from configuration_arb.optional_blocks import OPTIONAL_BLOCKS
from modeling_arb.layers.integer_state import IntegerState

# Where the modules of optional parts stand, and the field of the config that asks for them.
OPTIONAL_PARTS = {block.part: name for name, block in OPTIONAL_BLOCKS.items() if block.part}
OPTIONAL_PARTS["byte_head.layers"] = "head_layers"

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LARGEST_HEADER = 16 << 20  # bytes: a hundred thousand tensors
LARGEST_JSON = 256 << 20
MOST_GROWTH = 16

logger = logging.get_logger(__name__)


def read_json_object(path: str | Path) -> dict:
    """Raises ValueError naming the file if it does not hold exactly one JSON object."""
    path = Path(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, more than the limit of {LARGEST_JSON:,}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


@contextmanager
def open_tensor_file(path: str | Path) -> Iterator[safe_open]:
    """An open safetensors file. Raises ValueError naming it when it is damaged."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > LARGEST_HEADER:
        raise ValueError(
            f"{path}: damaged or truncated safetensors file (header {header:,} bytes, limit {LARGEST_HEADER:,})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error


def read_config(path: str | Path) -> ArbConfig:
    """The config of a local config.json. Raises ValueError naming the file if it does not describe a valid model."""
    fields = read_json_object(path)
    if fields.get("model_type", ArbConfig.model_type) != ArbConfig.model_type:
        raise ValueError(f"{path}: model_type={fields['model_type']!r} must be {ArbConfig.model_type!r}")
    for name in ("dtype", "torch_dtype"):
        if not isinstance(fields.get(name), str | None):
            raise ValueError(f"{path}: {name}={fields[name]!r} must be the name of a dtype")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if not isinstance(fields.get(name), int | None):
            raise ValueError(f"{path}: {name}={fields[name]!r} must be one token's id")
    try:
        return ArbConfig.from_dict(fields)
    except Exception as error:  # transformers checks its own fields, with errors of its own kinds
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def load_pickle(path: str | Path, map_location: str = "cpu") -> object:
    """A file written by torch.save, with its tensors memory-mapped.

    Raises ValueError naming the file if it is damaged, compressed, or holds more than tensors and plain values; OSError
    when it cannot be opened.
    """
    try:
        with ZipFile(path) as archive:
            packed = any(entry.compress_type != ZIP_STORED for entry in archive.infolist())
        if not packed:
            return torch.load(path, map_location=map_location, mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle makes it raise almost anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path}: damaged, or not written by torch.save ({reason})") from error
    raise ValueError(f"{path}: compressed, which torch.save does not do")


def read_headers(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file (.safetensors, or a pickle in torch's zip format) on the meta device. Tensor data is
    not read.

    Raises ValueError naming the file when it is damaged, or holds anything but tensors by name.
    """
    if str(path).endswith(".safetensors"):
        with open_tensor_file(path) as file:
            return {name: _on_meta(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    tensors = load_pickle(path, "meta")
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: must hold a dict of tensors and nothing else")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{path}: tensor {name} of shape {tuple(tensor.shape)} is larger than its stored data")
    return tensors


def _on_meta(path: str | Path, name: str, stored) -> torch.Tensor:
    dtype = str_to_torch_dtype.get(stored.get_dtype())
    if dtype is None:
        raise ValueError(f"{path}: tensor {name} has dtype {stored.get_dtype()}, which torch does not know")
    return torch.empty(stored.get_shape(), dtype=dtype, device="meta")


def by_loaded_name(
    source: str,
    stored: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    base_model_prefix: str,
    renamings: Sequence[WeightRenaming],
) -> dict[str, torch.Tensor]:
    """The stored tensors by the names under which transformers loads them: with or without the backbone's prefix, and
    renamed by `key_mapping`. Raises ValueError if two names become equal."""
    named = {}
    for name, tensor in stored.items():
        loaded, _ = rename_source_key(name, [*renamings], [], base_model_prefix, {**expected})
        if loaded in named:
            raise ValueError(f"{source}: tensor {loaded} is stored twice, once as {name}")
        named[loaded] = tensor
    return named


def check_headers(
    source: str,
    stored: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    stored_config: Mapping[str, object],
    sizes_may_differ: bool = False,
    asking: str = "the config",
) -> None:
    """Compare stored tensors with those of a model, by name, before loading. Both may be on the meta device.

    Raises ValueError when a tensor is missing, or of another dtype (transformers would cast it silently) or another
    shape. Blocks that the checkpoint's own config does not have may be missing: they start fresh, named in one warning.
    sizes_may_differ: missing tensors and other shapes start fresh too, while all of the state stays within MOST_GROWTH
    times what is stored. asking: what the model was built from, for messages.
    """
    new_parts = [part for part, field in OPTIONAL_PARTS.items() if not stored_config.get(field)]
    fresh, asked, held = set(), 0, sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in expected.items():
        found = stored.get(name)
        part = next((part for part in new_parts if _stands_in(name, part)), None)
        if found is None and part is not None:
            fresh.add(part)
            continue
        if found is None and not sizes_may_differ:
            raise ValueError(f"{source}: tensor {name} is missing: {asking} requires it")
        if found is not None and found.dtype != tensor.dtype:
            raise ValueError(f"{source}: tensor {name} has dtype {found.dtype}, {asking} requires {tensor.dtype}")
        if found is not None and found.shape != tensor.shape and not sizes_may_differ:
            raise ValueError(
                f"{source}: tensor {name} has shape {tuple(found.shape)}, {asking} requires"
                f" {tuple(tensor.shape)}{_other_trits(name, found, tensor)}"
            )
        asked += tensor.nbytes
    if asked > MOST_GROWTH * held:
        raise ValueError(f"{source}: {asking} requires {asked:,} bytes of state, but {held:,} are stored")
    if fresh:
        logger.warning(f"{source} does not have {', '.join(sorted(fresh))}: freshly initialised, to be trained")


def _other_trits(name: str, found: torch.Tensor, expected: torch.Tensor) -> str:
    """An addition to the message where packed rows differ in length as one trit a weight and two do."""
    if name.endswith("T_packed") and found.shape[:-1] == expected.shape[:-1]:
        if 2 * found.shape[-1] == expected.shape[-1]:
            return ": one trit a weight instead of two (trits_per_weight)"
        if found.shape[-1] == 2 * expected.shape[-1]:
            return ": two trits a weight instead of one (trits_per_weight)"
    return ""


def _stands_in(name: str, part: str) -> bool:
    """Whether a tensor belongs to a part of the model. The backbone alone has no prefix."""
    return name.removeprefix("model.").startswith(f"{part.removeprefix('model.')}.")


def check_values(source: str, model: nn.Module) -> None:
    """Raises ValueError if a tensor of integer state holds an illegal value, such as a byte that does not encode trits
    or an edge to a motif that does not exist."""
    for name, module in model.named_modules():
        layout = module.layout() if isinstance(module, IntegerState) else {}
        for key, spec in layout.items():
            tensor = getattr(module, key, None)
            if tensor is not None and not tensor.is_meta and (illegal := spec.count_illegal(tensor)):
                raise ValueError(f"{source}: tensor {name}.{key} {describe_illegal(spec, illegal)}")


def describe_illegal(spec: StateTensor, illegal: int) -> str:
    """The error message for a tensor with this many illegal values."""
    ranges = " or ".join(f"{low} to {high}" for low, high in spec.legal)
    return f"holds {illegal} values outside {ranges}: not {spec.role}"


def check_json_files(source: str, variant: str | None = None, **located) -> None:
    """Check the config and the shard index of a checkpoint (folder or hub name) before transformers reads them.

    located: the arguments of `from_pretrained` that locate it on the hub. Raises ValueError naming a damaged file or a
    missing shard.
    """
    found = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    config = cached_file(source, "config.json", **found, **located)
    if config is not None:
        read_config(config)
    folder = Path(source) / located.get("subfolder", "")
    names = [name if variant is None else name.replace(".index", f".index.{variant}") for name in INDEX_FILES]
    indices = [cached_file(source, name, **found, **located) for name in names]
    for index in filter(None, indices):
        _check_index(Path(index), folder if folder.is_dir() else None)
    if not any(indices) and not (folder / "model.safetensors").is_file() and any(folder.glob("model-*-of-*")):
        raise ValueError(f"{folder}: {names[0]} is missing, but shards are present")


def _check_index(index: Path, folder: Path | None) -> None:
    """folder: where its shards must be; None: they are not downloaded yet."""
    fields = read_json_object(index)
    shards, metadata = fields.get("weight_map"), fields.get("metadata")
    named = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
    if not isinstance(shards, dict) or not named or not isinstance(metadata, dict):
        raise ValueError(f"{index}: not a shard index: weight_map and metadata are required")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} must be a file in the same folder")
        if folder is not None and not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, a shard of {index.name}")
