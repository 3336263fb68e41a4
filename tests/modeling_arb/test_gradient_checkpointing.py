"""The stock flag for checkpointing: the same state bit for bit, every update once, and fewer bytes saved."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.gradients import Sink
from support.tensors import random_text
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.memory.memory_forecast import measure_step
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

REENTRANT = {"use_reentrant": True}
QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "eval_strategy": "no"}


def make(preset):
    torch.manual_seed(0)
    return ArbForCausalLM(preset_config(preset))


def train(trainer_class, preset, folder, **settings):
    """The state's hash after two steps through the Trainer, ArbTrainer's of two micro-batches each."""
    model = make(preset)
    blocks = ByteBlocks(random_text(0, 1, 1024)[0].numpy().astype(np.uint8), 32)
    shape = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05, **QUIET}
    if trainer_class is ArbTrainer:
        own = {"gradient_accumulation_steps": 2, "metric_for_best_model": None}
        args, given = ArbTrainingArguments(folder, **own, **shape, **settings), {}
    else:
        optimizer = IntegerOptimizer(model, lr=0.05)
        args, given = TrainingArguments(folder, **shape, **settings), {"optimizers": (optimizer, None)}
    trainer = trainer_class(model, args, train_dataset=blocks, data_collator=collate_blocks, **given)
    trainer.train()
    assert model.is_gradient_checkpointing == settings.get("gradient_checkpointing", False)
    return state_hash(model)


@pytest.mark.parametrize("preset", ["arb-tiny", "arb-tiny-full"])
@pytest.mark.parametrize("trainer_class, how", [(ArbTrainer, None), (Trainer, None), (Trainer, REENTRANT)])
def test_the_trainers_flag_gives_the_same_state(trainer_class, how, preset, tmp_path):
    plain = train(trainer_class, preset, tmp_path)
    assert plain != state_hash(make(preset))
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how}
    assert train(trainer_class, preset, tmp_path, **settings) == plain


@pytest.mark.parametrize("preset", ["arb-tiny", "arb-tiny-full"])
def test_every_matrix_hands_over_as_often_as_without(preset):
    """A matrix that is used n times in a forward hands over n gradients, the recomputed forward none more."""

    def hand_overs(checkpointing):
        model = make(preset)
        if checkpointing:
            model.activation_checkpointing_enable()
        seen = dict.fromkeys(model.ternary_matrices(), 0)
        for name, matrix in model.ternary_matrices().items():

            def count(*_, name=name):
                seen[name] += 1

            matrix.gradient_sink = Sink(count)
        ids = random_text(0, 2, 24)
        model.train()(ids, labels=ids).loss.backward()
        return seen

    plain = hand_overs(False)
    assert hand_overs(True) == plain
    blocks = {name: count for name, count in plain.items() if "blocks" in name.split(".")}
    assert len(blocks) > 8 and set(blocks.values()) == {1}


@pytest.mark.parametrize("preset, share", [("arb-tiny", 0.4), ("arb-tiny-full", 0.7)])
def test_less_is_saved(preset, share):
    def saved(checkpointing):
        model = make(preset)
        if checkpointing:
            model.activation_checkpointing_enable()
        return measure_step(model.train(), IntegerOptimizer(model), 4, 32).saved

    assert saved(True) < share * saved(False)
