"""BaseTrainer: changes to transformers' Trainer for integer models and for adapters."""

from __future__ import annotations

from typing import NoReturn

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from modeling_arb.layers.integer_state import ONE_PROCESS_PER_GPU

from .progress_lines import ProgressLines
from .training_options import CheckedTrainingArguments


class BaseTrainer(Trainer):
    """label_smoothing_factor is applied inside the model's own loss, where the labels are shifted by one byte; the
    reported loss stays the plain one.

    Raises ValueError if one process would train on several GPUs, or if an argument would be ignored.
    """

    arguments_class: type[CheckedTrainingArguments]
    shown: tuple[str, ...]  # columns of the lines that a person sees

    def __init__(self, model: nn.Module | None, args: CheckedTrainingArguments, **kwargs):
        if not isinstance(args, self.arguments_class):
            raise ValueError(f"args={type(args).__name__}: {type(self).__name__} takes {self.arguments_class.__name__}")
        if args.n_gpu > 1:
            raise ValueError(f"n_gpu={args.n_gpu}: {ONE_PROCESS_PER_GPU}")
        if args.label_smoothing_factor and kwargs.get("compute_loss_func"):
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: compute_loss_func replaces the loss that it"
                " smooths; smooth there"
            )
        super().__init__(model=model, args=args, **kwargs)
        self.label_smoother = None  # transformers' takes the labels away from the model
        self.bytes_seen = 0
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
        elif self.pop_callback(ProgressCallback) is not None:  # in a notebook there is another one, a table
            self.add_callback(ProgressLines(self.shown, lambda: self.bytes_seen * self.args.world_size))

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        if model.training:
            self.bytes_seen += inputs["input_ids"].numel()
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def hyperparameter_search(self, *args, **kwargs) -> NoReturn:
        """Raises ValueError: the checkpoints of all trials would have the same names in one folder."""
        raise ValueError(
            "hyperparameter_search: not supported, trials would overwrite each other's checkpoints; train once a"
            " setting, each with an output_dir of its own"
        )
