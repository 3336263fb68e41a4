"""How much memory a training step will need, found by running small ones and counting every tensor's bytes.

A step's peak is the state, what the forward saves, which grows with the batch, and the transients of the layer where
backward is dearest. Two small batches make the same tensors in the same order, each larger by the same amount for every
row, so the steps of other batches are known without being run. A device's peak is that of its tensors.

A process on the CPU also holds the interpreter and its libraries, and holes: freed memory is kept (cpu_allocator.py),
and part of it lies in holes that what is asked next does not fit. glibc takes a little more than an aligned block and
gives its small ends to other objects, so a freed block rarely takes its like again. Under checkpointing, where each
layer's tensors come and go, the holes outgrow the tensors. Their shares are fitted to runs (benchmarks/README.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from modeling_arb import ArbForCausalLM
from training_arb.common.cpu_allocator import LARGEST_BLOCK
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .counted_tensors import CountedTensors
from .live_memory import MEGABYTE, resident_mb
from .state_audit import audit_model

HOLES = 0.3  # of what stands in the heap
HOLES_RECOMPUTED = 1.05  # of all tensors, under checkpointing
FIRST_STEP_MB = 23.0  # what a first step brings into memory besides tensors: code, graph nodes, threads
FEW, MORE = 2, 3  # batches that are run; a lone row takes other paths through some ops


@dataclass(frozen=True)
class StepMemory:
    """Bytes: all persistent state; what the forward leaves for backward; the most above the state at any moment.

    Of the latter apart, each at its own highest: blocks that malloc keeps in its heap, and those so large that it maps
    them one by one and gives them back. recomputed: whether layers run again in backward (checkpointing).
    """

    state: int
    saved: int
    transient_peak: int
    heap_peak: int
    mapped_peak: int
    recomputed: bool = False

    @property
    def peak(self) -> int:
        return self.state + self.transient_peak

    def process_peak_mb(self, base_mb: float) -> float:
        """The most that a process on the CPU will have resident, in MB; base_mb: what it has before its model."""
        transients = self.heap_peak + self.mapped_peak
        holes = HOLES_RECOMPUTED * transients if self.recomputed else HOLES * self.heap_peak
        return base_mb + FIRST_STEP_MB + (self.state + transients + holes) / MEGABYTE


@dataclass(frozen=True)
class StepTrace:
    """The storages of one step as CountedTensors saw them; forward_events: how many events the forward had."""

    state: int
    sizes: Sequence[int]
    events: Sequence[int]
    forward_events: int
    recomputed: bool = False

    def memory(self) -> StepMemory:
        now = heap = mapped = saved = peak = heap_peak = mapped_peak = 0
        for place, event in enumerate(self.events):
            if place == self.forward_events:
                saved = now
            size = self.sizes[event] if event >= 0 else -self.sizes[~event]
            if abs(size) < LARGEST_BLOCK:
                heap += size
            else:
                mapped += size
            now += size
            peak, heap_peak, mapped_peak = max(peak, now), max(heap_peak, heap), max(mapped_peak, mapped)
        return StepMemory(self.state, saved, peak, heap_peak, mapped_peak, self.recomputed)


def trace_step(model: ArbForCausalLM, optimizer: IntegerOptimizer, batch: int, ctx: int) -> StepTrace:
    """Run one training step of random bytes, (batch, ctx), and note its storages. The model learns from it."""
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
    """Run one training step of random bytes, (batch, ctx), and count. The model learns from it."""
    return trace_step(model, optimizer, batch, ctx).memory()


def forecast_step(model: ArbForCausalLM, batch: int, ctx: int, **settings) -> StepMemory:
    """The memory of a training step of (batch, ctx), from steps of small batches. The model learns.

    settings: IntegerOptimizer's. Where the two small steps differ in their order of tensors, as routing makes them,
    their peaks are extrapolated instead.
    """
    optimizer = IntegerOptimizer(model, **settings)
    try:
        trace_step(model, optimizer, 1, ctx)  # what is made once and kept is no part of a step
        if batch <= MORE:
            return measure_step(model, optimizer, batch, ctx)
        first, second = (trace_step(model, optimizer, size, ctx) for size in (FEW, MORE))
        if first.events == second.events:
            return _extrapolate_trace(first, second, batch).memory()
        few, more = max(FEW, batch // 4), max(MORE, batch // 2)
        return _extrapolate(*((size, measure_step(model, optimizer, size, ctx)) for size in (few, more)), batch)
    finally:
        optimizer.detach()


def _extrapolate_trace(first: StepTrace, second: StepTrace, batch: int) -> StepTrace:
    steps = (batch - FEW) / (MORE - FEW)
    sizes = [max(0, round(few + steps * (more - few))) for few, more in zip(first.sizes, second.sizes, strict=True)]
    return replace(second, sizes=sizes)


def _extrapolate(few: tuple[int, StepMemory], more: tuple[int, StepMemory], batch: int) -> StepMemory:
    """Of each (batch, its memory)."""
    steps = (batch - more[0]) / (more[0] - few[0])
    grown = {}
    for name in ("saved", "transient_peak", "heap_peak", "mapped_peak"):
        low, high = getattr(few[1], name), getattr(more[1], name)
        grown[name] = max(0, round(high + steps * (high - low)))
    return replace(more[1], **grown)


def process_base_mb() -> float:
    """What a training process has resident before it builds a model, in MB: import what it imports, and look.

    Right in a process that has done nothing large yet.
    """
    for module in ("train.trainer_arb", "report.run_report"):
        importlib.import_module(f"training_arb.{module}")
    return resident_mb()
