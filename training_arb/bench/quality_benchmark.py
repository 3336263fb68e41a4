"""One configuration's run in the quality benchmark: same data, order, shape and steps for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from configuration_arb import ArbConfig, preset_config
from modeling_arb import ArbForCausalLM
from training_arb.evaluation.bits_per_byte import bits_per_byte
from training_arb.memory.live_memory import peak_memory_mb, reset_peak_memory
from training_arb.memory.state_audit import audit_model
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .float_baselines import ArbFloatBaseline

DEFAULT_CONFIGS = ("Adam_FP32", "Adam_STE", "SignSGD_Old", "TrueTernary", "TwoTrit_Edges", "TwoTrit", "Correlation")
STE_CONFIGS = ("Adam_STE", "Adam_STE_TwoTrit_Edges", "Adam_STE_TwoTrit")
ADAM_CONFIGS = ("Adam_FP32", "Adam_BF16", *STE_CONFIGS)
MOMENTUM_CONFIGS = ("TrueTernary", "TwoTrit_Edges", "TwoTrit")
CONFIGS = tuple(dict.fromkeys((*DEFAULT_CONFIGS, *ADAM_CONFIGS)))
UPDATE_RULES = {"SignSGD_Old": "flip", "Correlation": "correlation"}  # momentum in the others
GROUP_SIZES = {"SignSGD_Old": 32, "Correlation": 32}  # a whole row in the others
TRITS = {"TwoTrit": 2, "TwoTrit_Edges": {"embedding": 2, "head": 2}}  # a weight: 1 in the others
WARMUP_STEPS = 50
FINAL_RATE = 0.02


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings that all configurations of a benchmark share."""

    preset: str
    steps: int
    batch: int
    ctx: int
    seed: int
    accum_threshold: int
    scale_update_interval: int
    print_every: int
    compute: str = "auto"
    micro_batches: int = 1  # equal parts of a step's windows, one backward each


@dataclass
class BenchmarkResult:
    """Losses in nats per byte; `curve` holds (step, held-out loss) along the way."""

    val_loss: float
    val_bpb: float
    train_loss_final: float
    state_bytes: int
    state_bytes_per_weight: float
    logical_weights: int
    trainable_float_params: int
    step_ms_median: float
    peak_mem_mb: float
    learning_rate: float
    state_bytes_at_3b: int
    rates_tried: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)

    to_dict = asdict


@dataclass
class TrainedModel:
    """The result of one training run. Losses are in nats per byte; `losses` has one per step."""

    val_loss: float
    losses: list[float]
    milliseconds: list[float]
    curve: list[tuple[int, float]]
    state_bytes: int
    logical_weights: int

    @property
    def val_bpb(self) -> float:
        return self.val_loss / np.log(2)


def build(name: str, settings: BenchmarkSettings, rate: float) -> tuple[ArbForCausalLM, torch.optim.Optimizer]:
    """The model and optimizer of a configuration at a learning rate."""
    torch.manual_seed(settings.seed)
    if name in ADAM_CONFIGS:
        model = float_baseline(name, _config(name, settings))
        return model, torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    model = ArbForCausalLM(_config(name, settings))
    return model, IntegerOptimizer(
        model,
        lr=rate,
        flip_threshold=settings.accum_threshold,
        scale_update_interval=settings.scale_update_interval,
        seed=settings.seed,
    )


def float_baseline(name: str, config: ArbConfig) -> ArbFloatBaseline:
    """The model of one of ADAM_CONFIGS."""
    return ArbFloatBaseline(config, straight_through=name in STE_CONFIGS, autocast=name == "Adam_BF16")


def _config(name: str, settings: BenchmarkSettings) -> ArbConfig:
    return preset_config(settings.preset, **state_fields(name), compute=settings.compute)


