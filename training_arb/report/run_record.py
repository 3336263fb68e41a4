"""Reads for reports what the folder of a run, finished or still training, says about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from arb_kernels.formats.packing import largest_level, unpack_levels
from configuration_arb import ArbConfig
from configuration_arb.trits_per_weight import CHOICES
from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import open_tensor_file, read_json_object
from training_arb.checkpoints.checkpoint_files import RUN_FILE, STATE_FILE, check_tensor_files
from training_arb.checkpoints.run_checkpoints import numbered_checkpoints, step_of
from training_arb.common.error_lines import first_line
from training_arb.memory.state_audit import StateAudit, audit_folder

LEVELS = range(-largest_level(max(CHOICES)), largest_level(max(CHOICES)) + 1)
COUNTED_WEIGHTS = 1 << 22  # of a matrix: the first rows of a large table stand for all
SHOWN_STATE = ("global_step", "max_steps", "train_batch_size", "eval_steps", "save_steps", "logging_steps")


@dataclass
class RunRecord:
    """`missing` lists what could not be read.

    levels_by_area: how many weights have each level of LEVELS, int64; one trit a weight gives -1, 0 and 1 only.
    flips_by_layer: share of the weights whose level differs, per step.
    """

    run_dir: Path
    history: list[dict] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    results: dict[str, object] = field(default_factory=dict)
    sample: str | None = None
    audit: StateAudit | None = None
    levels_by_area: dict[str, torch.Tensor] = field(default_factory=dict)
    zeros_by_layer: dict[str, float] = field(default_factory=dict)  # share of weights whose level is 0
    flips_by_layer: dict[str, float] = field(default_factory=dict)
    flips_between: tuple[str, str] | None = None
    missing: list[str] = field(default_factory=list)


def read_run(run_dir: str | Path) -> RunRecord:
    """Everything that can be read. Raises ValueError when the folder is not found."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r}: no such folder")
    record = RunRecord(run_dir)
    checkpoints = numbered_checkpoints(run_dir)
    _read_report(record)
    _read_newest(record, checkpoints)
    _read_weights(record, [*checkpoints, *(path for path in [run_dir / "final"] if path.is_dir())])
    _read_flips(record, checkpoints)
    if not record.history:
        record.missing.append("no history of losses: neither report.json nor a checkpoint has one")
    return record


def _read_report(record: RunRecord) -> None:
    path = record.run_dir / "report.json"
    if not path.is_file():
        record.missing.append("report.json: the run has not ended")
        return
    try:
        report = read_json_object(path)
    except ValueError as error:
        record.missing.append(str(error))
        return
    record.history = list(report.get("history", []))
    record.sample = report.get("sample")
    record.settings |= report.get("settings", {})
    record.results = {key: value for key, value in report.items() if isinstance(value, str | int | float)}
    record.results.pop("sample", None)


def _read_newest(record: RunRecord, checkpoints: list[Path]) -> None:
    """Settings, and the history of a run that has not ended, from the newest checkpoint that can be read."""
    for checkpoint in reversed(checkpoints):
        try:
            state, run = (read_json_object(checkpoint / name) for name in (STATE_FILE, RUN_FILE))
        except (ValueError, OSError) as error:
            record.missing.append(str(error))
            continue
        record.settings |= {**run, **{key: state[key] for key in SHOWN_STATE if key in state}}
        record.history = record.history or list(state.get("log_history", []))
        return
    if not checkpoints:
        record.missing.append("no checkpoints")


def _read_weights(record: RunRecord, folders: list[Path]) -> None:
    for folder in folders[::-1]:
        try:
            check_tensor_files(folder)
            audit = audit_folder(folder)
            config = ArbConfig.from_pretrained(folder)
            areas = {row.name: row.area for row in audit.tensors}
            counts: dict[str, torch.Tensor] = {}
            zeros: dict[str, float] = {}
            for name, levels in read_levels(folder):
                count = torch.bincount(levels.flatten().int() - LEVELS[0], minlength=len(LEVELS))
                zeros[name.removesuffix(".T_packed")] = (count[LEVELS.index(0)] / count.sum()).item()
                counts[areas[name]] = counts.get(areas[name], 0) + count
        except (ValueError, OSError, RuntimeError) as error:
            record.missing.append(f"weights of {folder.name}: {first_line(error)}")
            continue
        record.audit, record.levels_by_area, record.zeros_by_layer = audit, counts, zeros
        record.settings |= {f"config.{key}": value for key, value in config.to_diff_dict().items()}
        return
    record.missing.append("no weights: neither a checkpoint nor final/")


def _read_flips(record: RunRecord, checkpoints: list[Path]) -> None:
    if len(checkpoints) < 2:
        record.missing.append("flips per layer: they need two checkpoints to compare")
        return
    before, after = checkpoints[-2:]
    steps = step_of(after) - step_of(before)
    try:
        pairs = zip(read_levels(before), read_levels(after), strict=True)
        flips = {name: (old != new).float().mean().item() / steps for (name, old), (_, new) in pairs}
    except (ValueError, OSError, RuntimeError) as error:
        record.missing.append(f"flips per layer: {first_line(error)}")
        return
    record.flips_by_layer = {name.removesuffix(".T_packed"): rate for name, rate in flips.items()}
    record.flips_between = (before.name, after.name)


def read_levels(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(tensor name, int8 (rows, columns)) of each ternary matrix on disk, by name; for large ones only the first
    rows."""
    with torch.device("meta"):
        matrices = ArbForCausalLM(ArbConfig.from_pretrained(folder)).ternary_matrices()
    columns = {f"{name}.T_packed": matrix.columns for name, matrix in matrices.items()}
    for path in sorted(folder.glob("model*.safetensors")):
        with open_tensor_file(path) as file:
            for name in sorted(columns.keys() & set(file.keys())):
                rows = file.get_slice(name)[: max(1, COUNTED_WEIGHTS // columns[name])]
                yield name, unpack_levels(rows, columns[name])
