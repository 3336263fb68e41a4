"""A run that is taken up again ends in the same bits, by epochs too; what cannot be taken up exactly is refused."""

import shutil

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.lora.lora_trainer import LoraTrainer, LoraTrainingArguments
from training_arb.memory.state_audit import state_hash
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

IDS = np.frombuffer(b"".join(f"def f_{i}(a):\n    return a * {i}\n\n".encode() for i in range(40)), dtype=np.uint8)
CTX = 32
QUIET = {"use_cpu": True, "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}


def run(output_dir, blocks, resume=None, **settings):
    set_seed(0)
    args = ArbTrainingArguments(
        output_dir=str(output_dir), **{**QUIET, "save_steps": 1, "save_total_limit": 99, **settings}
    )
    model = ArbForCausalLM(preset_config("arb-tiny"))
    trainer = ArbTrainer(model, args, train_dataset=ByteBlocks(IDS[: blocks * CTX], CTX), data_collator=collate_blocks)
    trainer.train(resume_from_checkpoint=resume if resume in (None, True) else str(resume))
    return trainer


EPOCHS = {  # blocks, settings, steps; two blocks a batch
    "part of an epoch, last batch short": (5, {"num_train_epochs": 1.5}, 5),
    "whole epochs, last batch dropped": (5, {"num_train_epochs": 2, "dataloader_drop_last": True}, 4),
    "last step short": (6, {"num_train_epochs": 2, "gradient_accumulation_steps": 2}, 4),
    "steps over epochs": (4, {"max_steps": 3}, 3),
}


@pytest.mark.parametrize("case", EPOCHS)
def test_a_run_by_epochs_goes_on_bit_for_bit(tmp_path, case):
    blocks, settings, steps = EPOCHS[case]
    settings = {"max_steps": -1, "per_device_train_batch_size": 2, **settings}
    whole = run(tmp_path / "whole", blocks, **settings)
    assert whole.state.global_step == steps
    for step in (1, 2, steps):  # inside the first epoch, at or near its end, when all is done
        part = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", part / f"checkpoint-{step}")
        resumed = run(part, blocks, resume=part / f"checkpoint-{step}", **settings)
        assert (resumed.state.global_step, state_hash(resumed.model)) == (steps, state_hash(whole.model)), step
        losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
        assert losses[0] == losses[1], step


def test_true_resumes_the_newest_checkpoint_that_is_finished(tmp_path):
    whole = run(tmp_path, 8, max_steps=3)
    (tmp_path / "latest").unlink()
    (tmp_path / "checkpoint-3" / "checksums.json").unlink()
    resumed = run(tmp_path, 8, resume=True, max_steps=3)
    assert (tmp_path / "checkpoint-3" / "checksums.json").exists()
    assert resumed._initial_global_step == 2 and state_hash(resumed.model) == state_hash(whole.model)


def test_arguments_come_back_after_training(tmp_path):
    assert run(tmp_path, 8, max_steps=2, save_total_limit=1).args.save_total_limit == 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_checkpoint_without_optimizer_is_not_resumed(tmp_path):
    run(tmp_path, 8, max_steps=2, save_only_model=True)
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    ArbForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-1.: it has no optimizer\.pt, as save_only_model=True .*$"):
        run(tmp_path, 8, resume=tmp_path / "checkpoint-1", max_steps=3, save_only_model=True)


def test_an_adapters_checkpoint_without_optimizer_is_not_resumed(tmp_path):
    def finetune(resume=None):
        model = get_peft_model(ArbForCausalLM(preset_config("arb-tiny")), LoraConfig(target_modules="all-linear"))
        args = LoraTrainingArguments(output_dir=str(tmp_path), max_steps=1, save_steps=1, save_only_model=True, **QUIET)
        rows = [collate_blocks([block]) for block in ByteBlocks(IDS, CTX)]
        rows = [{name: tensor[0] for name, tensor in row.items()} for row in rows]
        LoraTrainer(model, args, run_description={}, train_dataset=rows).train(resume_from_checkpoint=resume)

    finetune()
    with pytest.raises(ValueError, match=r"it has no optimizer\.pt, as save_only_model=True"):
        finetune(str(tmp_path / "checkpoint-1"))


def test_retries_with_smaller_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^auto_find_batch_size=True: [^\n]*$"):
        ArbTrainingArguments(output_dir=str(tmp_path), auto_find_batch_size=True, **QUIET)


def test_hyperparameter_search_is_refused(tmp_path):
    args = ArbTrainingArguments(output_dir=str(tmp_path), save_strategy="no", **QUIET)
    trainer = ArbTrainer(None, args, model_init=lambda: ArbForCausalLM(preset_config("arb-tiny")))
    with pytest.raises(ValueError, match=r"^hyperparameter_search: [^\n]*output_dir[^\n]*$"):
        trainer.hyperparameter_search()
