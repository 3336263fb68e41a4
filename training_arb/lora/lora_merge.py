"""Merges an adapter into a ternary base: its change of the weights is rounded to levels in the integer state.

A weight's latent is level + residual + change / scale, in cells; the residual exists under the momentum rule if the
model has training state. How a latent becomes a level (`rounding`):
    nearest      the nearest of -1, 0, 1, or of -4 to 4 with two trits a weight
    stochastic   stochastic rounding with an exact mean; random bits from a seed
    compensated  column by column, the rounding error of each passed on to the columns not yet rounded so that the
                 layer's outputs on given inputs move least (GPTQ, arXiv 2210.17323, on the fixed grid of levels)
Scales do not change. A residual, if present, becomes latent - level, limited to the cell. A merge that does not lower
the base's loss is undone, and an error is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from arb_kernels.formats.groups import spread_groups
from arb_kernels.formats.momentum_format import MomentumFormat
from arb_kernels.formats.packing import pack_levels
from arb_kernels.random_bits import random_bits, stream_key, uniform_from_high_bits
from modeling_arb import ArbForCausalLM
from modeling_arb.layers.ternary_linear import TernaryLinear
from tokenization_arb import SPECIAL_IDS
from training_arb.data.chat_data import Conversation

from .lora_adapter import assistant_loss, conversation_batches

ROUNDINGS = ("nearest", "stochastic", "compensated")
DAMPING = 0.1  # of the mean diagonal, added to the inputs' second moments
COLUMNS_AT_A_TIME = 64


@dataclass(frozen=True)
class MergeReport:
    """Losses in nats per byte of the assistant's text, over the given conversations."""

    rounding: str
    loss_base: float
    loss_adapter: float
    loss_merged: float
    flips: int
    weights: int

    def to_dict(self) -> dict:
        return {**asdict(self), "flip_share": self.flips / self.weights, "kept_share_of_gain": self.kept}

    @property
    def kept(self) -> float:
        """The share of the adapter's gain that is left: 1 is all, below 0 is worse than the base."""
        return (self.loss_base - self.loss_merged) / (self.loss_base - self.loss_adapter)

    def __str__(self) -> str:
        return (
            f"{self.rounding}: loss {self.loss_base:.4f} base, {self.loss_adapter:.4f} with the adapter,"
            f" {self.loss_merged:.4f} merged ({self.kept:.0%} of the gain kept),"
            f" {self.flips:,} of {self.weights:,} levels changed"
        )


@torch.no_grad()
def merge_adapter(
    model: PeftModel,
    conversations: Sequence[Conversation],
    rounding: str = "compensated",
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[ArbForCausalLM, MergeReport]:
    """The base with the active adapters merged into its integer state, and the losses before and after.

    conversations: what `compensated` takes its inputs from, and what the losses are measured on. The base is changed in
    place. Raises ValueError when the adapter cannot be merged, and, with base and adapter as they were, when the
    merged model is not better than the base alone.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is not one of {', '.join(ROUNDINGS)}")
    model.eval()
    layers = mergeable_layers(model)
    with model.disable_adapter():
        loss_base = assistant_loss(model, conversations, batch_size)
    loss_adapter = assistant_loss(model, conversations, batch_size)
    if not loss_adapter < loss_base:
        raise ValueError(
            f"the adapter is not merged, it does not lower the loss: {loss_base:.4f} base, {loss_adapter:.4f} with it"
        )
    moments = input_moments(model, layers, conversations, batch_size) if rounding == "compensated" else {}
    stored = {name: tensor.clone() for name, tensor in model.named_buffers()}
    flips = 0
    for i, (name, layer) in enumerate(layers.items()):
        flips += _merge_layer(layer, rounding, moments.get(name), stream_key(seed, i))
    with model.disable_adapter():
        loss_merged = assistant_loss(model, conversations, batch_size)
    weights = sum(_base(layer).logical_weights for layer in layers.values())
    report = MergeReport(rounding, loss_base, loss_adapter, loss_merged, flips, weights)
    if not loss_merged < loss_base:
        for name, tensor in model.named_buffers():
            tensor.copy_(stored[name])
        raise ValueError(f"the adapter is not merged, its gain is lost in rounding: {report}")
    return model.unload(), report


def mergeable_layers(model: PeftModel) -> dict[str, LoraLinear]:
    """The layers with an active adapter by their name. Raises ValueError naming a layer that cannot be merged."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name}: modules_to_save trains a copy in float, which integer state cannot hold")
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLinear) or not isinstance(module.get_base_layer(), TernaryLinear):
            raise ValueError(f"{name}: a {type(module).__name__} adapter cannot be merged, LoRA on linear layers can")
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        if any(module.lora_bias[adapter] for adapter in active):
            raise ValueError(f"{name}: lora_bias=True, but ternary layers have no bias to merge it into")
        if len(active) > 1 and any(module.use_dora[adapter] for adapter in active):
            raise ValueError(f"{name}: adapters {', '.join(active)} are active, and DoRA merges alone")
        if active:
            layers[name] = module
    if not layers:
        raise ValueError("no adapter is active, nothing can be merged")
    return layers


