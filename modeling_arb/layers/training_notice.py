"""Warns once when a backward pass changes nothing: the model was trained as models with float weights are."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

from .ternary_matrix import TernaryMatrix

NOTHING_LEARNS = (
    "this backward pass changes no weight: the ternary weights are integers, which an optimizer for float parameters"
    " (the stock Trainer's, or a loop's) cannot move. To train them, install the ARB repository (pip install PATH) and"
    " use training_arb.ArbTrainer in place of Trainer, training_arb.IntegerOptimizer(model) in a loop, or the command"
    " `arb pretrain --init_from MODEL --data FILES`. Without the repository, train a LoRA adapter: peft's"
    " get_peft_model(model, LoraConfig(target_modules='all-linear')) and the stock Trainer"
)


def say_when_nothing_learns(model: nn.Module, hidden_states: torch.Tensor) -> None:
    """In training, warn in the backward pass that reaches `hidden_states`, of whatever loss, when no matrix of `model`
    has an optimizer waiting for its gradient and no float parameter (an adapter's) is trained."""
    if not (model.training and hidden_states.requires_grad):
        return

    def check(gradient: torch.Tensor) -> None:
        armed = any(module.armed for module in model.modules() if isinstance(module, TernaryMatrix))
        if not armed and not any(parameter.requires_grad for _, parameter in model.named_parameters()):
            logging.get_logger(__name__).warning_once(NOTHING_LEARNS)

    hidden_states.register_hook(check)
