"""What code finds that looks for a float parameter in a model that has none: an answer, or an error that says why."""

from __future__ import annotations

from typing import NoReturn

import torch


class AbsentParameters(torch.Tensor):
    """An empty tensor that stands for no parameters: it has the device that peft and others look for.

    Optimizers refuse it, as they refuse an empty list: they would train nothing and say nothing.
    """

    @staticmethod
    def __new__(cls, device: torch.device):
        return torch.zeros(0, dtype=torch.uint8, device=device).as_subclass(cls)

    @property
    def is_leaf(self) -> NoReturn:
        """What torch's optimizers ask of a tensor before they take it."""
        raise ValueError(
            "this model has no float parameters to optimize: train its integer state with ArbTrainer or"
            " IntegerOptimizer, or add an adapter (peft)"
        )

    def requires_grad_(self, requires_grad: bool = True) -> AbsentParameters:
        return self


class AbsentWeight:
    """Stands where an nn.Linear or nn.Embedding has its float weight: peft looks at its shape, and merges an adapter
    into its `data`, which is refused."""

    def __init__(self, packed: torch.Tensor, shape: tuple[int, int]):
        self.device, self.dtype, self.shape = packed.device, packed.dtype, torch.Size(shape)

    @property
    def data(self) -> NoReturn:
        raise ValueError(
            "a ternary layer has no float weight that an adapter could be merged into or start from: merge with"
            " training_arb.lora.lora_merge.merge_adapter or scripts/finetune_lora.py --merge, which round to trits and"
            " measure the loss before and after"
        )
