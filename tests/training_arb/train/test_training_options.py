"""Every training option is in the table and does as it says: honoured, said once to be meaningless, or refused."""

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, set_seed

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.lora.lora_trainer import LoraTrainer, LoraTrainingArguments
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments
from training_arb.train.training_options import logger, set_options

IDS = np.frombuffer(b"".join(f"def f_{i}(a):\n    return a * {i}\n\n".encode() for i in range(40)), dtype=np.uint8)
CTX = 32
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
}
REFUSED = {
    "optim": "sgd",
    "optim_args": "a=1",
    "optim_target_modules": ["proj"],
    "auto_find_batch_size": True,
    "fp16": True,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": {"tp_size": 2},
    "debug": "underflow_overflow",
    "enable_jit_checkpoint": True,
}
MEANINGLESS = {
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1.0,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-6,
    "bf16_full_eval": True,
    "local_rank": 0,
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
}
MOVES_WEIGHTS = {
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "warmup_steps": 3,
    "seed": 1,
    "data_seed": 1,
    "momentum_beta": 0.5,
    "label_smoothing_factor": 0.5,
    "neftune_noise_alpha": 50.0,
    "bf16": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "num_train_epochs": 1,
}


@pytest.fixture(autouse=True)
def nothing_said_yet():
    type(logger).warning_once.cache_clear()


def made_trainer(output_dir, model=None, arguments=None, **settings):
    set_seed(0)
    args = ArbTrainingArguments(output_dir=str(output_dir), **{**QUIET, **settings})
    if model is None and "model_init" not in (arguments or {}):
        model = ArbForCausalLM(preset_config("arb-tiny"))
    data = {"train_dataset": ByteBlocks(IDS[: 10 * CTX], CTX), "eval_dataset": ByteBlocks(IDS[: 2 * CTX], CTX)}
    return ArbTrainer(model, args, **data, data_collator=collate_blocks, **(arguments or {}))


def trained(output_dir, **settings):
    trainer = made_trainer(output_dir, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The state's hash after three steps without any option set."""
    return state_hash(trained(tmp_path_factory.mktemp("plain")).model)


def absent_and_unknown(arguments_class):
    return {field.name for field in fields(arguments_class)} ^ arguments_class.options.keys()


@pytest.mark.parametrize("arguments_class", [ArbTrainingArguments, LoraTrainingArguments])
def test_every_field_is_in_the_table(arguments_class):
    assert absent_and_unknown(arguments_class) == set()
    assert {option.standing for option in arguments_class.options.values()} == {"honoured", "meaningless", "refused"}
    assert all(option.why or option.standing == "honoured" for option in arguments_class.options.values())


def test_a_new_field_is_seen():
    @dataclass
    class Grown(ArbTrainingArguments):
        a_new_field: int = 0

    assert absent_and_unknown(Grown) == {"a_new_field"}


def test_these_tests_know_what_is_refused_and_meaningless():
    standings = {name: option.standing for name, option in ArbTrainingArguments.options.items()}
    assert {name for name, standing in standings.items() if standing == "refused"} == REFUSED.keys()
    assert {name for name, standing in standings.items() if standing == "meaningless"} == {
        *MEANINGLESS,
        "fp16_full_eval",  # not beside bf16_full_eval
    }
    assert all(standings[name] == "honoured" for name in MOVES_WEIGHTS)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}=[^\n]+: [^\n]+$"):
        ArbTrainingArguments(output_dir=str(tmp_path), **{**QUIET, name: REFUSED[name]})


def test_meaningless_ones_are_said_once_and_change_nothing(tmp_path, plain, caplog):
    trainer = trained(tmp_path, **MEANINGLESS)
    ArbTrainingArguments(output_dir=str(tmp_path), **{**QUIET, **MEANINGLESS})
    said = [record.getMessage() for record in caplog.records]
    for name, value in MEANINGLESS.items():
        assert sum(line.startswith(f"{name}={value} changes nothing: ") for line in said) == 1, name
    assert len(said) == len(MEANINGLESS)
    assert state_hash(trainer.model) == plain


def test_defaults_say_nothing(tmp_path, caplog):
    args = ArbTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not caplog.records
    assert (args.max_steps, args.dataloader_pin_memory) == (1500, False)


@pytest.mark.parametrize("name", MOVES_WEIGHTS)
def test_honoured_ones_move_other_weights(tmp_path, plain, name):
    steps = {"max_steps": None} if name == "num_train_epochs" else {}
    trainer = trained(tmp_path, **{**steps, name: MOVES_WEIGHTS[name]})
    assert state_hash(trainer.model) != plain
    assert trainer.state.global_step == (5 if name == "num_train_epochs" else 3)


def test_honoured_ones_show_elsewhere(tmp_path, plain):
    trainer = trained(
        tmp_path,
        activation_checkpointing=True,
        include_num_input_tokens_seen="all",
        logging_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        eval_delay=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 3]
    assert not any("loss" in entry for entry in history)
    assert history[-1]["num_input_tokens_seen"] == 3 * 2 * CTX
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert trainer.state.best_global_step == 3
    assert state_hash(trainer.model) == plain


