"""LoraTrainer: the stock Trainer and its AdamW over a peft adapter; checkpoints whole or not at all, checked resume."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from peft import PeftModel
from torch import nn

from modeling_arb.checkpoints.integrity import read_json_object
from training_arb.checkpoints.checkpoint_files import (
    RUN_FILE,
    STATE_FILE,
    newest_passing,
    numbered_checkpoints,
    remove_old,
    verify_checksums,
    write_checksums,
)
from training_arb.common.atomic_files import move_into_place, sync_tree, write_json
from training_arb.data.chat_data import ConversationDataset, collate_conversations
from training_arb.train.base_trainer import BaseTrainer, check_whole_state
from training_arb.train.interruption import Interruption
from training_arb.train.training_options import LORA_OPTIONS, CheckedTrainingArguments, Option

from .lora_adapter import ADAPTER_WEIGHTS, assistant_loss


@dataclass
class LoraTrainingArguments(CheckedTrainingArguments):
    """transformers' arguments with defaults that suit adapters of a byte-level model."""

    options: ClassVar[dict[str, Option]] = LORA_OPTIONS

    output_dir: str = field(default="runs/lora", metadata={"help": "Folder of checkpoints, plots and final/."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Times through the data.", "aliases": ["--epochs"]})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps, instead of epochs."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Conversations per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Conversations per device in evaluation."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of AdamW, at its peak."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW, on the adapter."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warmup; below 1: share of the run."})
    seed: int = field(default=0, metadata={"help": "Of the adapter's first values, dropout and the order of data."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float | None = field(default=50, metadata={"help": "Evaluate every so many steps."})
    save_steps: float = field(default=100, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length pads little; random; sequential."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's folder; latest; or auto, if any.", "aliases": ["--resume"]}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    report_to: str | None = field(default="none", metadata={"help": "Where logs go besides the terminal."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Send the frozen base every forward."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See torch's DDP."})


class LoraTrainer(BaseTrainer):
    """run_description: what a resumed run must have in common with the one it continues."""

    args: LoraTrainingArguments
    arguments_class = LoraTrainingArguments
    shown = ("loss", "learning_rate", "grad_norm", "bytes_per_second", "seconds_left")

    def __init__(self, model: PeftModel, args: LoraTrainingArguments, run_description: dict, **kwargs):
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: the evaluation of an adapter is its loss by the byte, and keeps no logits")
        self.run_description = run_description
        self.interruption = Interruption()
        self._staging: Path | None = None
        super().__init__(model=model, args=args, data_collator=collate_conversations, **kwargs)
        self.add_callback(self.interruption)

    def train(self, *args, **kwargs):
        """As the Trainer's; SIGTERM and Ctrl-C end it after the step at hand, as `interruption` then says."""
        with self.interruption.listening():
            return super().train(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: ConversationDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss by the byte, where the Trainer's would average over batches of unequal numbers of bytes."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loss = assistant_loss(self.model, dataset.conversations, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """The stock checkpoint, in a staging folder that takes its name when it is whole and on disk."""
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._staging = target.parent / ".writing"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = self._staging / target.name
                write_json(staged / RUN_FILE, self.run_description)
                write_checksums(staged)
                sync_tree(staged)
                move_into_place(staged, target)
                remove_old(target.parent, self.args.save_total_limit, [target])
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_adapter_checkpoint(resume_from_checkpoint)
        check_whole_state(resume_from_checkpoint)
        stored = read_json_object(Path(resume_from_checkpoint) / RUN_FILE)
        for key in sorted(stored.keys() | self.run_description.keys()):
            if stored.get(key) != self.run_description.get(key):
                raise ValueError(
                    f"{resume_from_checkpoint}: the checkpoint has {key}={stored.get(key)!r},"
                    f" this run {self.run_description.get(key)!r}"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def check_adapter_checkpoint(folder: str | Path) -> None:
    """Raises ValueError, naming the file, unless `folder` is a whole and undamaged checkpoint of a LoraTrainer."""
    for name in (ADAPTER_WEIGHTS, STATE_FILE, RUN_FILE):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{folder}: no checkpoint of an adapter, {name} is missing")
    verify_checksums(folder)


def adapter_checkpoint_to_resume(output_dir: str | Path, wanted: str | None) -> tuple[str | None, list[str]]:
    """The checkpoint that `wanted` stands for, and what is wrong with newer ones.

    wanted: a folder, `latest`, or `auto`, which need not be there. Raises ValueError when it is not there, or when a
    fresh run would overwrite another.
    """
    found = numbered_checkpoints(output_dir)
    if wanted in (None, "auto") and ((Path(output_dir) / "final").exists() or (wanted is None and found)):
        raise ValueError(
            f"output_dir={str(output_dir)!r} already holds a run: choose another, or continue an unfinished one"
            " with --resume latest"
        )
    if wanted is None:
        return None, []
    if wanted not in ("auto", "latest"):
        check_adapter_checkpoint(wanted)
        return wanted, []
    checkpoint, faults = newest_passing(found, check_adapter_checkpoint)
    if checkpoint is not None:
        return str(checkpoint), faults
    if faults or wanted == "latest":
        raise ValueError(f"resume={wanted!r}: {faults[0] if faults else f'no checkpoint in {output_dir}'}")
    return None, []
