"""Pretrain a ternary byte-level language model on integer state.

Ends with held-out bits per byte, a sample, loss.png, the audit table and final/, a folder that
AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True) loads anywhere.

examples:
  python scripts/pretrain.py                                             # arb-small on Python's standard library
  python scripts/pretrain.py --preset arb-tiny --max_steps 50 --output_dir runs/tiny      # seconds, on any CPU
  python scripts/pretrain.py --data corpus/ notes.txt 'more/*.md' --output_dir runs/mine
  python scripts/pretrain.py --data books/:0.7 'code/*.jsonl.gz:0.3' --output_dir runs/mixed
  python scripts/pretrain.py --dataset roneneldan/TinyStories --max_steps 5000 --output_dir runs/stories
  python scripts/pretrain.py --output_dir runs/mine --data corpus/ --resume_from_checkpoint latest
  python scripts/pretrain.py --blocks '{"codebook": {"size": 512, "dim": 64}, "moe_graph": {"num_experts": 4}}'
  python scripts/pretrain.py --init_from runs/mine/final --data notes/ --learning_rate 0.01 --output_dir runs/tuned
  python scripts/pretrain.py --init_from USER/NAME --revision COMMIT --data notes/ --output_dir runs/tuned
  python scripts/pretrain.py --output_dir runs/mine --push_to_hub true --hub_model_id USER/NAME
  accelerate launch scripts/pretrain.py --preset arb-14m --bf16 true --max_steps 20000
  torchrun --nproc_per_node 2 --max_restarts 9 scripts/pretrain.py --use_cpu true --resume_from_checkpoint auto

Exit codes: 0 done; 1 the loss or a gradient exploded or was not finite; 2 an option, the data, a checkpoint or the disk
is at fault; 75 another rank was lost or did not answer for --ddp_timeout seconds; 130, 143 stopped by Ctrl-C, SIGTERM.
All but 0 come with one line that says what happened; ARB_TRACEBACK=1 shows where.
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, set_seed
from transformers.utils.logging import disable_progress_bar

from arb_kernels.backend import describe_backend
from configuration_arb import PRESETS, ArbConfig, preset_config
from modeling_arb import ArbForCausalLM
from tokenization_arb import ArbTokenizer
from training_arb.checkpoints.checkpoint_files import (
    BEST,
    LATEST,
    newest_sound_checkpoint,
    numbered_checkpoints,
    pointed,
    write_checksums,
)
from training_arb.checkpoints.starting_point import describe_start, start_from
from training_arb.cli.command_line import HelpFormatter, run
from training_arb.common.atomic_files import new_folder, write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.byte_data import ByteBlocks, collate_blocks, open_corpus
from training_arb.data.mixed_stream import MixedStream, configure_reading
from training_arb.evaluation.bits_per_byte import bits_per_byte
from training_arb.memory.state_audit import audit_model, inference_hash, state_hash, zero_share
from training_arb.ranks.rank_exchange import lone_process_warning
from training_arb.ranks.rank_loss import naming_lost_ranks
from training_arb.report.run_facts import shown_command
from training_arb.report.run_report import write_report
from training_arb.report.training_plots import plot_training
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

LEAST = {"ctx": 8, "eval_blocks": 1, "eval_bytes": 4, "stream_above_mb": 0}
DEFAULT_PRESET = "arb-small"


@dataclass
class PretrainArguments:
    """The model and its data."""

    preset: str | None = field(
        default=None, metadata={"help": f"Shape: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}, or --init_from's."}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Finetune: start from the weights and the shape of a checkpoint, a folder or a hub name;"
            " residual and momentum start at zero."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Of --init_from on the hub: branch, tag or commit."})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "PATH[:WEIGHT]: files, folders, globs of text, .jsonl, .parquet, .gz; with weights, a mixture of"
            " them. Default: the running Python's standard library."
        },
    )
    stream_above_mb: int = field(default=1024, metadata={"help": "Read text larger than this as it is trained on."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub dataset, or a folder of jsonl or parquet, read as a stream."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of text in a dataset, .jsonl and .parquet."})
    ctx: int = field(default=256, metadata={"help": "Bytes per block."})
    blocks: str = field(
        default="{}", metadata={"help": "Config fields over the preset's, as JSON; null switches a block off."}
    )
    update_rule: str | None = field(
        default=None, metadata={"help": "momentum, flip or correlation. Default: momentum, or --init_from's."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Weights per scale exponent; 0: the whole row. Default: 0, or --init_from's."}
    )
    momentum_bits: int | None = field(
        default=None, metadata={"help": "Bits of residual and of momentum: 4 or 8. Default: 4, or --init_from's."}
    )
    compute: str | None = field(
        default=None,
        metadata={"help": "Matmuls: int8, float, or auto (int8 where it can). Default: auto, or --init_from's."},
    )
    eval_blocks: int = field(default=64, metadata={"help": "Held-out blocks in evaluations during training."})
    eval_bytes: int = field(default=200_000, metadata={"help": "Held-out bytes in the final evaluation."})
    prompt: str = field(default="def ", metadata={"help": "What the final sample continues."})

    @property
    def beginning(self) -> str:
        """What the run begins with, for titles."""
        return self.preset or self.init_from


def resolve_resume(args: ArbTrainingArguments) -> str | None:
    """The checkpoint to continue: `latest` and `best` must exist, `auto` may; None starts afresh in a folder without
    runs. A damaged newest checkpoint gives way to the one before it, with a warning."""
    output_dir, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted is None or wanted == "auto":
        if (output_dir / "final").exists() or (wanted is None and numbered_checkpoints(output_dir)):
            raise ValueError(
                f"output_dir={str(output_dir)!r} already holds a run: choose another, or continue an unfinished one"
                " with --resume_from_checkpoint latest"
            )
    elif wanted.lower() not in (LATEST, "true"):
        checkpoint = pointed(output_dir, BEST) if wanted == BEST else Path(wanted)
        if checkpoint is None or not checkpoint.is_dir():
            raise ValueError(
                f"resume_from_checkpoint={wanted!r}: no such {'checkpoint' if wanted == BEST else 'folder'}"
            )
        return str(checkpoint)
    checkpoint, faults = newest_sound_checkpoint(output_dir)
    if checkpoint is None and wanted not in (None, "auto"):
        raise ValueError(f"resume_from_checkpoint={wanted!r}: output_dir={str(output_dir)!r} has no checkpoint")
    if faults and args.should_log:
        print(f"warning: {'; '.join(faults)}; going on from {checkpoint} instead", file=sys.stderr)
    return None if checkpoint is None else str(checkpoint)


def parse_blocks(text: str) -> dict:
    """Fields of ArbConfig from JSON. Raises ValueError on anything else."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"blocks={text!r} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"blocks={text!r} must be a JSON object of config fields")
    for name in fields:
        if name not in ArbConfig.__annotations__:
            raise ValueError(f"blocks: {name!r} is no field of the config")
        if name in PretrainArguments.__dataclass_fields__:
            raise ValueError(f"blocks: {name!r} has an option of its own, --{name}")
    return fields


