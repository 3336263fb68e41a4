"""Measures where a step's memory is: state and saved activations by area, and the peak of each phase.

Areas are those of the audit, but a block's MLP is separate from its attention; `other`: residual sums, the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling_arb import ArbForCausalLM
from training_arb.common.text_table import format_table
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .counted_tensors import CountedTensors, probed_area
from .live_memory import MEGABYTE
from .state_audit import StateAudit

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"


@dataclass(frozen=True)
class StepProbe:
    """Bytes above the state: saved by area after the forward, left by area after the step, the highest of each phase.

    left: memory that the step created and did not free, including renewed caches. With a leak the live memory grows.
    """

    saved: dict[str, int]
    left: dict[str, int]
    peaks: dict[str, int]


def probe_step(model: ArbForCausalLM, optimizer: IntegerOptimizer | None, ids: torch.Tensor) -> StepProbe:
    """Run one step on ids (B, T) and count; without an optimizer, a forward without gradients."""
    with CountedTensors(model) as counted, torch.set_grad_enabled(optimizer is not None):
        loss = model(ids, labels=ids).loss
        peaks, saved = {FORWARD: counted.peak}, {} if optimizer is None else counted.alive_by_area()
        if optimizer is not None:
            counted.restart_peak()
            loss.backward()
            peaks[BACKWARD] = counted.peak
            counted.restart_peak()
            optimizer.step()
            peaks[UPDATE] = counted.peak
        del loss
        return StepProbe(saved, counted.alive_by_area(), peaks)


def state_by_area(audit: StateAudit) -> dict[str, int]:
    """Bytes of persistent state by area, the larger first."""
    sizes: dict[str, int] = {}
    for row in audit.tensors:
        area = probed_area(row.name)
        sizes[area] = sizes.get(area, 0) + row.bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def describe_probes(state: dict[str, int], probes: Sequence[StepProbe]) -> dict[str, dict]:
    """For JSON, in MB, lists by step: {"areas": {NAME: {"state_mb", "saved_mb", "left_mb"}}, "phases": {NAME: []}}."""
    areas = list(dict.fromkeys([*state, *(area for probe in probes for area in (*probe.saved, *probe.left))]))
    described = {
        area: {
            "state_mb": state.get(area, 0) / MEGABYTE,
            "saved_mb": [probe.saved.get(area, 0) / MEGABYTE for probe in probes],
            "left_mb": [probe.left.get(area, 0) / MEGABYTE for probe in probes],
        }
        for area in areas
    }
    phases = {f"{phase}_peak_mb": [probe.peaks[phase] / MEGABYTE for probe in probes] for phase in probes[0].peaks}
    return {"areas": described, "phases": phases}


def probe_table(described: dict[str, dict]) -> str:
    """The result of `describe_probes` as a table: the first and the last step side by side."""
    rows = [
        {
            "area": area,
            "state MB": sizes["state_mb"],
            **_first_and_last("saved", sizes["saved_mb"]),
            **_first_and_last("left", sizes["left_mb"]),
        }
        for area, sizes in described["areas"].items()
    ]
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "area"}
    columns = {"area": "", **dict.fromkeys(total, ".3f")}
    phases = [
        {"phase": name.removesuffix("_peak_mb"), **_first_and_last("peak", sizes)}
        for name, sizes in described["phases"].items()
    ]
    highest = {"phase": "", **dict.fromkeys(_first_and_last("peak", [0.0]), ".3f")}
    return f"{format_table([*rows, {'area': 'total', **total}], columns)}\n\n{format_table(phases, highest)}"


def _first_and_last(name: str, by_step: Sequence[float]) -> dict[str, float]:
    return {f"{name} MB": by_step[0], f"{name}, last step": by_step[-1]}