def state_fields(name: str) -> dict[str, Any]:
    """The fields of ArbConfig by which a configuration differs from the others."""
    return {
        "update_rule": UPDATE_RULES.get(name, "momentum"),
        "group_size": GROUP_SIZES.get(name, 0),
        "trits_per_weight": TRITS.get(name.removeprefix("Adam_STE_"), 1),
    }


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warmup, then linear decay to 2 %."""
    warm = min((step + 1) / WARMUP_STEPS, 1.0)
    progress = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return warm * (1 - (1 - FINAL_RATE) * progress)


def train(
    name: str, settings: BenchmarkSettings, rate: float, train_ids: np.ndarray, held_out: np.ndarray
) -> BenchmarkResult:
    """Train one configuration at one rate and measure it."""
    reset_peak_memory()
    model, optimizer = build(name, settings, rate)
    trained = train_model(name, model, optimizer, rate, settings, train_ids, held_out)
    return BenchmarkResult(
        val_loss=trained.val_loss,
        val_bpb=trained.val_bpb,
        train_loss_final=statistics.mean(trained.losses[-20:]),
        state_bytes=trained.state_bytes,
        state_bytes_per_weight=trained.state_bytes / trained.logical_weights,
        logical_weights=trained.logical_weights,
        trainable_float_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        step_ms_median=statistics.median(trained.milliseconds),
        peak_mem_mb=peak_memory_mb(),
        learning_rate=rate,
        state_bytes_at_3b=round(trained.state_bytes / trained.logical_weights * 3e9),
        curve=trained.curve,
    )


def train_model(
    label: str,
    model: ArbForCausalLM,
    optimizer: torch.optim.Optimizer,
    rate: float,
    settings: BenchmarkSettings,
    train_ids: np.ndarray,
    held_out: np.ndarray,
) -> TrainedModel:
    """Train on random windows, whose order depends only on the seed."""
    ids = torch.from_numpy(train_ids.astype(np.int64))
    order = torch.Generator().manual_seed(settings.seed)
    losses, milliseconds, curve = [], [], []
    for step in tqdm(range(settings.steps), desc=f"{label} {rate:g}", mininterval=2):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, settings.steps)
        starts = torch.randint(0, len(ids) - settings.ctx + 1, (settings.batch, 1), generator=order)
        block = ids[starts + torch.arange(settings.ctx)]
        started = time.perf_counter()
        loss = _train_step(model, optimizer, block.chunk(settings.micro_batches))
        milliseconds.append(1000 * (time.perf_counter() - started))
        losses.append(loss)
        if (step + 1) % settings.print_every == 0 and step + 1 < settings.steps:
            curve.append((step + 1, held_out_loss(model, held_out[: 64 * settings.ctx], settings.ctx)))
    val_loss = held_out_loss(model, held_out, settings.ctx)
    state_bytes, weights = persistent_state(model, optimizer)
    return TrainedModel(val_loss, losses, milliseconds, [*curve, (settings.steps, val_loss)], state_bytes, weights)


def _train_step(model: ArbForCausalLM, optimizer: torch.optim.Optimizer, parts: Sequence[torch.Tensor]) -> float:
    """One step on equal parts of its windows; returns its loss."""
    total = 0.0
    for number, part in enumerate(parts, start=1):
        if isinstance(optimizer, IntegerOptimizer):
            optimizer.begin_micro_batch(last=number == len(parts))
        loss = model(part, labels=part).loss / len(parts)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def held_out_loss(model: ArbForCausalLM, ids: np.ndarray, ctx: int) -> float:
    """Nats per byte over windows of `ctx` that overlap by one trigram: every id with a full trigram before it."""
    model.eval()
    loss = bits_per_byte(model, ids, ctx, ctx - 3)["nats_per_byte"]
    model.train()
    return loss


def persistent_state(model: ArbForCausalLM, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of all tensors that outlive a step, in model and optimizer (gradients do not), and logical weights."""
    if isinstance(optimizer, IntegerOptimizer):
        audit = audit_model(model, optimizer)
        return audit.state_bytes, audit.logical_weights
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors), sum(p.numel() for p in model.parameters())


def tuned(rates: list[float], run: Callable[[float], BenchmarkResult]) -> BenchmarkResult:
    """The result of the best learning rate, with the loss of each."""
    results = {rate: run(rate) for rate in rates}
    best = min(results.values(), key=lambda result: result.val_loss)
    best.rates_tried = {f"{rate:g}": result.val_loss for rate, result in results.items()}
    return best
