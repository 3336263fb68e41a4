"""Ablation: the backbone with one block switched on at a time, or two trits for some of its weights, at equal steps and
at equal time."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from configuration_arb import ArbConfig, preset_config
from configuration_arb.optional_blocks import OPTIONAL_BLOCKS
from modeling_arb import ArbForCausalLM
from training_arb.memory.state_audit import audit_config
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .measurement import MILLISECONDS, Timing, interleaved
from .quality_benchmark import BenchmarkSettings, train_model

BACKBONE, FULL = "backbone", "full"
MEMORY = {"slots": 1 << 15, "dim": 32}
CODEBOOK = {"size": 512, "dim": 64}
EXPERTS = {"num_experts": 4, "expert_size": 0}
GRAPH = {**EXPERTS, "active_edges": 4096}
# Overrides of a preset; sizes that suit a width of one to three hundred.
BLOCK_VARIANTS: dict[str, dict[str, Any]] = {
    BACKBONE: {},
    "text_sequencer": {"text_sequencer": {}},
    "memgram": {"memgram": MEMORY},
    "memgram, momentum": {"memgram": MEMORY, "table_rule": "momentum"},
    "windowed_attention": {"windowed_attention": {"window": 64, "stride": 8}},
    "codebook": {"codebook": CODEBOOK},
    "experts": {"moe_graph": EXPERTS},
    "codebook+graph": {"codebook": CODEBOOK, "moe_graph": GRAPH},
    "codebook+composite": {"codebook": CODEBOOK, "composite": {"size": 1 << 14, "dim": 64}},
    "output_router": {"output_router": {"num_heads": 2}},
    "head_layers": {"head_layers": 1},
    FULL: {
        "text_sequencer": {},
        "memgram": MEMORY,
        "codebook": CODEBOOK,
        "moe_graph": GRAPH,
        "composite": {"size": 1 << 14, "dim": 64},
        "output_router": {"num_heads": 2},
        "head_layers": 1,
    },
}
TABLE = {"memgram": MEMORY, "table_rule": "momentum"}
TRIT_VARIANTS: dict[str, dict[str, Any]] = {
    "two trits": {"trits_per_weight": 2},
    "two trits: embedding, head": {"trits_per_weight": {"embedding": 2, "head": 2}},
    "two trits: attention": {"trits_per_weight": {"attention": 2}},
    "two trits: mlp": {"trits_per_weight": {"mlp": 2}},
    "memgram, two trits: tables": {**TABLE, "trits_per_weight": {"tables": 2}},
    "memgram, two trits": {**TABLE, "trits_per_weight": 2},
}
WIDER = "wider, one trit"  # the MLPs widened until the state has the bytes of "two trits"
VARIANTS = {**BLOCK_VARIANTS, **TRIT_VARIANTS, WIDER: {}}
NOTHING = {**dict.fromkeys(OPTIONAL_BLOCKS), "head_layers": 0, "table_rule": "votes", "trits_per_weight": 1}
TIMED_ROUNDS = 8
PROBE = 320  # of intermediate_size, to see how many bytes a width takes


@dataclass
class AblationRow:
    """Held-out bits per byte of a variant: after the backbone's steps, and after the backbone's time."""

    bits_per_byte_equal_steps: float
    bits_per_byte_equal_time: float
    steps_in_equal_time: int
    step_ms: float
    state_bytes: int
    logical_weights: int
    worst_spike: float  # the largest training loss over the running mean before it, after the first tenth

    to_dict = asdict


def variant_config(preset: str, name: str) -> ArbConfig:
    """The preset's backbone with the variant's blocks and no others."""
    return _widened(preset) if name == WIDER else preset_config(preset, **{**NOTHING, **VARIANTS[name]})


def _widened(preset: str) -> ArbConfig:
    """One trit a weight, with MLPs so wide that the state takes as many bytes as with two."""

    def of_width(width: int) -> ArbConfig:
        return preset_config(preset, **{**NOTHING, "intermediate_size": width})

    width = preset_config(preset).intermediate_size
    narrow, wide = (audit_config(of_width(size)).state_bytes for size in (width, width + PROBE))
    wanted = audit_config(variant_config(preset, "two trits")).state_bytes
    return of_width(width + round(PROBE * (wanted - narrow) / (wide - narrow)))


def build_variant(preset: str, name: str, settings: BenchmarkSettings, rate: float):
    """The variant's model and its optimizer, at their seed."""
    torch.manual_seed(settings.seed)
    model = ArbForCausalLM(variant_config(preset, name))
    return model, IntegerOptimizer(model, lr=rate, seed=settings.seed)


def step_times(names: list[str], settings: BenchmarkSettings) -> dict[str, Timing]:
    """Seconds of a training step of each variant, measured in the same rounds. Weights do not change."""

    def job(name: str):
        model, optimizer = build_variant(settings.preset, name, settings, 0.0)
        ids = torch.randint(0, 256, (settings.batch, settings.ctx), generator=torch.Generator().manual_seed(0))

        def step() -> None:
            model(ids, labels=ids).loss.backward()
            optimizer.step()

        return step

    return interleaved({name: job(name) for name in names}, TIMED_ROUNDS, label="step times")


def ablate(
    name: str,
    times: dict[str, Timing],
    settings: BenchmarkSettings,
    rate: float,
    train_ids: np.ndarray,
    held_out: np.ndarray,
) -> AblationRow:
    """Train a variant twice, each time with a complete learning-rate schedule; once if both runs would be equal."""
    steps = round(settings.steps * times[BACKBONE].p50 / times[name].p50)

    def run(length: int):
        shortened = dataclasses.replace(settings, steps=length)
        model, optimizer = build_variant(settings.preset, name, settings, rate)
        return train_model(name, model, optimizer, rate, shortened, train_ids, held_out)

    equal_steps = run(settings.steps)
    equal_time = equal_steps if name == BACKBONE else run(max(1, steps))
    return AblationRow(
        bits_per_byte_equal_steps=equal_steps.val_bpb,
        bits_per_byte_equal_time=equal_time.val_bpb,
        steps_in_equal_time=settings.steps if name == BACKBONE else steps,
        step_ms=times[name].p50 * MILLISECONDS,
        state_bytes=equal_steps.state_bytes,
        logical_weights=equal_steps.logical_weights,
        worst_spike=worst_spike(equal_steps.losses),
    )


def worst_spike(losses: list[float], window: int = 50) -> float:
    """The largest loss over the mean of the `window` before it, from a tenth of the run on; 1 for shorter runs."""
    start = max(window, len(losses) // 10)
    return max((float(losses[i] / np.mean(losses[i - window : i])) for i in range(start, len(losses))), default=1.0)
