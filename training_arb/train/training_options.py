"""Says of every training option whether it is honoured, meaningless here, or refused.

transformers' TrainingArguments have far over a hundred fields, and Trainer ignores silently what its optimizer or its
model cannot use. The tables here name each field once; a test compares them with the dataclasses.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar, NamedTuple

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Option(NamedTuple):
    """standing: `honoured`; `meaningless`, which warns once if the value is not the default; or `refused`, which then
    raises. why: the text after `name=value: ` in the message."""

    standing: str
    why: str = ""


HONOURED = Option("honoured")


def _meaningless(why: str) -> Option:
    return Option("meaningless", why)


def _refused(why: str) -> Option:
    return Option("refused", why)


NO_ADAM = _meaningless("a setting of AdamW, which keeps float moments: IntegerOptimizer has none; leave it out")
OTHER_OPTIMIZER = _refused("only IntegerOptimizer can update integer weights; leave it out")
NO_DDP = _meaningless("a setting of DistributedDataParallel: ranks exchange weight gradients without it; leave it out")
NO_SHARDS = _refused("integer state is not sharded; every rank holds the whole model (torchrun, accelerate launch)")
NOT_TRACED = _refused("compilation takes minutes and changes the result of the layers' own kernels; leave it out")
NO_FLOAT_WEIGHTS = _meaningless("there are no float weights to cast; bf16=True computes in bfloat16")
OF_SCRIPTS = _meaningless("only read by the example scripts of transformers; leave it out")

OPTIONS: dict[str, Option] = {
    # how long, how fast
    "num_train_epochs": HONOURED,
    "max_steps": HONOURED,
    "learning_rate": HONOURED,
    "lr_scheduler_type": HONOURED,
    "lr_scheduler_kwargs": HONOURED,
    "warmup_steps": HONOURED,
    "label_smoothing_factor": HONOURED,
    "neftune_noise_alpha": HONOURED,
    "stop_loss_factor": HONOURED,
    "stop_loss_patience": HONOURED,
    # the optimizer
    "momentum_beta": HONOURED,
    "flip_threshold": HONOURED,
    "table_threshold": HONOURED,
    "scale_update_interval": HONOURED,
    "optim": OTHER_OPTIMIZER,
    "optim_args": OTHER_OPTIMIZER,
    "optim_target_modules": OTHER_OPTIMIZER,
    "adam_beta1": NO_ADAM,
    "adam_beta2": NO_ADAM,
    "adam_epsilon": NO_ADAM,
    "weight_decay": _meaningless("integer levels do not decay; leave it out"),
    "max_grad_norm": _meaningless("updates have unit RMS whatever the gradient's norm, so nothing is clipped"),
    # batches and their data
    "per_device_train_batch_size": HONOURED,
    "per_device_eval_batch_size": HONOURED,
    "gradient_accumulation_steps": HONOURED,
    "average_tokens_across_devices": HONOURED,
    "auto_find_batch_size": _refused(
        "a batch that runs out of memory has already updated part of the model; set per_device_train_batch_size and"
        " gradient_accumulation_steps for the rest"
    ),
    "train_sampling_strategy": HONOURED,
    "length_column_name": HONOURED,
    "remove_unused_columns": HONOURED,
    "label_names": HONOURED,
    "dataloader_drop_last": HONOURED,
    "dataloader_num_workers": HONOURED,
    "dataloader_pin_memory": HONOURED,
    "dataloader_persistent_workers": HONOURED,
    "dataloader_prefetch_factor": HONOURED,
    "dataloader_multiprocessing_context": HONOURED,
    "dataloader_in_order": HONOURED,
    "seed": HONOURED,
    "data_seed": HONOURED,
    "full_determinism": HONOURED,
    # arithmetic and memory
    "bf16": HONOURED,
    "fp16": _refused("loss scaling is not supported with integer updates; use bf16=True or float32"),
    "bf16_full_eval": NO_FLOAT_WEIGHTS,
    "fp16_full_eval": NO_FLOAT_WEIGHTS,
    "tf32": HONOURED,
    "activation_checkpointing": HONOURED,
    "activation_checkpointing_kwargs": HONOURED,
    "gradient_checkpointing": HONOURED,
    "gradient_checkpointing_kwargs": HONOURED,
    "torch_empty_cache_steps": HONOURED,
    "torch_compile": NOT_TRACED,
    "torch_compile_backend": NOT_TRACED,
    "torch_compile_mode": NOT_TRACED,
    "use_liger_kernel": _refused("Liger has no kernels for this architecture; leave it out"),
    "liger_kernel_config": _refused("Liger has no kernels for this architecture; leave it out"),
    "use_cache": HONOURED,
    # devices and ranks
    "use_cpu": HONOURED,
    "local_rank": _meaningless("launchers set the variable LOCAL_RANK instead; leave it out"),
    "ddp_backend": HONOURED,
    "ddp_timeout": HONOURED,
    "ddp_find_unused_parameters": NO_DDP,
    "ddp_bucket_cap_mb": NO_DDP,
    "ddp_broadcast_buffers": NO_DDP,
    "ddp_static_graph": NO_DDP,
    "fsdp": NO_SHARDS,
    "fsdp_config": NO_SHARDS,
    "deepspeed": NO_SHARDS,
    "parallelism_config": NO_SHARDS,
    "accelerator_config": HONOURED,  # but for what check_launcher refuses
    # logs
    "logging_strategy": HONOURED,
    "logging_steps": HONOURED,
    "logging_first_step": HONOURED,
    "logging_nan_inf_filter": HONOURED,
    "include_num_input_tokens_seen": HONOURED,
    "log_level": HONOURED,
    "log_level_replica": HONOURED,
    "log_on_each_node": HONOURED,
    "disable_tqdm": HONOURED,
    "report_to": HONOURED,
    "run_name": HONOURED,
    "project": HONOURED,
    "trackio_space_id": HONOURED,
    "trackio_bucket_id": HONOURED,
    "trackio_static_space_id": HONOURED,
    "skip_memory_metrics": HONOURED,
    "debug": _refused("it fails on empty tensors; gradients that are not finite are reported without it"),
    # evaluation
    "eval_strategy": HONOURED,
    "eval_steps": HONOURED,
    "eval_delay": HONOURED,
    "eval_on_start": HONOURED,
    "eval_accumulation_steps": HONOURED,
    "eval_do_concat_batches": HONOURED,
    "eval_use_gather_object": HONOURED,
    "prediction_loss_only": HONOURED,
    "include_for_metrics": HONOURED,
    "batch_eval_metrics": HONOURED,
    "metric_for_best_model": HONOURED,
    "greater_is_better": HONOURED,
    "load_best_model_at_end": HONOURED,
    # checkpoints
    "output_dir": HONOURED,
    "save_strategy": HONOURED,
    "save_steps": HONOURED,
    "save_total_limit": HONOURED,
    "save_only_model": HONOURED,
    "save_on_each_node": HONOURED,
    "enable_jit_checkpoint": _refused("SIGTERM already ends a run with a checkpoint; leave it out"),
    "resume_from_checkpoint": HONOURED,
    "ignore_data_skip": HONOURED,
    "restore_callback_states_from_checkpoint": HONOURED,
    # the hub
    "push_to_hub": HONOURED,
    "hub_model_id": HONOURED,
    "hub_strategy": HONOURED,
    "hub_token": HONOURED,
    "hub_private_repo": HONOURED,
    "hub_always_push": HONOURED,
    "hub_revision": HONOURED,
    # not read by any trainer
    "do_train": OF_SCRIPTS,
    "do_eval": OF_SCRIPTS,
    "do_predict": OF_SCRIPTS,
}

NO_LOGITS_KEPT = _meaningless("an adapter is evaluated by its loss per byte, and no logits are kept; leave it out")
OF_ADAM_OR_DDP = [name for name, option in OPTIONS.items() if option in (NO_ADAM, NO_DDP, OTHER_OPTIMIZER)]

# An adapter is float: AdamW, clipping and DistributedDataParallel have something to work on.
LORA_OPTIONS: dict[str, Option] = {
    **{name: option for name, option in OPTIONS.items() if name in {field.name for field in fields(TrainingArguments)}},
    **dict.fromkeys(OF_ADAM_OR_DDP, HONOURED),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "fp16"), HONOURED),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _meaningless("an adapter is evaluated in its own dtype")),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), NO_LOGITS_KEPT),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), NO_LOGITS_KEPT),
}

# What `accelerate launch` sets without an argument of ours saying so.
LAUNCHER = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
}
OFF = ("", "no", "false", "0")


def set_options(args: TrainingArguments, options: dict[str, Option], standing: str) -> dict[str, object]:
    """name -> value of the options with that standing that differ from their class's default."""
    found = {}
    for option in fields(args):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value = getattr(args, option.name)
        if options[option.name].standing == standing and (value or None) != (default or None):
            found[option.name] = value
    return found


