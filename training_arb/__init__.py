"""Training ARB models on integer state. Names are imported at their first use, so that a script which needs only a
small module, for example for --help, does not import torch and transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training_arb.memory.state_audit import audit_model
    from training_arb.optim.integer_optimizer import IntegerOptimizer
    from training_arb.train.trainer_arb import ArbTrainer
    from training_arb.train.training_args_arb import ArbTrainingArguments

HOMES = {
    "ArbTrainer": "train.trainer_arb",
    "ArbTrainingArguments": "train.training_args_arb",
    "IntegerOptimizer": "optim.integer_optimizer",
    "audit_model": "memory.state_audit",
}

__all__ = ["ArbTrainer", "ArbTrainingArguments", "IntegerOptimizer", "audit_model"]


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
