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
  python scripts/pretrain.py --trits_per_weight embedding:2,head:2 --output_dir runs/finer        # or 2: everywhere
  python scripts/pretrain.py --init_from USER/NAME --revision COMMIT --data notes/ --output_dir runs/tuned
  python scripts/pretrain.py --output_dir runs/mine --push_to_hub true --hub_model_id USER/NAME
  accelerate launch scripts/pretrain.py --preset arb-14m --bf16 true --max_steps 20000
  torchrun --nproc_per_node 2 --max_restarts 9 scripts/pretrain.py --use_cpu true --resume_from_checkpoint auto

Exit codes: 0 done; 1 the loss or a gradient exploded or was not finite; 2 an option, the data, a checkpoint or the disk
is wrong; 75 another rank was lost or did not respond for --ddp_timeout seconds; 130, 143 stopped by Ctrl-C, SIGTERM.
All but 0 come with one line that says what happened; ARB_TRACEBACK=1 shows where.
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import CommitInfo
from transformers import HfArgumentParser, set_seed

from arb_kernels.backend import describe_backend
from configuration_arb import PRESETS, ArbConfig, preset_config
from configuration_arb.trits_per_weight import describe_trits
from modeling_arb import ArbForCausalLM
from tokenization_arb import SPECIAL_TOKENS, ArbTokenizer
from training_arb.checkpoints.checkpoint_files import write_checksums
from training_arb.checkpoints.run_checkpoints import checkpoint_to_resume
from training_arb.checkpoints.starting_point import describe_start, start_from
from training_arb.cli.command_line import (
    TRITS_HELP,
    HelpFormatter,
    check_least,
    quiet_transformers,
    run,
    trits_field,
)
from training_arb.common.atomic_files import new_folder, write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.byte_data import ByteBlocks, collate_blocks, open_corpus
from training_arb.data.mixed_stream import MixedStream, configure_reading
from training_arb.evaluation.bits_per_byte import bits_per_byte
from training_arb.memory.state_audit import StateAudit, audit_model, inference_hash, state_hash, zero_share
from training_arb.ranks.rank_exchange import lone_process_warning
from training_arb.ranks.rank_loss import meet_on_cpus
from training_arb.report.run_facts import shown_command
from training_arb.report.run_report import write_report
from training_arb.report.training_plots import plot_training
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

