"""ArbPreTrainedModel: saving, loading and counting weights of models without float parameters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.checkpoints.checked_loading import CheckedLoading
from modeling_arb.checkpoints.file_modes import follow_umask
from modeling_arb.checkpoints.remote_code import SavesItsCode
from modeling_arb.layers.absent_parameters import AbsentParameters
from modeling_arb.layers.integer_state import IntegerState
from modeling_arb.layers.ternary_matrix import TernaryMatrix


class ArbPreTrainedModel(SavesItsCode, CheckedLoading):
    """Base of the ARB models. They have no parameters: device, dtype and counts come from buffers and the config."""

    config: ArbConfig
    config_class = ArbConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ContextBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    if TYPE_CHECKING:

        def to(self, *args, **kwargs) -> Self:
            """nn.Module.to, whose signature PreTrainedModel hides from type checkers."""
            ...

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations. Integer state has its own dtypes."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))

    def parameters(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """The parameters of an adapter; without one a stand-in, see AbsentParameters."""
        found = list(super().parameters(recurse))
        return iter(found or [AbsentParameters(buffer.device) for buffer in islice(self.buffers(), 1)])

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of ternary weights and of an adapter's float parameters."""
        ternary = sum(matrix.logical_weights for matrix in self.ternary_matrices().values())
        return ternary + super().num_parameters(only_trainable, exclude_embeddings)

    def integer_states(self) -> dict[str, IntegerState]:
        """Every module with persistent integer buffers by its name: matrices, tables, counts, edges."""
        return {name: module for name, module in self.named_modules() if isinstance(module, IntegerState)}

    def ternary_matrices(self) -> dict[str, TernaryMatrix]:
        """Every ternary matrix by its name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryMatrix)}

    def add_training_state(self) -> None:
        """Make a model from an inference checkpoint trainable: residual and momentum start at zero."""
        for module in self.integer_states().values():
            module.add_training_state()
        self.config.training_state = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, IntegerState):
            module.reset_state()

    def save_pretrained(
        self, save_directory, *, training_state: bool | None = None, state_dict: dict | None = None, **kwargs
    ) -> None:
        """Write the checkpoint, its config and its code.

        training_state: False writes an inference checkpoint without the update rule's accumulators; None and True keep
        them.
        """
        if training_state and not self.config.training_state:
            raise ValueError("training_state=True: this model was loaded without training state")
        if training_state is False and self.config.training_state:
            state_dict = self._inference_state(state_dict if state_dict is not None else self.state_dict())
            self.config.training_state = False
            try:
                self._save(save_directory, state_dict, **kwargs)
            finally:
                self.config.training_state = True
        else:
            self._save(save_directory, state_dict, **kwargs)

    def _save(self, save_directory, state_dict: dict | None, is_main_process: bool = True, **kwargs) -> None:
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        if is_main_process:
            follow_umask(Path(save_directory).glob("model*.safetensors"))

    def _inference_state(self, state_dict: dict) -> dict:
        training = {
            f"{name}.{tensor}"
            for name, module in self.integer_states().items()
            for tensor, spec in module.layout().items()
            if not spec.inference
        }
        return {key: tensor for key, tensor in state_dict.items() if key not in training}