def first_model(arguments: PretrainArguments, resume: str | None) -> tuple[ArbForCausalLM, dict | None]:
    """The model to train and, with --init_from, where its weights come from. Notes its settings in `arguments`."""
    options = ("update_rule", "group_size", "momentum_bits", "compute")
    fields = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    fields |= parse_blocks(arguments.blocks)
    if arguments.init_from is not None:
        model, origin = start_from(
            arguments.init_from, arguments.revision, arguments.preset, fields, arguments.ctx, resume
        )
    elif arguments.revision is not None:
        raise ValueError(f"revision={arguments.revision!r} goes with --init_from only")
    else:
        arguments.preset = arguments.preset or DEFAULT_PRESET
        fields = {"max_position_embeddings": max(arguments.ctx, 4096), **fields}
        model, origin = ArbForCausalLM(preset_config(arguments.preset, **fields)), None
    for name in options:
        setattr(arguments, name, getattr(model.config, name))
    return model, origin


def sample(model: ArbForCausalLM, tokenizer: ArbTokenizer, prompt: str, length: int = 400) -> str:
    """A seeded sample that continues `prompt`."""
    set_seed(0)
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=length, do_sample=True, top_p=0.9)
    return tokenizer.decode(ids[0])


def main() -> int:
    started = time.time()
    parser = HfArgumentParser(
        (PretrainArguments, ArbTrainingArguments), description=__doc__, formatter_class=HelpFormatter
    )
    arguments, args = parser.parse_args_into_dataclasses()
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps={args.max_steps} must be positive, or -1 for num_train_epochs")
    for name, least in LEAST.items():
        if getattr(arguments, name) < least:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least {least}")
    if any("\ud800" <= character <= "\udfff" for character in arguments.prompt):
        raise ValueError(f"prompt={arguments.prompt!r} is no UTF-8")
    if os.path.lexists(args.output_dir) and not Path(args.output_dir).is_dir():
        raise ValueError(f"output_dir={args.output_dir!r} is no folder")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # of each file that transformers reads or writes
    keep_freed_memory()
    resume = resolve_resume(args)
    set_seed(args.seed)
    model, origin = first_model(arguments, resume)
    config = model.config
    train, held_out, source, size = open_corpus(
        arguments.data,
        arguments.dataset,
        arguments.ctx,
        args.seed,
        arguments.text_column,
        arguments.stream_above_mb,
    )
    if isinstance(train, MixedStream):
        configure_reading(args)
    if args.should_log and (warning := lone_process_warning(os.environ)):
        print(f"warning: {warning}", file=sys.stderr)
    if args.should_log:
        audit = audit_model(model)
        step_bytes = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * arguments.ctx
        print(f"model     {arguments.beginning}: {audit.logical_weights:,} ternary weights, rule {config.update_rule}")
        print(f"state     {audit.state_bytes:,} bytes, {audit.state_bytes / audit.logical_weights:.3f} a weight")
        if origin:
            print(f"start     {describe_start(origin, config)}")
        print(f"compute   {config.compute}, {describe_backend(args.device)}")
        print(f"data      {source}: {size}, and {len(held_out):,} held out")
        start = resume or arguments.init_from or "scratch"
        length = f"steps {args.max_steps}" if args.max_steps > 0 else f"epochs {args.num_train_epochs:g} in steps"
        print(f"training  {length} of {step_bytes:,} bytes on {args.device}, from {start}")
    trainer = ArbTrainer(
        model,
        args,
        run_description={
            "data": source,
            "ctx": arguments.ctx,
            "streamed": isinstance(train, MixedStream),
            "init_from": origin,
        },
        train_dataset=train,
        eval_dataset=ByteBlocks(held_out, arguments.ctx, arguments.eval_blocks),
        data_collator=collate_blocks,
    )
    trainer.train(resume_from_checkpoint=resume or False)
    if trainer.interruption.signum:
        return stop_early(trainer)
    if trainer.is_world_process_zero():
        finish(trainer, arguments, held_out, source, started)
    return 0


