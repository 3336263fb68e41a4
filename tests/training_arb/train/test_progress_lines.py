"""What a person sees of a run: one aligned line a log, a bar on a terminal alone, and no warning about the machine."""

import io
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerControl, TrainerState

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.lora.lora_trainer import LoraTrainer, LoraTrainingArguments
from training_arb.train.progress_lines import ProgressLines
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

IDS = np.frombuffer(b"".join(f"def f_{i}(a):\n    return a * {i}\n\n".encode() for i in range(40)), dtype=np.uint8)
CTX = 32
SETTINGS = {
    "use_cpu": True,
    "disable_tqdm": False,
    "max_steps": 4,
    "logging_steps": 2,
    "eval_steps": 4,
    "eval_strategy": "steps",
}
SETTINGS |= {"save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 2}
FIGURE = r"\d+\.\d+"
TRAIN_LINE = rf"train +\d/4 +{FIGURE} +{FIGURE} +0\.0\d+ +{FIGURE}% +[\d.]+k? +00:0\d"
EVAL_LINE = rf"eval +4/4 +{FIGURE} +{FIGURE}( +-){{4}}"


def train(output_dir, eval_dataset=None, **settings):
    args = ArbTrainingArguments(output_dir=str(output_dir), **{**SETTINGS, **settings})
    blocks = ByteBlocks(IDS[: 8 * CTX], CTX)
    trainer = ArbTrainer(
        ArbForCausalLM(preset_config("arb-tiny")),
        args,
        train_dataset=blocks,
        eval_dataset=blocks if eval_dataset is None else eval_dataset,
        data_collator=collate_blocks,
    )
    trainer.train()
    return trainer


def test_one_aligned_line_a_log(tmp_path, capsys):
    trainer = train(tmp_path)
    seen = capsys.readouterr()
    heading, *lines = seen.out.splitlines()
    assert heading.split() == ["step", "loss", "bits/byte", "rate", "flips", "bytes/s", "left"]
    patterns = [TRAIN_LINE, TRAIN_LINE, EVAL_LINE]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
        assert len(line) == len(heading)
    assert "{" not in seen.out and "\r" not in seen.out + seen.err
    loss = trainer.state.log_history[0]["loss"]
    assert f"{loss:.4f}" in lines[0].split()
    assert trainer.bytes_seen == 4 * 2 * CTX


def test_each_held_out_text_has_its_line(tmp_path, capsys):
    train(tmp_path, eval_dataset={name: ByteBlocks(IDS[: 2 * CTX], CTX) for name in ("code", "prose")})
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:3] for line in lines] == [["eval", "code", "4/4"], ["eval", "prose", "4/4"]]


def test_nothing_is_shown_without_a_bar(tmp_path, capsys):
    assert train(tmp_path, disable_tqdm=True).state.global_step == 4
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "")


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(tmp_path)
    assert "4/4" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert "\r" not in capsys.readouterr().out.replace("\r\n", "")


def test_other_ranks_are_silent(tmp_path, capsys):
    lines = ProgressLines(("loss",), lambda: 0)
    args = ArbTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(is_world_process_zero=False, max_steps=2), TrainerControl()
    lines.on_train_begin(args, state, control)
    lines.on_step_end(args, state, control)
    lines.on_log(args, state, control, logs={"loss": 1.0})
    lines.on_train_end(args, state, control)
    assert capsys.readouterr().out == ""


def test_an_adapters_run_shows_the_same_lines(tmp_path, capsys):
    model = get_peft_model(ArbForCausalLM(preset_config("arb-tiny")), LoraConfig(target_modules="all-linear"))
    args = LoraTrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, "eval_strategy": "no"})
    rows = [{name: tensor[0] for name, tensor in collate_blocks([block]).items()} for block in ByteBlocks(IDS, CTX)]
    LoraTrainer(model, args, run_description={}, train_dataset=rows).train()
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "loss", "rate", "gradient", "bytes/s", "left"]
    assert [line.split()[:2] for line in lines] == [["train", "2/4"], ["train", "4/4"]]


def test_no_warning_about_pinned_memory(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(tmp_path, use_cpu=False)
    assert not [warning for warning in caught if "pin_memory" in str(warning.message)]
    assert trainer.args.dataloader_pin_memory == torch.cuda.is_available()


@pytest.mark.parametrize("wanted", [True, False])
def test_an_explicit_choice_of_pinned_memory_stands(tmp_path, wanted):
    args = ArbTrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=wanted)
    assert args.dataloader_pin_memory == wanted
