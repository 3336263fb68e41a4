"""ArbTrainer: transformers' Trainer with the integer optimizer, whole-or-nothing checkpoints and checked resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_utils import SaveStrategy

from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import read_json_object
from training_arb.checkpoints.checkpoint_files import (
    BEST,
    LATEST,
    RUN_FILE,
    STATE_FILE,
    check_checkpoint,
    point,
    pointed,
    remove_old,
    write_checksums,
)
from training_arb.common.atomic_files import move_into_place, out_of_space, sync_tree, write_json
from training_arb.data.mixed_stream import MixedStream
from training_arb.memory.state_audit import audit_model, zero_share
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.ranks.rank_exchange import used_on_any_rank
from training_arb.ranks.rank_loss import RankLostError, naming_lost_ranks

from .base_trainer import check_whole_state
from .divergence import DivergenceStop
from .hub_trainer import HubTrainer
from .interruption import Interruption
from .training_args_arb import ArbTrainingArguments

STREAM_FILE = "stream.json"
INCIDENTAL_FIELDS = ("transformers_version", "auto_map", "use_cache", "architectures", "_name_or_path")

logger = logging.getLogger(__name__)


class ArbTrainer(HubTrainer):
    """Trains an ArbForCausalLM's integer state. Everything not named here is the stock Trainer's.

    run_description: what a resumed run must have in common with the one it continues (data, block length, ...).
    optimizers: (None, None), or an IntegerOptimizer attached to `model` and, or None, a scheduler of it. Raises
    ValueError on any other optimizer, which could move nothing.
    """

    args: ArbTrainingArguments
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
        self.run_description = {
            **(run_description or {}),
            "seed": args.seed,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        }
        self.integer_optimizer: IntegerOptimizer | None = None
        self._staging: Path | None = None
        self._resumed_from: str | None = None
        self._stream = kwargs["train_dataset"] if isinstance(kwargs.get("train_dataset"), MixedStream) else None
        if self._stream is not None:
            args.ignore_data_skip = True  # the stream goes on from its own position
        self.interruption = Interruption()
        super().__init__(model=model, args=args, **kwargs)
        if self.optimizer is not None and not self.model.byte_head.proj.armed:
            raise ValueError("optimizers=IntegerOptimizer: it is attached to another model")
        self.add_callback(self.interruption)
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
            self.integer_optimizer.last_checkpoint = self._resumed_from
            self._state_bytes = audit_model(self.model).state_bytes
        return self.optimizer

    def training_step(self, *args, **kwargs):
        self.integer_optimizer.begin_micro_batch(last=self.accelerator.sync_gradients)
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
            if self.compute_loss_func is None:
                logs["bits_per_byte"] = logs["loss"] / math.log(2)
            logs["flip_rate"] = self.integer_optimizer.take_flip_rate()
            logs["zero_share"] = zero_share(self.model)
            logs["state_bytes"] = self._state_bytes
        if "eval_loss" in logs and self.compute_loss_func is None:
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2)
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        """As the Trainer's; SIGTERM and Ctrl-C end it after the step at hand, as `interruption` then says.

        Raises FloatingPointError, naming the last good checkpoint, when the run diverges, RankLostError, naming the
        last checkpoint, when another rank is gone, and ValueError when the checkpoint to resume from is damaged or
        belongs to another run.
        """
        try:
            with naming_lost_ranks(self.where_it_stands):
                with self.interruption.listening():
                    output = super().train(*args, **kwargs)
                self.interruption.agree(self.args)  # on a signal that came after the last step
        except (FloatingPointError, RankLostError):
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # close progress bar and logs
            raise
        return output

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args) -> tuple[int, int]:
        """As the Trainer's, which takes one step too many after a stop between the last checkpoint and the end."""
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else position

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint that this run last wrote, or went on from."""
        last = self.integer_optimizer.last_checkpoint if self.integer_optimizer else None
        return None if last is None else Path(last)

    def where_it_stands(self) -> str:
        """The end of an error's message: the step at hand, and how to go on. Asks no other rank."""
        newest = pointed(self.args.output_dir, LATEST)
        last = newest or self.last_checkpoint
        how = "auto" if newest else last
        resume = f"go on from {last} by --resume_from_checkpoint {how}" if last else "there is no checkpoint"
        return f"after step {self.state.global_step}; {resume}"

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """The best step is one whose checkpoint stands: a step that is not being saved does not compete."""
        if self.args.save_strategy != SaveStrategy.BEST and not self.control.should_save:
            return False
        if self.state.best_global_step and not self._checkpoint_at(self.state.best_global_step).is_dir():
            self.state.best_metric = None
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            wanted = self.args.metric_for_best_model
            raise ValueError(f"metric_for_best_model={wanted!r} is none of {', '.join(sorted(metrics))}") from error

    def _checkpoint_at(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_checkpoint(self, model, trial) -> None:
        """The stock checkpoint, written into a staging folder and renamed when it is whole and on disk.

        A full disk costs this checkpoint only: what was half written goes, a warning says so, and the run goes on.
        """
        target = self._checkpoint_at(self.state.global_step)
        staging = target.parent / ".writing"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            whole = self._every_rank(lambda: self._stage(staging, model, trial), target)
            if whole and self._every_rank(lambda: self._publish(staging / target.name, target), target):
                self.integer_optimizer.last_checkpoint = str(target)
                self.push_checkpoint(self.state.global_step)
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _every_rank(self, write: Callable[[], None], target: Path) -> bool:
        """Run `write` on this rank; whether no rank ran out of space. No rank goes on before all have written."""
        error = None
        try:
            write()
        except (OSError, SafetensorError, RuntimeError) as caught:
            if not out_of_space(caught):
                raise
            error = caught
            free = shutil.disk_usage(target.parent).free
            logger.warning(
                f"{target} is not saved, no space for it ({str(caught).splitlines()[0]}): {free:,} bytes free;"
                f" the run goes on, its last checkpoint is {self.last_checkpoint}"
            )
        return not used_on_any_rank([error is not None], self.args.device)[0]

    def _stage(self, staging: Path, model, trial) -> None:
        """What every rank writes. The best step is hidden from the Trainer, which would wait for all ranks in between:
        one that has no space would not come."""
        best, self.state.best_global_step = self.state.best_global_step, None
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.state.best_global_step = None, best

    def _publish(self, staged: Path, target: Path) -> None:
        """What one rank does with a staged checkpoint: complete it, give it its name, point to it, delete old ones."""
        if not self.args.should_save:
            return
        best = self._checkpoint_at(self.state.best_global_step) if self.state.best_global_step else None
        best = best if best is not None and (best == target or best.is_dir()) else None
        self.state.best_model_checkpoint = str(best) if best else None
        self.state.save_to_json(str(staged / STATE_FILE))
        write_json(staged / RUN_FILE, self.run_description)
        if self._stream is not None:
            write_json(staged / STREAM_FILE, self._stream.state_dict(self._blocks_since_resume()))
        write_checksums(staged)
        sync_tree(staged)
        move_into_place(staged, target)
        point(target.parent, LATEST, target.name)
        if best:
            point(target.parent, BEST, best.name)
        remove_old(target.parent, self.args.save_total_limit, [*([best] if best else []), target])

    @property
    def step_blocks(self) -> int:
        """Blocks that all ranks together train on in one step."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _blocks_since_resume(self) -> int:
        """Of all ranks; what was read ahead does not count."""
        return (self.state.global_step - self._initial_global_step) * self.step_blocks

    def _finalize_training(self, *args, **kwargs):
        """With save_total_limit=1 the Trainer deletes the latest checkpoint for the best one: both are wanted here."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load integer state exactly. Raises ValueError when the checkpoint is damaged or belongs to another run."""
        check_checkpoint(resume_from_checkpoint)
        check_whole_state(resume_from_checkpoint)
        check_resumable(resume_from_checkpoint, self.model.config, self.run_description)
        if self._stream is not None:
            position = _read_stream_position(Path(resume_from_checkpoint) / STREAM_FILE)
            self._stream.load_state_dict(position)
        stored = ArbForCausalLM.from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(stored.state_dict())
        self._resumed_from = str(resume_from_checkpoint)
        folder = Path(resume_from_checkpoint)
        if self.args.should_save and folder.resolve().parent == Path(self.args.output_dir).resolve():
            point(self.args.output_dir, LATEST, folder.resolve().name)


def _read_stream_position(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the data's position is lost, and the run cannot go on exactly")
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


def check_resumable(checkpoint: str | Path, config, run_description: dict) -> None:
    """Raises ValueError, naming the first difference, unless the checkpoint continues this very run."""
    checkpoint = Path(checkpoint)
    pairs = [
        (json.loads((checkpoint / "config.json").read_text()), json.loads(config.to_json_string(use_diff=False))),
        (json.loads((checkpoint / RUN_FILE).read_text()), run_description),
    ]
    for stored, wanted in pairs:
        for key in sorted(stored.keys() & wanted.keys() - set(INCIDENTAL_FIELDS)):
            if stored[key] != wanted[key]:
                raise ValueError(f"{checkpoint}: the checkpoint has {key}={stored[key]!r}, this run {wanted[key]!r}")
