"""ArbTrainer: transformers' Trainer with the integer optimizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import read_json_object
from training_arb.checkpoints.checkpoint_files import check_checkpoint
from training_arb.common.atomic_files import write_json
from training_arb.data.mixed_stream import MixedStream
from training_arb.memory.state_audit import audit_model, zero_share
from training_arb.optim.integer_optimizer import IntegerOptimizer

from .divergence import DivergenceStop
from .hub_trainer import HubTrainer
from .saving_trainer import check_same
from .training_args_arb import ArbTrainingArguments

STREAM_FILE = "stream.json"
INCIDENTAL_FIELDS = ("transformers_version", "auto_map", "use_cache", "architectures", "_name_or_path")


class ArbTrainer(HubTrainer):
    """Trains an ArbForCausalLM's integer state. All else is as in the stock Trainer.

    run_description: settings that must be equal when a run is resumed (data, block length, ...). optimizers: (None,
    None), or an IntegerOptimizer attached to `model` and, or None, a scheduler of it. Raises ValueError on any other
    optimizer, because it could not update integer weights.
    """

    args: ArbTrainingArguments
    model: ArbForCausalLM
    arguments_class = ArbTrainingArguments
    shown = ("loss", "bits_per_byte", "learning_rate", "flip_rate", "bytes_per_second", "seconds_left")

    def __init__(
        self,
        model: ArbForCausalLM | None = None,
        args: ArbTrainingArguments | None = None,
        run_description: dict | None = None,
        **kwargs,
    ):
        args = ArbTrainingArguments() if args is None else args
        check_optimizers(kwargs.get("optimizers", (None, None)), kwargs.get("optimizer_cls_and_kwargs"))
        run_description = {
            **(run_description or {}),
            "seed": args.seed,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        }
        self.integer_optimizer: IntegerOptimizer | None = None
        self._stream = kwargs["train_dataset"] if isinstance(kwargs.get("train_dataset"), MixedStream) else None
        super().__init__(model, args, run_description, **kwargs)
        if self._stream is not None:
            self.set_in_training["ignore_data_skip"] = True  # the stream continues from its own position
        if self.optimizer is not None and not self.model.byte_head.proj.armed:
            raise ValueError("optimizers=IntegerOptimizer: it is attached to another model")
        self.add_callback(DivergenceStop(args.stop_loss_factor, args.stop_loss_patience))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = IntegerOptimizer(
                self.model,
                lr=self.args.learning_rate,
                beta=self.args.momentum_beta,
                flip_threshold=self.args.flip_threshold,
                table_threshold=self.args.table_threshold,
                scale_update_interval=self.args.scale_update_interval,
                seed=self.args.seed,
            )
        if isinstance(self.optimizer, IntegerOptimizer):  # in a second train() it is the wrapper that accelerate made
            self.integer_optimizer = self.optimizer
            self.integer_optimizer.last_checkpoint = str(self.last_checkpoint) if self.last_checkpoint else None
            self._state_bytes = audit_model(self.model).state_bytes
        return self.optimizer

    def training_step(self, *args, **kwargs):
        assert self.integer_optimizer is not None
        self.integer_optimizer.begin_micro_batch(last=self.accelerator.sync_gradients)
        return super().training_step(*args, **kwargs)

    def _wrap_model(self, model, training=True, dataloader=None):
        model = super()._wrap_model(model, training, dataloader)
        if training and not any(p.requires_grad for p in model.parameters()):
            # replicas without a float parameter need no DDP, which would refuse them: the optimizer averages dW itself
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return model

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.integer_optimizer is not None:
            logs.pop("grad_norm", None)  # gradients are gone by now, and their norm is not measured
            if self.compute_loss_func is None:
                logs["bits_per_byte"] = logs["loss"] / math.log(2)
            logs["flip_rate"] = self.integer_optimizer.take_flip_rate()
            logs["zero_share"] = zero_share(self.model)
            logs["state_bytes"] = self._state_bytes
        if "eval_loss" in logs and self.compute_loss_func is None:
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2)
        super().log(logs, start_time)

    def check_checkpoint(self, folder: Path) -> None:
        check_checkpoint(folder)

    def check_same_run(self, folder: Path) -> None:
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        wanted = {name: value for name, value in config.items() if name not in INCIDENTAL_FIELDS}
        check_same(folder, read_json_object(folder / "config.json"), wanted)
        super().check_same_run(folder)

    def write_more(self, folder: Path) -> None:
        if self._stream is not None:
            write_json(folder / STREAM_FILE, self._stream.state_dict(self._blocks_since_resume()))

    def on_checkpoint(self, folder: Path) -> None:
        assert self.integer_optimizer is not None
        self.integer_optimizer.last_checkpoint = str(folder)
        super().on_checkpoint(folder)

    @property
    def step_blocks(self) -> int:
        """Blocks that all ranks together train on in one step."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _blocks_since_resume(self) -> int:
        """Blocks that all ranks have trained on, without prefetched ones."""
        return (self.state.global_step - self._initial_global_step) * self.step_blocks

    def load_state(self, folder: Path, model: nn.Module | None) -> None:
        if self._stream is not None:
            self._stream.load_state_dict(_read_stream_position(folder / STREAM_FILE))
        self.model.load_state_dict(ArbForCausalLM.from_pretrained(folder).state_dict())


def _read_stream_position(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the data's position is lost, and the run cannot be continued exactly")
    return read_json_object(path)


def check_optimizers(optimizers: tuple[Optimizer | None, object], optimizer_cls_and_kwargs: tuple | None) -> None:
    """Raises ValueError on an optimizer that moves float parameters, and on a scheduler without its optimizer."""
    alone = "it cannot move integer weights; leave it out, or pass optimizers=(IntegerOptimizer(model), None)"
    optimizer, scheduler = optimizers
    if optimizer_cls_and_kwargs is not None:
        raise ValueError(f"optimizer_cls_and_kwargs={optimizer_cls_and_kwargs[0].__name__}: {alone}")
    if optimizer is not None and not isinstance(optimizer, IntegerOptimizer):
        raise ValueError(f"optimizers={type(optimizer).__name__}: {alone}")
    if optimizer is None and scheduler is not None:
        raise ValueError("optimizers=(None, scheduler): it drives an optimizer that is not used; pass both, or neither")