def check_launcher(args: TrainingArguments, options: dict[str, Option]) -> None:
    """Raises ValueError on settings of a launcher's variables or of accelerator_config that are not supported."""
    for variable, name in LAUNCHER.items():
        value = os.environ.get(variable, "")
        if value.lower() not in OFF:
            raise ValueError(f"{variable}={value}: {name} is not supported: {options[name].why}")
    if args.mixed_precision not in ("no", "bf16", *(["fp16"] if options["fp16"] is HONOURED else [])):
        raise ValueError(f"ACCELERATE_MIXED_PRECISION={args.mixed_precision}: {OPTIONS['fp16'].why}")
    config = args.accelerator_config
    assert isinstance(config, AcceleratorConfig)  # TrainingArguments makes one of whatever it was given
    accumulation = config.gradient_accumulation_kwargs or {}
    if "num_steps" in accumulation:
        raise ValueError(
            f"accelerator_config: num_steps={accumulation['num_steps']} of gradient_accumulation_kwargs; use"
            " gradient_accumulation_steps"
        )
    if config.split_batches:
        raise ValueError("accelerator_config: split_batches=True is not supported; set per_device_train_batch_size")


@dataclass
class CheckedTrainingArguments(TrainingArguments):
    """TrainingArguments that refuse what `options` refuses, and say once what has no effect."""

    options: ClassVar[dict[str, Option]] = OPTIONS

    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Page-locked memory for batches. Default: where there is a GPU to copy to."}
    )

    def __post_init__(self):
        for name, value in set_options(self, self.options, "refused").items():
            raise ValueError(f"{name}={value}: {self.options[name].why}")
        meaningless = set_options(self, self.options, "meaningless")
        self.label_names = self.label_names or ["labels"]  # transformers would ask for every head's
        super().__post_init__()
        check_launcher(self, self.options)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = self.device.type not in ("cpu", "mps")
        if self.should_log:
            for name, value in meaningless.items():
                logger.warning_once(f"{name}={value} changes nothing: {self.options[name].why}")
