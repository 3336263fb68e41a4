"""What makes a checkpoint unreadable, said in one line naming the file, the tensor and the value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from arb_kernels.packing import LARGEST_BYTE, count_invalid_bytes

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

logger = logging.get_logger(__name__)


@contextmanager
def open_tensor_file(path: str | Path) -> Iterator[safe_open]:
    """An open safetensors file. Raises ValueError naming it when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error


def check_tensor_files(folder: str | Path) -> None:
    """Read the headers of a local checkpoint's weight files. Raises ValueError on a damaged file or a wrong dtype.

    transformers would cast a tensor of another dtype to the buffer's without a word.
    """
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with open_tensor_file(path) as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for name, dtype in dtypes.items():
            expected = SAFETENSORS_DTYPES.get(name.rpartition(".")[2])
            if expected is not None and dtype not in expected:
                raise ValueError(f"{path}: tensor {name} has dtype {dtype}, expected {' or '.join(expected)}")


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