def _base(layer: LoraLinear) -> TernaryLinear:
    base = layer.get_base_layer()
    assert isinstance(base, TernaryLinear)  # mergeable_layers takes no other
    return base


def weight_change(layer: LoraLinear) -> torch.Tensor:
    """float32 (rows, columns): the sum of the active adapters' changes to W_eff."""
    weight = _base(layer).dequantize()
    total = torch.zeros_like(weight)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            change = layer.get_delta_weight(name).float()
            if layer.use_dora[name]:
                magnitude: Any = layer.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(weight, change, scaling=1)
                change = (magnitude.weight / norm)[:, None] * (weight + change) - weight
            total += change
    return total


def input_moments(
    model: PeftModel, layers: Mapping[str, nn.Module], conversations: Sequence[Conversation], batch_size: int
) -> dict[str, torch.Tensor]:
    """float32 (columns, columns) of each layer: the sum of x x^T over its inputs, without padding."""
    moments: dict[str, torch.Tensor] = {}
    with _watched(layers, moments) as counted:
        for batch in conversation_batches(conversations, batch_size, model.device):
            counted["kept"] = batch["input_ids"].flatten() != SPECIAL_IDS["PAD"]
            model(input_ids=batch["input_ids"], use_cache=False)
    return moments


@contextmanager
def _watched(layers: Mapping[str, nn.Module], moments: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Add to `moments` from every forward of the layers; the caller sets in "kept" which tokens count."""
    counted: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def add(module, inputs):
            x = inputs[0].flatten(0, -2)
            x = (x[counted["kept"]] if len(x) == len(counted["kept"]) else x).float()
            moments[name] = moments.get(name, 0) + x.T @ x

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def _merge_layer(layer: LoraLinear, rounding: str, moments: torch.Tensor | None, key: int) -> int:
    """Round one layer in place; the number of levels that changed."""
    base = _base(layer)
    levels, largest = base.levels().clone(), base.largest_level
    change = weight_change(layer) / spread_groups(base.scale(), base.group_size, base.columns)
    form = MomentumFormat(base.momentum_bits)
    residual, codes = form.split(base.accum) if hasattr(base, "accum") else (torch.zeros_like(levels), None)
    latent = levels + residual.float() / form.cell + change
    if rounding == "nearest":
        rounded = latent.round().clamp(-largest, largest)
    elif rounding == "stochastic":
        uniform = uniform_from_high_bits(random_bits(key, base.rows, base.columns, latent.device))
        rounded = (levels + change + uniform).floor().clamp(-largest, largest)
    else:
        assert moments is not None
        rounded = round_compensated(levels + change, moments, largest)
    base.T_packed.copy_(pack_levels(rounded.to(torch.int8), base.trits))
    if codes is not None:
        steps = ((latent - rounded) * form.cell).round().clamp(-form.cell // 2, form.cell // 2 - 1)
        base.accum.copy_(form.join(steps.to(codes.dtype), codes))
    return int((rounded != levels).sum())


def round_compensated(wanted: torch.Tensor, moments: torch.Tensor, largest: int = 1) -> torch.Tensor:
    """wanted float32 (N, K) in cells, moments (K, K) of the inputs -> levels of -largest to largest, float32 (N, K).

    Columns with large inputs are rounded first. The error of a column is compensated in later columns in proportion to
    the correlation of their inputs.
    """
    order = torch.argsort(moments.diag(), descending=True)
    damping = DAMPING * moments.diag().mean().clamp_min(1e-12)
    damped = moments[order][:, order].double() + damping.double() * torch.eye(len(order), device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()  # (K, K)
    left = wanted[:, order].clone()
    rounded = torch.empty_like(left)
    for begin in range(0, len(order), COLUMNS_AT_A_TIME):
        end = min(begin + COLUMNS_AT_A_TIME, len(order))
        errors = torch.empty(len(left), end - begin, device=left.device)
        for i in range(begin, end):
            rounded[:, i] = left[:, i].round().clamp(-largest, largest)
            error = (left[:, i] - rounded[:, i]) / factor[i, i]
            left[:, i:end] -= error[:, None] * factor[i, i:end]
            errors[:, i - begin] = error
        left[:, end:] -= errors @ factor[begin:end, end:]
    levels = torch.empty_like(rounded)
    levels[:, order] = rounded
    return levels
