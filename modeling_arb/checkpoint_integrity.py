"""What makes a checkpoint unreadable, said in one line naming the file, the tensor and the value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from arb_kernels.packing import LARGEST_BYTE, TRITS_PER_BYTE, count_invalid_bytes
from configuration_arb.configuration_arb import ArbConfig

from .ternary_matrix import TernaryMatrix

SAFETENSORS_DTYPES = {
    "T_packed": ("U8",),
    "E": ("I8",),
    "accum": ("U8", "I16"),
    "accum_exp": ("I8",),
    "T_accum": ("I8",),
    "E_accum": ("I8",),
    "corr_accum": ("I64",),
    "step_counter": ("I64",),
    "usage": ("I16",),
    "fade_position": ("I64",),
    "active_edge_src": ("I32",),
    "active_edge_dst": ("I32",),
    "active_edge_attr": ("I8",),
    "active_edge_score": ("I8",),
    "expert_bias": ("I8",),
}

# Where the modules of an optional block stand, and the config's field that asks for them.
OPTIONAL_PARTS = {
    "model.text_sequencer": "text_sequencer",
    "model.memgram": "memgram",
    "model.shared_vq": "codebook",
    "model.moe_graph": "moe_graph",
    "model.composite": "composite",
    "output_router": "output_router",
    "video_head": "video_head",
    "talker_head": "talker_head",
    "byte_head.layers": "head_layers",
}

# Fields of the config, or of one of its blocks, whose product is never more than the weights they ask for.
WEIGHTS_AT_LEAST = [
    (None, ("vocab_size", "hidden_size")),
    (None, ("intermediate_size", "hidden_size")),
    (None, ("head_layers", "head_intermediate_size", "hidden_size")),
    (None, ("num_attention_heads", "qk_nope_head_dim")),
    (None, ("num_attention_heads", "qk_rope_head_dim")),
    (None, ("num_attention_heads", "v_head_dim", "hidden_size")),
    (None, ("kv_latent_dim", "hidden_size")),
    ("text_sequencer", ("hidden_size",)),
    ("memgram", ("slots", "dim")),
    ("codebook", ("size", "dim")),
    ("moe_graph", ("num_experts", "expert_size")),
    ("moe_graph", ("active_edges",)),
    ("composite", ("size", "dim")),
    ("output_router", ("num_heads", "gate_size")),
    ("video_head", ("latent_dim", "hidden_size")),
    ("talker_head", ("num_codes", "hidden_size")),
]
INDEX_FILE = "model.safetensors.index.json"
LARGEST_HEADER = 16 << 20  # bytes: a hundred thousand tensors
LARGEST_JSON = 256 << 20

logger = logging.get_logger(__name__)


def read_json_object(path: str | Path) -> dict:
    """Raises ValueError naming the file when it holds anything but one JSON object."""
    path = Path(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, more than the {LARGEST_JSON:,} that are read")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
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
            f"{path}: damaged or truncated safetensors file (a header of {header:,} bytes; {LARGEST_HEADER:,} are read)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error


def read_config(path: str | Path) -> ArbConfig:
    """A local config.json. Raises ValueError, naming the file, when it describes no model."""
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


def check_sizes(path: Path, config: ArbConfig, tensors: int, size: int) -> None:
    """Raises ValueError when config.json at `path` asks for more than weight files of so many tensors and bytes hold.

    What a loader builds before it compares shapes is then of the files' size, whatever the config says.
    """
    layers = config.num_hidden_layers + config.head_layers
    if layers > tensors:
        raise ValueError(f"{path}: {layers:,} layers, but the weight files hold {tensors} tensors")
    for block, keys in WEIGHTS_AT_LEAST:
        settings = vars(config) if block is None else getattr(config, block)
        least = math.prod(max(settings[key], 1) for key in keys) if settings else 0
        if least > TRITS_PER_BYTE * size:
            named = ", ".join(f"{block + '.' if block else ''}{key}={settings[key]}" for key in keys)
            raise ValueError(f"{path}: {named} ask for {least:,} weights, but the weight files hold {size:,} bytes")


def check_tensor_files(folder: str | Path) -> None:
    """Read config.json and the headers of a local checkpoint's weight files. Raises ValueError on a damaged or missing
    file or a wrong dtype.

    transformers would cast a tensor of another dtype to the buffer's without a word.
    """
    paths, num_tensors = sorted(Path(folder).glob("model*.safetensors")), 0
    if any("-of-" in path.name for path in paths):
        _check_shards(Path(folder))
    for path in paths:
        with open_tensor_file(path) as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for name, dtype in dtypes.items():
            expected = SAFETENSORS_DTYPES.get(name.rpartition(".")[2])
            if expected is not None and dtype not in expected:
                raise ValueError(f"{path}: tensor {name} has dtype {dtype}, expected {' or '.join(expected)}")
        num_tensors += len(dtypes)
    config = Path(folder) / "config.json"
    if config.is_file() and paths:
        check_sizes(config, read_config(config), num_tensors, sum(path.stat().st_size for path in paths))


def _check_shards(folder: Path) -> None:
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ValueError(f"{folder}: {INDEX_FILE} is missing, and with it what its shards hold")
    fields = read_json_object(index)
    shards, metadata = fields.get("weight_map"), fields.get("metadata")
    named = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
    if not named or not isinstance(metadata, dict):
        raise ValueError(f"{index}: no index of shards: it needs weight_map, the file of each tensor, and metadata")
    for name in sorted(set(shards.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, a shard that {INDEX_FILE} names")


def check_loading_info(source: str, info: dict, stored_config: dict) -> None:
    """Raises ValueError when a tensor was missing or of another shape than the config asks for.

    Blocks that the checkpoint's own config does not have may be missing: they start fresh, named in one warning.
    """
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"{source}: tensor {name} has shape {tuple(found)}, the config asks for {tuple(expected)}")
    new_parts = [part for part, field in OPTIONAL_PARTS.items() if not stored_config.get(field)]
    fresh = set()
    for name in sorted(info["missing_keys"]):
        part = next((part for part in new_parts if name.startswith(f"{part}.")), None)
        if part is None:
            raise ValueError(f"{source}: tensor {name} is missing")
        fresh.add(part)
    if fresh:
        logger.warning(f"{source} does not have {', '.join(sorted(fresh))}: freshly initialised, to be trained")


def check_trits(source: str, model: nn.Module) -> None:
    """Raises ValueError when a packed byte holds no five trits."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryMatrix) and (invalid := count_invalid_bytes(module.T_packed)):
            raise ValueError(f"{source}: tensor {name}.T_packed holds {invalid} bytes above {LARGEST_BYTE}, not trits")
