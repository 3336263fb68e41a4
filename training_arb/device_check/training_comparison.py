"""Train the same model on a device and on the CPU, step by step, and report where their states first differ.

Integer kernels give the same bits everywhere. Float attention does not, and one different rounding can change a trit. A
difference is therefore reported but not a failure, as long as the losses agree. The run on the device is repeated to
check that the device agrees with itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from configuration_arb import ArbConfig
from modeling_arb import ArbForCausalLM
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .kernel_tests import first_difference

ROOT = Path(__file__).parents[2]
LARGEST_LOSS_DIFFERENCE = 0.02  # of the CPU's loss


class Run:
    """A model in training on one device, always from the same start."""

    def __init__(self, config: ArbConfig, device: torch.device):
        torch.manual_seed(0)
        self.device = device
        self.model = ArbForCausalLM(config).to(device)
        self.optimizer = IntegerOptimizer(self.model)
        self.losses: list[float] = []

    def step(self, block: torch.Tensor) -> None:
        block = block.to(self.device)
        loss = self.model(block, labels=block).loss
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def text_blocks(steps: int, batch: int, ctx: int) -> Iterator[torch.Tensor]:
    """int64 (batch, ctx), a block a step, of the repository's own documents."""
    data = b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/**/*.md")))
    if not data:
        raise ValueError(f"docs={str(ROOT / 'docs')!r} has no documents: run this from a checkout of the repository")
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - ctx, (batch, 1), generator=order)
        yield ids[starts + torch.arange(ctx)]


def state_difference(on_cpu: ArbForCausalLM, on_device: ArbForCausalLM) -> dict | None:
    """The first tensor, by the model's order, that differs, and how many do; None where all are equal."""
    theirs = {name: tensor.cpu() for name, tensor in on_device.state_dict().items()}
    state = on_cpu.state_dict()
    differing = [name for name, tensor in state.items() if not torch.equal(tensor, theirs[name])]
    if not differing:
        return None
    name = differing[0]
    said = first_difference(state[name], theirs[name])
    return {"tensor": name, "difference": said, "tensors_that_differ": len(differing), "tensors": len(state)}


def compare_training(config: ArbConfig, device: torch.device, steps: int, batch: int, ctx: int) -> dict:
    """Losses and state hashes of the device and of the CPU, and the first step and tensor where the states differ:
    {"passed", "summary", "states_equal", "first_difference", "largest_loss_difference", ...}."""
    runs = {"device": Run(config, device), "cpu": Run(config, torch.device("cpu"))}
    again, difference = Run(config, device), None
    for step, block in enumerate(text_blocks(steps, batch, ctx)):
        for run in (*runs.values(), again):
            run.step(block)
        if difference is None:
            found = state_difference(runs["cpu"].model, runs["device"].model)
            difference = None if found is None else {"step": step, **found}
    losses = {name: run.losses for name, run in runs.items()}
    apart = [abs(ours - theirs) / theirs for ours, theirs in zip(*losses.values(), strict=True)]
    largest = max(apart) if all(map(math.isfinite, apart)) else math.inf
    hashes = {name: state_hash(run.model) for name, run in runs.items()}
    repeats = state_hash(again.model) == hashes["device"]
    where = "same bits as the CPU"
    if difference is not None:
        where = f"parts at step {difference['step']} in {difference['tensor']}"
    return {
        "passed": largest <= LARGEST_LOSS_DIFFERENCE,
        "summary": f"{where}; losses within {largest:.2%}; a second run {'agrees' if repeats else 'differs'}",
        "steps": steps,
        "batch": batch,
        "ctx": ctx,
        "states_equal": difference is None,
        "first_difference": difference,
        "second_run_equal": repeats,
        "largest_loss_difference": largest if math.isfinite(largest) else None,
        "state_sha256": hashes,
        "losses": losses,
    }
