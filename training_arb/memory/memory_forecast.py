"""Forecast of a training step's memory: the peak of its tensors, and what a process needs on top of them.

The peak is the state, what the forward saves, which grows with the batch, and the transients of the layer whose
backward needs most. Two steps of small batches make the same tensors in the same order, each larger by the same amount
for every row, so the steps of other batches are known without being run. A device's peak is that of its tensors.

A process on a CPU needs more: the interpreter and its libraries, and memory that the allocator holds but cannot use
again for tensors of other sizes. How much is measured, not modelled. In 23 training runs of 47 thousand to 14
million weights (benchmarks/README.md) the resident peak above the libraries was 1.2 to 1.5 times the tensors, with
checkpointing 1.6 to 2.3 times, besides about 25 MB that any first step takes. The forecast takes a little more than
the most that was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from modeling_arb import ArbForCausalLM
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .counted_tensors import CountedTensors
from .live_memory import MEGABYTE
from .state_audit import audit_model

MARGIN, MARGIN_RECOMPUTED = 1.6, 2.4  # resident memory of a CPU process over its tensors, at most
FIRST_STEP_MB = 25.0  # what a first step takes besides tensors: code, graph nodes, threads
FEW, MORE = 2, 3  # batches that are run; a lone row takes other paths through some ops


@dataclass(frozen=True)
class StepMemory:
    """Bytes: all persistent state; what the forward leaves for backward; the most above the state at any moment.

    recomputed: whether layers run again in backward (checkpointing).
    """

    state: int
    saved: int
    transient_peak: int
    recomputed: bool = False

    @property
    def peak(self) -> int:
        return self.state + self.transient_peak

    @property
    def margin(self) -> float:
        """The most that a CPU process was found to have resident, as a multiple of its tensors."""
        return MARGIN_RECOMPUTED if self.recomputed else MARGIN

    def process_peak_mb(self, base_mb: float) -> float:
        """The most that a process on the CPU will have resident, in MB; base_mb: what it has before its model."""
        return base_mb + FIRST_STEP_MB + self.margin * self.peak / MEGABYTE


@dataclass(frozen=True)
class StepTrace:
    """The storages of one step as CountedTensors saw them; forward_events: how many events the forward had."""

    state: int
    sizes: Sequence[int]
    events: Sequence[int]
    forward_events: int
    recomputed: bool = False

    def memory(self) -> StepMemory:
        now = saved = peak = 0
        for place, event in enumerate(self.events):
            if place == self.forward_events:
                saved = now
            now += self.sizes[event] if event >= 0 else -self.sizes[~event]
            peak = max(peak, now)
        return StepMemory(self.state, saved, peak, self.recomputed)


def trace_step(model: ArbForCausalLM, optimizer: IntegerOptimizer, batch: int, ctx: int) -> StepTrace:
    """Run one training step on random bytes (batch, ctx) and record its storages. The model learns from it."""
    device = model.device
    ids = torch.randint(0, 256, (batch, ctx), generator=torch.Generator().manual_seed(0)).to(device)
    with CountedTensors() as counted:
        loss = model(ids, labels=ids).loss
        forward_events = len(counted.events)
        loss.backward()
        optimizer.step()
    state = audit_model(model, optimizer).state_bytes
    return StepTrace(state, counted.sizes, list(counted.events), forward_events, model.is_activation_checkpointing)


def measure_step(model: ArbForCausalLM, optimizer: IntegerOptimizer, batch: int, ctx: int) -> StepMemory:
    """Run one training step on random bytes (batch, ctx) and count its memory. The model learns from it."""
    return trace_step(model, optimizer, batch, ctx).memory()


def forecast_step(model: ArbForCausalLM, batch: int, ctx: int, **settings) -> StepMemory:
    """The memory of a training step of (batch, ctx), from steps of small batches. The model learns.

    settings: IntegerOptimizer's. Where two small steps differ in their order of tensors, as with routed experts, the
    peaks of larger ones are extrapolated instead.
    """
    optimizer = IntegerOptimizer(model, **settings)
    try:
        trace_step(model, optimizer, 1, ctx)  # so that what is made once and kept is not counted
        if batch <= MORE:
            return measure_step(model, optimizer, batch, ctx)
        first, second = (trace_step(model, optimizer, size, ctx) for size in (FEW, MORE))
        if first.events == second.events:
            return _extrapolate_trace(first, second, batch).memory()
        few, more = max(FEW, batch // 4), max(MORE, batch // 2)
        small, large = ((size, measure_step(model, optimizer, size, ctx)) for size in (few, more))
        return _extrapolate(small, large, batch)
    finally:
        optimizer.detach()


def _extrapolate_trace(first: StepTrace, second: StepTrace, batch: int) -> StepTrace:
    steps = (batch - FEW) / (MORE - FEW)
    sizes = [max(0, round(few + steps * (more - few))) for few, more in zip(first.sizes, second.sizes, strict=True)]
    return replace(second, sizes=sizes)


def _extrapolate(few: tuple[int, StepMemory], more: tuple[int, StepMemory], batch: int) -> StepMemory:
    """Each given as (batch, its memory)."""
    steps = (batch - more[0]) / (more[0] - few[0])
    grown = {}
    for name in ("saved", "transient_peak"):
        low, high = getattr(few[1], name), getattr(more[1], name)
        grown[name] = max(0, round(high + steps * (high - low)))
    return replace(more[1], **grown)