LEAST = {"ctx": 8, "eval_blocks": 1, "eval_bytes": 4, "stream_above_mb": 0}
DEFAULT_PRESET = "arb-small"
OF_THE_CONFIG = ("update_rule", "group_size", "momentum_bits", "compute")  # options that default to the checkpoint's


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
            " residuals and momentum come along where it has them."
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
    stream_above_mb: int = field(default=1024, metadata={"help": "Stream text larger than this instead of loading it."})
    dataset: str | None = field(
        default=None, metadata={"help": "Hub dataset, or a folder of jsonl or parquet, read as a stream."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of text in a dataset, .jsonl and .parquet."})
    ctx: int = field(default=256, metadata={"help": "Bytes per block."})
    blocks: str = field(
        default="{}", metadata={"help": "Config fields that override the preset's, as JSON; null switches a block off."}
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
    trits_per_weight: str | None = field(default=None, metadata={"help": f"{TRITS_HELP}, or --init_from's."})
    compute: str | None = field(
        default=None,
        metadata={"help": "Matmuls: int8, float, or auto (int8 where it can). Default: auto, or --init_from's."},
    )
    eval_blocks: int = field(default=64, metadata={"help": "Held-out blocks in evaluations during training."})
    eval_bytes: int = field(default=200_000, metadata={"help": "Held-out bytes in the final evaluation."})
    prompt: str = field(default="def ", metadata={"help": "Prompt of the sample at the end."})

    @property
    def beginning(self) -> str:
        """The preset or checkpoint that the run starts from, for titles."""
        return str(self.preset or self.init_from)


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
            raise ValueError(f"blocks: {name!r} is not a field of the config")
        if name in PretrainArguments.__dataclass_fields__:
            raise ValueError(f"blocks: {name!r}: use the option --{name}")
    return fields


def first_model(arguments: PretrainArguments, resume: str | None) -> tuple[ArbForCausalLM, dict | None]:
    """The model to train and, with --init_from, where its weights come from."""
    fields = {name: value for name in OF_THE_CONFIG if (value := getattr(arguments, name)) is not None}
    fields |= {**trits_field(arguments.trits_per_weight), **parse_blocks(arguments.blocks)}
    if arguments.init_from is not None:
        return start_from(arguments.init_from, arguments.revision, arguments.preset, fields, arguments.ctx, resume)
    if arguments.revision is not None:
        raise ValueError(f"revision={arguments.revision!r}: only used with --init_from")
    fields = {"max_position_embeddings": max(arguments.ctx, 4096), **fields}
    return ArbForCausalLM(preset_config(arguments.preset or DEFAULT_PRESET, **fields)), None


def sample(model: ArbForCausalLM, tokenizer: ArbTokenizer, prompt: str, length: int = 400) -> str:
    """A seeded sample that continues `prompt`."""
    set_seed(0)
    inputs = tokenizer(prompt or SPECIAL_TOKENS["EOS"], return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=length, do_sample=True, top_p=0.9)
    return str(tokenizer.decode(ids[0]))


def build_parser() -> HfArgumentParser:
    return HfArgumentParser(
        (PretrainArguments, ArbTrainingArguments),  # pyright: ignore[reportArgumentType], an alias of Any
        description=__doc__,
        formatter_class=HelpFormatter,
    )


def read_command() -> tuple[PretrainArguments, ArbTrainingArguments]:
    """Parse and check the command line. Connects several processes on CPUs, with --ddp_timeout."""
    parser = build_parser()
    given = parser.parse_args()
    if given.use_cpu:
        meet_on_cpus(given.ddp_timeout)
    arguments, args = parser.parse_args_into_dataclasses()
    if arguments.preset is None and arguments.init_from is None:
        arguments = replace(arguments, preset=DEFAULT_PRESET)
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps={args.max_steps} must be positive, or -1 for num_train_epochs")
    check_least(arguments, LEAST)
    if any("\ud800" <= character <= "\udfff" for character in arguments.prompt):
        raise ValueError(f"prompt={arguments.prompt!r} is not UTF-8")
    if os.path.lexists(args.output_dir) and not Path(args.output_dir).is_dir():
        raise ValueError(f"output_dir={args.output_dir!r} is not a folder")
    return arguments, args


@dataclass
class PreparedRun:
    """The parts of a run. arguments: completed with the config's values."""

    arguments: PretrainArguments
    trainer: ArbTrainer
    resume: str | None
    held_out: np.ndarray  # uint16 (n,)
    corpus: str  # its name and its size
    started: float


def prepare() -> PreparedRun:
    """Everything before the first step."""
    started = time.time()
    arguments, args = read_command()
    quiet_transformers()
    keep_freed_memory()
    resume, warnings = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    set_seed(args.seed)
    model, origin = first_model(arguments, resume)
    taken = {name: getattr(model.config, name) for name in OF_THE_CONFIG}
    arguments = replace(arguments, **taken, trits_per_weight=describe_trits(model.config.trits_per_weight))
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
    if warning := lone_process_warning(os.environ):
        warnings.append(warning)
    if args.should_log:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
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
    return PreparedRun(arguments, trainer, resume, held_out, f"{source}: {size}", started)


def show_start(prepared: PreparedRun) -> None:
    """Print the model, the data and the start of the run."""
    arguments, args, model = prepared.arguments, prepared.trainer.args, prepared.trainer.model
    audit, origin, config = audit_model(model), prepared.trainer.run_description["init_from"], model.config
    step_bytes = prepared.trainer.step_blocks * arguments.ctx
    print(f"model     {arguments.beginning}: {audit.logical_weights:,} ternary weights, rule {config.update_rule}")
    if config.trits_per_weight != 1:
        print(f"trits     {arguments.trits_per_weight} a weight")
    print(f"state     {audit.state_bytes:,} bytes, {audit.state_bytes / audit.logical_weights:.3f} a weight")
    if origin:
        print(f"start     {describe_start(origin, config)}")
    print(f"compute   {config.compute}, {describe_backend(args.device)}")
    print(f"data      {prepared.corpus}, and {len(prepared.held_out):,} held out")
    start = prepared.resume or arguments.init_from or "scratch"
    length = f"steps {args.max_steps}" if (args.max_steps or 0) > 0 else f"epochs {args.num_train_epochs:g} in steps"
    print(f"training  {length} of {step_bytes:,} bytes on {args.device}, from {start}")


def main() -> int:
    prepared = prepare()
    if prepared.trainer.args.should_log:
        show_start(prepared)
    prepared.trainer.train(resume_from_checkpoint=prepared.resume or False)
    if prepared.trainer.interruption.signum:
        return prepared.trainer.end_early()
    if prepared.trainer.is_world_process_zero():
        finish(prepared)
    return 0


def finish(prepared: PreparedRun) -> None:
    """Evaluate the model, write the results and print them."""
    arguments, trainer = prepared.arguments, prepared.trainer
    model, output_dir = trainer.model.eval(), Path(trainer.args.output_dir)
    held_out, stride = prepared.held_out[: arguments.eval_bytes], max(arguments.ctx // 2, 1)
    scores = bits_per_byte(model, held_out, arguments.ctx, stride, progress=True)
    text = sample(model, ArbTokenizer(), arguments.prompt)
    audit = audit_model(model, trainer.integer_optimizer)
    write_results(prepared, scores, text, audit)
    print(f"\n{audit.table()}\n\nsample\n{text}\n")
    print(f"held out    {scores['bits_per_byte']:.4f} bits per byte over {scores['bytes']:,} bytes never trained on")
    print(f"state hash  {state_hash(model)}")
    seconds = time.time() - prepared.started
    print(f"written     {output_dir}/final, loss.png, report.json, report.html in {seconds:.0f} s")
    if trainer.args.push_to_hub:
        push(trainer, output_dir)


def write_results(prepared: PreparedRun, scores: dict, text: str, audit: StateAudit) -> None:
    """loss.png, report.json, final/ and report.html."""
    arguments, trainer = prepared.arguments, prepared.trainer
    model, output_dir, description = trainer.model, Path(trainer.args.output_dir), trainer.run_description
    plot_training(trainer.state.log_history, output_dir / "loss.png", f"{arguments.beginning} on {description['data']}")
    options = {name: getattr(trainer.args, name) for name in ArbTrainingArguments.__annotations__}
    report = {
        **scores,
        "preset": arguments.preset,
        "init_from": description["init_from"],
        "command": shown_command(sys.argv),
        "data": description["data"],
        "steps": trainer.state.global_step,
        "trained_bytes": trainer.state.global_step * trainer.step_blocks * arguments.ctx,
        "ctx": arguments.ctx,
        "seconds": round(time.time() - prepared.started, 1),
        "state_sha256": state_hash(model),
        "weights_sha256": inference_hash(model),
        "zero_share": zero_share(model),
        "audit": {key: value for key, value in audit.to_dict().items() if key != "tensors"},
        "sample": text,
        "torch": torch.__version__,
        "settings": {**vars(arguments), **options},
        "history": trainer.state.log_history,
    }
    write_json(output_dir / "report.json", report)
    with new_folder(output_dir / "final") as folder:
        model.save_pretrained(folder, training_state=False)
        ArbTokenizer().save_pretrained(folder)
        write_checksums(folder)
    write_report(output_dir, output_dir / "report.html")


def push(trainer: ArbTrainer, output_dir: Path) -> None:
    """Push the finished run to the hub."""
    try:
        commit = trainer.push_to_hub()
    except ValueError as error:
        how = f"scripts/export_hub.py {output_dir}/final --push {trainer.hub_model_id}"
        raise ValueError(f"{error}; the run is complete, push it with {how}") from error
    assert isinstance(commit, CommitInfo)  # on the first rank, which waited for it
    print(f"pushed      {commit.repo_url}, commit {commit.oid}")


if __name__ == "__main__":
    run(main)
