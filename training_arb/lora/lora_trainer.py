"""LoraTrainer: Trainer and its AdamW over a peft adapter, with our checkpoints and resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from peft import PeftModel

from training_arb.checkpoints.checkpoint_files import check_training_files
from training_arb.data.chat_data import ConversationDataset, collate_conversations
from training_arb.train.saving_trainer import SavingTrainer
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
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warmup; below 1: share of the run."})
    seed: int = field(default=0, metadata={"help": "Seed of the adapter's initial values, dropout and data order."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float | None = field(default=50, metadata={"help": "Evaluate every so many steps."})
    save_steps: float = field(default=100, metadata={"help": "Write a checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length (least padding), random or sequential."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint's folder, latest, or auto: latest if any.",
            "aliases": ["--resume"],
        },
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    report_to: str | None = field(default="none", metadata={"help": "Where logs go besides the terminal."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Send the frozen base every forward."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See torch's DDP."})


class LoraTrainer(SavingTrainer):
    """Trains an adapter. run_description: settings that must be equal when a run is resumed."""

    args: LoraTrainingArguments
    model: PeftModel
    arguments_class = LoraTrainingArguments
    shown = ("loss", "learning_rate", "grad_norm", "bytes_per_second", "seconds_left")

    def __init__(self, model: PeftModel, args: LoraTrainingArguments, run_description: dict, **kwargs):
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: an adapter is evaluated by its loss per byte, and no logits are kept")
        super().__init__(model, args, run_description, data_collator=collate_conversations, **kwargs)

    def evaluate(
        self,
        eval_dataset: ConversationDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean loss per byte. Trainer's would average over batches of unequal numbers of bytes."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, ConversationDataset)
        loss = assistant_loss(self.model, dataset.conversations, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check_checkpoint(self, folder: Path) -> None:
        check_adapter_checkpoint(folder)


def check_adapter_checkpoint(folder: str | Path) -> None:
    """Raises ValueError, naming the file, unless `folder` is a complete and undamaged checkpoint of a LoraTrainer."""
    check_training_files(folder, [ADAPTER_WEIGHTS], "checkpoint of an adapter")
