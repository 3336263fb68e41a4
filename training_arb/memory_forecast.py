"""How much memory a training step will need, found by running smaller ones and counting every tensor's bytes.

A step's peak is the state, what the forward saves, which grows with the batch, and the transients of the layer where
backward is dearest. Counting tensors where they are made is exact and does not depend on the allocator; what a process
or a device uses on top of it (the runtime, fragments) is measured in benchmarks/.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_arb import ArbForCausalLM

from .integer_optimizer import IntegerOptimizer
from .state_audit import audit_model


class CountedTensors(TorchDispatchMode):
    """Bytes of the storages made inside the block and still alive: `now`, and `peak` over the block."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class StepMemory:
    """Bytes: all persistent state, what the forward leaves for backward, and the most above the state at any moment."""

    state: int
    saved: int
    transient_peak: int

    @property
    def peak(self) -> int:
        return self.state + self.transient_peak


def measure_step(model: ArbForCausalLM, optimizer: IntegerOptimizer, batch: int, ctx: int) -> StepMemory:
    """Run one training step of random bytes, (batch, ctx), and count. The model learns from it."""
    device = model.device
    ids = torch.randint(0, 256, (batch, ctx), generator=torch.Generator().manual_seed(0)).to(device)
    with CountedTensors() as counted:
        loss = model(ids, labels=ids).loss
        saved = counted.now
        loss.backward()
        optimizer.step()
    return StepMemory(audit_model(model, optimizer).state_bytes, saved, counted.peak)


def forecast_step(model: ArbForCausalLM, batch: int, ctx: int, **settings) -> StepMemory:
    """The memory of a training step of (batch, ctx), from steps of a quarter and half the batch. The model learns.

    settings: IntegerOptimizer's. Batches below four are measured as they are.
    """
    optimizer = IntegerOptimizer(model, **settings)
    try:
        measure_step(model, optimizer, 1, ctx)  # what is made once and kept is no part of a step
        if batch < 4:
            return measure_step(model, optimizer, batch, ctx)
        few, more = batch // 4, batch // 2
        first, second = (measure_step(model, optimizer, size, ctx) for size in (few, more))
        steps = (batch - more) / (more - few)
        return StepMemory(
            state=second.state,
            saved=round(second.saved + steps * (second.saved - first.saved)),
            transient_peak=round(second.transient_peak + steps * (second.transient_peak - first.transient_peak)),
        )
    finally:
        optimizer.detach()
