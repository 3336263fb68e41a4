"""ArbTrainer: transformers' Trainer with the integer optimizer, whole-or-nothing checkpoints and checked resume."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from modeling_arb import ArbForCausalLM

from .atomic_files import move_into_place, sync_tree, write_json
from .integer_optimizer import IntegerOptimizer
from .state_audit import audit_model, zero_share
from .training_args_arb import ArbTrainingArguments

RUN_FILE = "run.json"
TRAINER_STATE_FILE = "trainer_state.json"
INCIDENTAL_FIELDS = ("transformers_version", "auto_map", "use_cache", "architectures", "_name_or_path")


class ArbTrainer(Trainer):
    """Trains an ArbForCausalLM's integer state. Everything not named here is the stock Trainer's.

    run_description: what a resumed run must have in common with the one it continues (data, block length, ...).
    """

    args: ArbTrainingArguments

    def __init__(
        self, model: ArbForCausalLM, args: ArbTrainingArguments, run_description: dict | None = None, **kwargs
    ):
        self.run_description = {
            **(run_description or {}),
            "seed": args.seed,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        }
        self.integer_optimizer: IntegerOptimizer | None = None
        self._staging: Path | None = None
        super().__init__(model=model, args=args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            self.integer_optimizer = IntegerOptimizer(
                self.model,
                lr=self.args.learning_rate,
                beta=self.args.momentum_beta,
                flip_threshold=self.args.flip_threshold,
                table_threshold=self.args.table_threshold,
                scale_update_interval=self.args.scale_update_interval,
                seed=self.args.seed,
            )
            self.optimizer = self.integer_optimizer
            self._state_bytes = audit_model(self.model).state_bytes
        return self.optimizer

    def training_step(self, *args, **kwargs):
        self.integer_optimizer.last_micro_batch = self.accelerator.sync_gradients
        return super().training_step(*args, **kwargs)

    def _wrap_model(self, model, training=True, dataloader=None):
        model = super()._wrap_model(model, training, dataloader)
        if training and not any(p.requires_grad for p in model.parameters()):
            # replicas without a float parameter need no DDP, which would refuse them: the optimizer averages dW itself
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return model

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.pop("grad_norm", None)  # there are no gradients left to measure
            logs["bits_per_byte"] = logs["loss"] / math.log(2)
            logs["flip_rate"] = self.integer_optimizer.take_flip_rate()
            logs["zero_share"] = zero_share(self.model)
            logs["state_bytes"] = self._state_bytes
        if "eval_loss" in logs:
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2)
        super().log(logs, start_time)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial) -> None:
        """The stock checkpoint, written into a staging folder and renamed when it is whole and on disk."""
        run_dir = Path(super()._get_output_dir(trial))
        staging = run_dir / ".writing"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            write_json(staging / name / RUN_FILE, self.run_description)
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(run_dir / name)
                self.state.save_to_json(str(staging / name / TRAINER_STATE_FILE))
            sync_tree(staging / name)
            move_into_place(staging / name, run_dir / name)
            shutil.rmtree(staging)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        self.integer_optimizer.last_checkpoint = str(run_dir / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load integer state exactly. Raises ValueError when the checkpoint is damaged or belongs to another run."""
        check_resumable(resume_from_checkpoint, self.model.config, self.run_description)
        stored = ArbForCausalLM.from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(stored.state_dict())
        if self.integer_optimizer is not None:
            self.integer_optimizer.last_checkpoint = resume_from_checkpoint


def check_resumable(checkpoint: str | Path, config, run_description: dict) -> None:
    """Raises ValueError, naming the first difference, unless the checkpoint continues this very run."""
    checkpoint = Path(checkpoint)
    for name in ("config.json", TRAINER_STATE_FILE, RUN_FILE):
        if not (checkpoint / name).is_file():
            raise ValueError(f"resume_from_checkpoint={str(checkpoint)!r}: no training checkpoint, {name} is missing")
    pairs = [
        (json.loads((checkpoint / "config.json").read_text()), json.loads(config.to_json_string(use_diff=False))),
        (json.loads((checkpoint / RUN_FILE).read_text()), run_description),
    ]
    for stored, wanted in pairs:
        for key in sorted(stored.keys() & wanted.keys() - set(INCIDENTAL_FIELDS)):
            if stored[key] != wanted[key]:
                raise ValueError(f"{checkpoint}: the checkpoint has {key}={stored[key]!r}, this run {wanted[key]!r}")