def test_steps_go_before_epochs_and_say_so(tmp_path, caplog):
    args = ArbTrainingArguments(output_dir=str(tmp_path), **{**QUIET, "num_train_epochs": 9.0})
    assert args.max_steps == 3
    assert [record.getMessage() for record in caplog.records] == [
        "num_train_epochs=9.0 changes nothing: max_steps=3 is given"
    ]


def test_resume_from_checkpoint_is_taken_from_the_arguments(tmp_path, plain):
    trained(tmp_path, save_strategy="steps", save_steps=2)
    trainer = trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.last_checkpoint == tmp_path / "checkpoint-2"
    assert state_hash(trainer.model) == plain


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "loss scaling"),
        ("ACCELERATE_USE_FSDP", "true", "fsdp is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch_compile is not supported"),
    ],
)
def test_what_a_launcher_asks_for_is_checked_too(tmp_path, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable}={value}: .*{said}"):
        ArbTrainingArguments(output_dir=str(tmp_path), **QUIET)


@pytest.mark.parametrize("config", [{"split_batches": True}, {"gradient_accumulation_kwargs": {"num_steps": 2}}])
def test_another_word_for_batch_sizes_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match=r"^accelerator_config: "):
        ArbTrainingArguments(output_dir=str(tmp_path), **QUIET, accelerator_config=config)


def test_an_adapters_optimizer_has_its_options(tmp_path, caplog):
    shared = {"optim": "sgd", "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta1": 0.8, "use_cpu": True}
    args = LoraTrainingArguments(output_dir=str(tmp_path), **shared)
    assert not caplog.records and set_options(args, args.options, "refused") == {}
    with pytest.raises(ValueError, match=r"^deepspeed="):
        LoraTrainingArguments(output_dir=str(tmp_path), use_cpu=True, deepspeed={"a": 1})


def test_other_optimizers_are_refused(tmp_path):
    model = ArbForCausalLM(preset_config("arb-tiny"))
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    for arguments, said in (
        ({"optimizers": (adam, None)}, "^optimizers=AdamW: "),
        ({"optimizers": (None, LambdaLR(adam, lambda step: 1.0))}, r"^optimizers=\(None, scheduler\): "),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, "^optimizer_cls_and_kwargs=SGD: "),
        ({"optimizers": (IntegerOptimizer(ArbForCausalLM(model.config)), None)}, "attached to another model"),
    ):
        with pytest.raises(ValueError, match=said):
            made_trainer(tmp_path, model=model, arguments=arguments)


def test_an_integer_optimizer_and_its_scheduler_are_used(tmp_path, plain):
    set_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny"))
    optimizer = IntegerOptimizer(model, lr=0.01)
    scheduler = LambdaLR(optimizer, lambda step: 0.5)
    trainer = made_trainer(tmp_path, model=model, arguments={"optimizers": (optimizer, scheduler)})
    trainer.train()
    assert trainer.integer_optimizer is optimizer and optimizer.steps == 3
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry} == {0.005}
    assert state_hash(model) != plain


def test_a_loss_of_the_callers_own_is_used(tmp_path, plain):
    def loss_of_last_byte(outputs, labels, num_items_in_batch):
        return torch.nn.functional.cross_entropy(outputs.logits[:, -2].float(), labels[:, -1])

    trainer = made_trainer(tmp_path, arguments={"compute_loss_func": loss_of_last_byte})
    trainer.train()
    assert state_hash(trainer.model) != plain
    assert "bits_per_byte" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match=r"^label_smoothing_factor=0\.1: "):
        made_trainer(tmp_path, arguments={"compute_loss_func": loss_of_last_byte}, label_smoothing_factor=0.1)


def test_metrics_see_logits_and_labels(tmp_path):
    """Also of a model whose blocks have losses of their own."""
    functions = {
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": lambda seen: {"shapes": (seen.predictions.shape, seen.label_ids.shape)},
    }
    model = ArbForCausalLM(preset_config("arb-tiny-full"))
    trainer = made_trainer(tmp_path, model=model, arguments=functions)
    assert trainer.evaluate()["eval_shapes"] == ((2, CTX), (2, CTX))


def test_a_model_is_made_anew_for_each_run(tmp_path, plain):
    make = {"model_init": lambda: ArbForCausalLM(preset_config("arb-tiny"))}
    trainer = made_trainer(tmp_path, arguments=make)
    for _ in range(2):
        trainer.train()
        assert state_hash(trainer.model) == plain


def test_arguments_without_our_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^args=TrainingArguments: ArbTrainer takes ArbTrainingArguments$"):
        ArbTrainer(ArbForCausalLM(preset_config("arb-tiny")), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_an_adapters_evaluation_takes_no_functions(tmp_path, name):
    args = LoraTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"^{name}: "):
        LoraTrainer(None, args, run_description={}, **{name: lambda seen: {}})