def stop_early(trainer: ArbTrainer) -> int:
    """Say how to go on after a signal; the exit code is the one that a shell gives to it."""
    signum, step, last = trainer.interruption.signum, trainer.state.global_step, trainer.last_checkpoint
    if trainer.is_world_process_zero():
        how = "--resume_from_checkpoint latest" if last else "starting again: there is no checkpoint"
        print(f"\nstopped by {signal.Signals(signum).name} after step {step}; last checkpoint {last}; go on by {how}")
    with naming_lost_ranks(trainer.where_it_stands):
        trainer.accelerator.wait_for_everyone()
    if last is None or last.name != f"checkpoint-{step}":
        raise ValueError(f"step {step} is not saved; the last checkpoint is {last}")
    return 128 + signum


def finish(trainer: ArbTrainer, arguments: PretrainArguments, held_out, source: str, started: float) -> None:
    """Measure, show and write what the run ends with."""
    model, output_dir = trainer.model.eval(), Path(trainer.args.output_dir)
    tokenizer = ArbTokenizer()
    scores = bits_per_byte(
        model, held_out[: arguments.eval_bytes], arguments.ctx, max(arguments.ctx // 2, 1), progress=True
    )
    text = sample(model, tokenizer, arguments.prompt)
    audit = audit_model(model, trainer.integer_optimizer)
    plot_training(trainer.state.log_history, output_dir / "loss.png", f"{arguments.beginning} on {source}")
    write_json(
        output_dir / "report.json",
        {
            **scores,
            "preset": arguments.preset,
            "init_from": trainer.run_description["init_from"],
            "command": shown_command(sys.argv),
            "data": source,
            "steps": trainer.state.global_step,
            "trained_bytes": trainer.state.global_step * trainer.step_blocks * arguments.ctx,
            "ctx": arguments.ctx,
            "seconds": round(time.time() - started, 1),
            "state_sha256": state_hash(model),
            "weights_sha256": inference_hash(model),
            "zero_share": zero_share(model),
            "audit": {key: value for key, value in audit.to_dict().items() if key != "tensors"},
            "sample": text,
            "torch": torch.__version__,
            "settings": {
                **vars(arguments),
                **{name: getattr(trainer.args, name) for name in ArbTrainingArguments.__annotations__},
            },
            "history": trainer.state.log_history,
        },
    )
    with new_folder(output_dir / "final") as folder:
        model.save_pretrained(folder, training_state=False)
        tokenizer.save_pretrained(folder)
        write_checksums(folder)
    write_report(output_dir, output_dir / "report.html")
    print(f"\n{audit.table()}\n\nsample\n{text}\n")
    print(f"held out    {scores['bits_per_byte']:.4f} bits per byte over {scores['bytes']:,} bytes never trained on")
    print(f"state hash  {state_hash(model)}")
    print(f"written     {output_dir}/final, loss.png, report.json, report.html in {time.time() - started:.0f} s")
    if trainer.args.push_to_hub:
        try:
            commit = trainer.push_to_hub()
        except ValueError as error:
            how = f"scripts/export_hub.py {output_dir}/final --push {trainer.hub_model_id}"
            raise ValueError(f"{error}; the run is whole, {how} pushes it") from error
        print(f"pushed      {commit.repo_url}, commit {commit.oid}")


if __name__ == "__main__":
    run(main)
