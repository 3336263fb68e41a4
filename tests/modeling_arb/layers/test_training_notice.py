"""A model that is trained without anything that could move its weights says so once, with what helps."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.layers.training_notice import NOTHING_LEARNS
from support.fresh_process import NO_REPO, fresh_process
from support.tensors import random_text, training_step
from training_arb.optim.integer_optimizer import IntegerOptimizer

STOCK_TRAINER = f"""{NO_REPO}
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
rows = [{{"input_ids": torch.arange(97, 113), "labels": torch.arange(97, 113)}}] * 4
args = TrainingArguments(sys.argv[2], max_steps=2, use_cpu=True, save_strategy="no", label_names=["labels"])
Trainer(model=model, args=args, train_dataset=rows).train()
print("ALONE", flush=True)
print("ADAPTED", file=sys.stderr, flush=True)
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
before = {{name: tensor.clone() for name, tensor in adapted.named_parameters()}}
Trainer(model=adapted, args=args, train_dataset=rows).train()
assert any(not torch.equal(tensor, before[name]) for name, tensor in adapted.named_parameters())
"""


@pytest.fixture(autouse=True)
def nothing_said_yet():
    logging.Logger.warning_once.cache_clear()


@pytest.fixture
def model():
    return ArbForCausalLM(preset_config("arb-tiny"))


def test_a_plain_loop_is_told_once_whatever_its_loss(model, caplog):
    ids = random_text(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(ids).logits.logsumexp(-1).mean().backward()
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [record.getMessage() for record in caplog.records] == [NOTHING_LEARNS]
    for way in ("ArbTrainer", "IntegerOptimizer(model)", "arb pretrain --init_from", "LoRA"):
        assert way in NOTHING_LEARNS


def test_whoever_trains_something_or_nothing_is_not_told(model, caplog):
    ids = random_text(0)
    model(ids, labels=ids)  # a loss that nobody trains on
    model.eval()(ids, labels=ids).loss.backward()
    model.train()
    with torch.no_grad():
        model(ids, labels=ids)
    optimizer = IntegerOptimizer(model)
    training_step(model, optimizer, ids)
    optimizer.detach()
    get_peft_model(model, LoraConfig(target_modules=["proj"]))(input_ids=ids, labels=ids).loss.backward()
    assert not caplog.records


def test_the_stock_trainer_is_told_by_a_remote_code_model(model, tmp_path):
    model.save_pretrained(tmp_path / "export", training_state=False)
    done = fresh_process(tmp_path, STOCK_TRAINER, tmp_path / "export", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    alone, _, adapted = done.stderr.partition("ADAPTED")
    assert alone.count(NOTHING_LEARNS) == 1 and NOTHING_LEARNS not in adapted
