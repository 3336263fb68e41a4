"""Stand-ins for the float parameters that other libraries look for: they have a device and a shape, or raise a clear
error."""

from __future__ import annotations

from typing import NoReturn

import torch


class AbsentParameters(torch.Tensor):
    """An empty tensor in place of parameters. peft and others read its device.

    Optimizers refuse it, as they refuse an empty list. Otherwise they would silently train nothing.
    """

    @staticmethod
    def __new__(cls, device: torch.device):
        return torch.zeros(0, dtype=torch.uint8, device=device).as_subclass(cls)

    @property
    def is_leaf(self) -> NoReturn:
        """Checked by torch's optimizers before they accept a tensor."""
        raise ValueError(
            "this model has no float parameters to optimize: train its integer state with ArbTrainer or"
            " IntegerOptimizer, or add an adapter (peft)"
        )

    def requires_grad_(self, requires_grad: bool = True) -> AbsentParameters:
        return self


class AbsentWeight:
    """In place of the float weight of nn.Linear or nn.Embedding. peft reads its shape. Merging an adapter into its
    `data` raises an error."""

    def __init__(self, packed: torch.Tensor, shape: tuple[int, int]):
        self.device, self.dtype, self.shape = packed.device, packed.dtype, torch.Size(shape)

    @property
    def data(self) -> NoReturn:
        raise ValueError(
            "a ternary layer has no float weight to merge an adapter into or to start one from: merge with"
            " training_arb.lora.lora_merge.merge_adapter or scripts/finetune_lora.py --merge, which round to trits and"
            " measure the loss before and after"
        )
