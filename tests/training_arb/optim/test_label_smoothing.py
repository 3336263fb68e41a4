"""label_smoothing_factor smooths the next byte's target: a model that is trained with it still learns to predict."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.backbone.byte_head import mask_incomplete_trigrams, next_byte_loss
from support.tensors import random_text
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.evaluation.bits_per_byte import bits_per_byte
from training_arb.lora.lora_trainer import LoraTrainer, LoraTrainingArguments
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

TEXT = b"".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n\n".encode() for i in range(400))
IDS = np.frombuffer(TEXT, dtype=np.uint8)
CTX = 32
COMMON = {"use_cpu": True, "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def adapted_model():
    set_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny"))
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=True))


def trained(trainer_class, model, args, **arguments):
    """The trainer after its run, and the model's bits per byte on what it was trained on."""
    rows = [
        {**block, "labels": mask_incomplete_trigrams(block["input_ids"][None])[0]} for block in ByteBlocks(IDS, CTX)
    ]
    trainer = trainer_class(model=model, args=args, train_dataset=rows, **arguments)
    trainer.train()
    return trainer, bits_per_byte(model.eval(), IDS[:1000], CTX, CTX // 2)["bits_per_byte"]


def test_the_value_is_the_plain_loss_and_the_gradient_the_smoothed_one():
    labels = random_text(0)
    logits = torch.randn(*labels.shape, 288, requires_grad=True)
    loss = next_byte_loss(logits, labels, label_smoothing=0.2)
    assert torch.equal(loss, next_byte_loss(logits, labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    log_probabilities = logits.log_softmax(-1)[:, 2:-1]
    spread = -log_probabilities.mean(-1).mean()
    expected = 0.8 * next_byte_loss(logits, labels) + 0.2 * spread
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share):
    labels = random_text(0)
    with pytest.raises(ValueError, match=f"label_smoothing={share}"):
        next_byte_loss(torch.zeros(*labels.shape, 288), labels, label_smoothing=share)


def test_a_smoothed_run_learns_about_as_well(tmp_path):
    scores = {}
    for factor in (0.0, 0.1):
        set_seed(0)
        args = ArbTrainingArguments(output_dir=str(tmp_path), max_steps=40, label_smoothing_factor=factor, **COMMON)
        model = ArbForCausalLM(preset_config("arb-tiny"))
        trainer, scores[factor] = trained(ArbTrainer, model, args, data_collator=collate_blocks)
        assert trainer.state.log_history[-2]["loss"] < 1
    assert scores[0.0] != scores[0.1] < scores[0.0] + 0.3


def test_evaluation_is_not_smoothed(tmp_path):
    evaluated = []
    for factor in (0.0, 0.5):
        set_seed(0)
        args = ArbTrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=factor, **COMMON)
        model = ArbForCausalLM(preset_config("arb-tiny"))
        trainer = ArbTrainer(model, args, eval_dataset=ByteBlocks(IDS[:999], CTX), data_collator=collate_blocks)
        evaluated.append(trainer.evaluate()["eval_loss"])
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("stock", [True, False], ids=["stock Trainer", "LoraTrainer"])
def test_a_smoothed_adapter_learns(tmp_path, stock):
    settings = {**COMMON, "output_dir": str(tmp_path), "max_steps": 60, "learning_rate": 0.02, "logging_steps": 20}
    settings |= {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 8, "label_names": ["labels"]}
    model = adapted_model()
    before = bits_per_byte(model.eval(), IDS[:1000], CTX, CTX // 2)["bits_per_byte"]
    if stock:
        _, after = trained(Trainer, model, TrainingArguments(**settings), data_collator=collate_blocks)
    else:
        args = LoraTrainingArguments(**settings, train_sampling_strategy="random")
        _, after = trained(LoraTrainer, model, args, run_description={})
    assert after < before - 2
