"""ArbTrainingArguments: transformers' arguments with defaults for integer training, and our additional ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils import logging

from .training_options import CheckedTrainingArguments

DEFAULT_STEPS, DEFAULT_EPOCHS = 1500, 3.0

logger = logging.get_logger(__name__)


@dataclass
class ArbTrainingArguments(CheckedTrainingArguments):
    """learning_rate is in thirds of the latent line per step: 0.03 to 0.05 at every width tried.

    transformers opens the process group of several ranks when arguments are made. On CPUs, call
    `training_arb.ranks.rank_loss.meet_on_cpus` before: transformers ignores ddp_timeout there.
    """

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Folder of checkpoints, plots and final/."})
    max_steps: int | None = field(
        default=None, metadata={"help": f"Optimizer steps. Default: {DEFAULT_STEPS}, or what num_train_epochs takes."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Times through the data, instead of max_steps."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Blocks per device in evaluation."})
    learning_rate: float = field(default=0.035, metadata={"help": "Thirds of the latent line per step."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warmup; below 1: share of the run."})
    seed: int = field(default=0, metadata={"help": "Seed of initial weights, data order and stochastic rounding."})
    logging_steps: float = field(default=20, metadata={"help": "Interval in steps between logs."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float | None = field(default=200, metadata={"help": "Interval in steps between evaluations."})
    save_steps: float = field(default=200, metadata={"help": "Interval in steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    metric_for_best_model: str | None = field(
        default="eval_loss",
        metadata={"help": "Metric of the best checkpoint, among steps evaluated and saved."},
    )
    stop_loss_factor: float = field(
        default=3.0, metadata={"help": "Stop when the loss stays above this multiple of its running mean; 0: never."}
    )
    stop_loss_patience: int = field(
        default=3, metadata={"help": "Consecutive logs with such a loss before the run stops."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    report_to: str | None = field(default="none", metadata={"help": "Integrations that receive the logs."})
    momentum_beta: float = field(default=0.9, metadata={"help": "momentum rule: decay of the momentum per step."})
    flip_threshold: int = field(default=32, metadata={"help": "flip rule: votes after which a trit moves, 1..127."})
    table_threshold: int = field(default=8, metadata={"help": "Votes after which a trit of a table moves, 1..127."})
    scale_update_interval: int = field(
        default=1, metadata={"help": "flip rule: interval in steps of the votes on scales; 0: never."}
    )

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name):g} must be positive")
        both = self.max_steps is not None and self.max_steps > 0 and self.num_train_epochs is not None
        if self.max_steps is None:
            self.max_steps = DEFAULT_STEPS if self.num_train_epochs is None else -1
        asked_epochs = self.num_train_epochs
        self.num_train_epochs = DEFAULT_EPOCHS if asked_epochs is None else asked_epochs
        super().__post_init__()
        if both and self.should_log:
            logger.warning_once(f"num_train_epochs={asked_epochs} changes nothing: max_steps={self.max_steps} is given")
        missing = sorted(set(self.report_to or ()) - set(get_available_reporting_integrations()))
        if missing:
            raise ValueError(f"report_to={missing[0]!r} is not installed or unknown; give none for the terminal only")
