"""Finetune a LoRA adapter on conversations over a frozen ternary model, or merge one into it.

The base's integer state does not change. The adapter is float and is trained by AdamW on the assistant's text. Ends
with the loss before and after on training and held-out conversations, loss.png, report.json and final/, which peft
loads, as do scripts/generate.py and scripts/evaluate.py.

examples:
  python scripts/finetune_lora.py runs/pretrain/final                       # the 500 conversations of this repo
  python scripts/finetune_lora.py runs/pretrain/final --data chats.jsonl --epochs 2 --output_dir runs/chat
  python scripts/finetune_lora.py runs/pretrain/final --dataset HuggingFaceH4/no_robots --max_steps 2000
  python scripts/finetune_lora.py runs/pretrain/final --r 8 --target_modules up_proj down_proj --dora true
  python scripts/finetune_lora.py runs/pretrain/final --resume latest --output_dir runs/chat --data chats.jsonl
  python scripts/finetune_lora.py runs/lora/final --merge true --output_dir runs/merged
"""

from __future__ import annotations

import training_arb.common.thread_waiting

import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import HfArgumentParser, set_seed

from tokenization_arb import ArbTokenizer
from training_arb.checkpoints.checkpoint_files import write_checksums
from training_arb.checkpoints.run_checkpoints import checkpoint_to_resume
from training_arb.cli.command_line import HelpFormatter, quiet_transformers, run
from training_arb.common.atomic_files import new_folder, write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.chat_data import (
    Conversation,
    ConversationDataset,
    Conversations,
    load_hub_conversations,
    read_conversations,
    split_conversations,
)
from training_arb.lora.load_model import load_model
from training_arb.lora.lora_adapter import (
    ADAPTER_WEIGHTS,
    ALL_LINEAR,
    adapter_parameters,
    add_adapter,
    assistant_loss,
    base_hash,
    is_adapter,
    load_adapter,
    save_adapter,
)
from training_arb.lora.lora_merge import merge_adapter
from training_arb.lora.lora_trainer import LoraTrainer, LoraTrainingArguments, check_adapter_checkpoint
from training_arb.report.training_plots import plot_finetuning

INSTRUCTIONS = Path(training_arb.__file__).parent / "data" / "instructions.jsonl"
FLOAT16_BYTES = 2
SAMPLES = 4
MEASURED = 1000


@dataclass
class LoraArguments:
    """The adapter and its conversations."""

    data: str | None = field(
        default=None,
        metadata={"help": "A .jsonl of conversations. Default: 500 that come with the package."},
    )
    dataset: str | None = field(default=None, metadata={"help": "Hub dataset of conversations, instead of --data."})
    split: str = field(default="train", metadata={"help": "Which part of --dataset."})
    ctx: int = field(default=512, metadata={"help": "Bytes of a conversation; longer ones are cut there."})
    hold_out_every: int = field(default=10, metadata={"help": "Hold out every n-th conversation."})
    r: int = field(default=3, metadata={"help": "Rank of the adapter."})
    alpha: float = field(default=6.0, metadata={"help": "The adapter's output is scaled by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "On the adapter's input, in training."})
    target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR], metadata={"help": "Layers by name; all-linear: all but the head."}
    )
    dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    merge: bool = field(
        default=False,
        metadata={"help": "Write merged/, a ternary model; MODEL may be an adapter to merge without training."},
    )


@dataclass
class Data:
    """Conversations to train on and held-out ones, and all that was read."""

    train: list[Conversation]
    held_out: list[Conversation]
    read: Conversations


def read_data(arguments: LoraArguments) -> Data:
    if arguments.ctx < 8 or arguments.hold_out_every < 2:
        raise ValueError(
            f"ctx={arguments.ctx}, hold_out_every={arguments.hold_out_every}: need ctx >= 8, hold_out_every >= 2"
        )
    if arguments.dataset:
        read = load_hub_conversations(arguments.dataset, arguments.split, arguments.ctx)
    else:
        read = read_conversations(arguments.data or INSTRUCTIONS, arguments.ctx)
    return Data(*split_conversations(read.kept, arguments.hold_out_every), read)


def sample_answers(model: PeftModel, conversations: Sequence[Conversation]) -> list[dict[str, str]]:
    """Greedy answers to the first turns of held-out conversations, and the wanted answers."""
    tokenizer, shown = ArbTokenizer(), []
    for ids, said in conversations[:SAMPLES]:
        begin = said.index(True)
        end = begin + ids[begin:].index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids[begin:] else len(ids)
        prompt = torch.tensor([ids[:begin]], device=model.device)
        answer = model.generate(input_ids=prompt, max_new_tokens=160, do_sample=False)[0, begin:].tolist()
        texts = {"asked": ids[:begin], "wanted": ids[begin:end], "answered": answer}
        shown.append({name: tokenizer.decode_bytes(part).decode(errors="replace") for name, part in texts.items()})
    return shown


def build_parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        (LoraArguments, LoraTrainingArguments),  # pyright: ignore[reportArgumentType], an alias of Any
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", help="a pretrained model's folder or hub name; with --merge also an adapter's folder")
    return parser


@dataclass
class PreparedRun:
    """The parts of a run."""

    model_name: str
    arguments: LoraArguments
    trainer: LoraTrainer
    data: Data
    base_weights: int
    before: dict[str, float]  # losses of the base
    started: float

    @property
    def source(self) -> str:
        return str(self.arguments.dataset or self.arguments.data)

    @property
    def base_sha256(self) -> str:
        return self.trainer.run_description["base_sha256"]


def main() -> int:
    started = time.time()
    arguments, args, positional = build_parser().parse_args_into_dataclasses()
    arguments = replace(arguments, data=arguments.data or str(INSTRUCTIONS))
    quiet_transformers()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    keep_freed_memory()
    resume, said = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, check_adapter_checkpoint)
    for warning in said:
        print(f"warning: {warning}", file=sys.stderr)
    data = read_data(arguments)
    if is_adapter(positional.model):
        if not arguments.merge:
            raise ValueError(f"model={positional.model!r} is an adapter; give its base model, or --merge true")
        merge(load_adapter(positional.model), args, data)
        return 0
    prepared = prepare(positional.model, arguments, args, data, started)
    prepared.trainer.train(resume_from_checkpoint=resume or False)
    if prepared.trainer.interruption.signum:
        return prepared.trainer.end_early()
    if prepared.trainer.is_world_process_zero():
        finish(prepared)
        if arguments.merge:
            merge(prepared.trainer.model, args, data)
    return 0


def prepare(
    name: str, arguments: LoraArguments, args: LoraTrainingArguments, data: Data, started: float
) -> PreparedRun:
    """A new adapter over the model `name`, its losses, and the trainer."""
    set_seed(args.seed)
    base = load_model(name)
    base.name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    sha256, weights = base_hash(base), base.num_parameters()
    model = add_adapter(base, arguments.r, arguments.alpha, arguments.dropout, arguments.target_modules, arguments.dora)
    if args.should_log:
        print(f"base      {name}: {weights:,} ternary weights, frozen, sha256 {sha256[:16]}")
        parameters, kind = adapter_parameters(model), ", DoRA" if arguments.dora else ""
        print(f"adapter   rank {arguments.r}{kind}: {parameters:,} float parameters")
        source = arguments.dataset or arguments.data
        print(f"data      {source}: {len(data.train)} conversations, and {len(data.held_out)} held out;", end=" ")
        print(f"{data.read.cut} cut at {arguments.ctx} bytes, {data.read.dropped} left out: no answer by then")
    before = losses(model, data, args.per_device_eval_batch_size)
    trainer = LoraTrainer(
        model,
        args,
        run_description={
            **{name: value for name, value in vars(arguments).items() if name != "merge"},
            "base_sha256": sha256,
            "data_crc32": zlib.crc32(repr(data.read.kept).encode()),
            "seed": args.seed,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        },
        train_dataset=ConversationDataset(data.train),
        eval_dataset=ConversationDataset(data.held_out),
    )
    return PreparedRun(name, arguments, trainer, data, weights, before, started)


def finish(prepared: PreparedRun) -> None:
    """Evaluate the adapter, write the results and print them."""
    trainer, output_dir = prepared.trainer, Path(prepared.trainer.args.output_dir)
    after = losses(trainer.model, prepared.data, trainer.args.per_device_eval_batch_size)
    if base_hash(trainer.model) != prepared.base_sha256:
        raise RuntimeError("the frozen base has changed")
    answers = sample_answers(trainer.model, prepared.data.held_out)
    with new_folder(output_dir / "final") as folder:
        save_adapter(trainer.model, folder)
        ArbTokenizer().save_pretrained(folder)
        size = (folder / ADAPTER_WEIGHTS).stat().st_size
        write_checksums(folder)
    report = describe(prepared, after, answers, size)
    write_json(output_dir / "report.json", report)
    title = f"rank {prepared.arguments.r} on {Path(prepared.source).name}, {report['adapter_parameters']:,} parameters"
    plot_finetuning(
        trainer.state.log_history,
        prepared.before["held_out"],
        after["train"],
        after["held_out"],
        output_dir / "loss.png",
        title,
    )
    show(report, trainer.args.output_dir)


def describe(prepared: PreparedRun, after: dict[str, float], answers: list[dict[str, str]], size: int) -> dict:
    """What report.json says; size: bytes of the adapter's weights."""
    trainer, data, before = prepared.trainer, prepared.data, prepared.before
    weights, parameters = prepared.base_weights, adapter_parameters(trainer.model)
    return {
        "base": prepared.model_name,
        "base_sha256": prepared.base_sha256,
        "weights": weights,
        "adapter_parameters": parameters,
        "adapter_bytes": size,
        "adapter_share_of_float16": size / (FLOAT16_BYTES * weights),
        "data": prepared.source,
        "conversations": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "cut": data.read.cut,
            "left_out": data.read.dropped,
        },
        "loss_before": before,
        "loss_after": after,
        "reduction": {name: 1 - after[name] / before[name] for name in before},
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - prepared.started, 1),
        "settings": {
            **vars(prepared.arguments),
            **{name: getattr(trainer.args, name) for name in LoraTrainingArguments.__annotations__},
        },
        "samples": answers,
        "history": trainer.state.log_history,
    }


def evenly_spread(conversations: Sequence[Conversation]) -> Sequence[Conversation]:
    """At most MEASURED of the conversations, at equal distances."""
    return conversations[:: -(-len(conversations) // MEASURED)]


def losses(model: PeftModel, data: Data, batch: int) -> dict[str, float]:
    """Nats per assistant byte on each part; of the training conversations on at most MEASURED."""
    parts = {"train": evenly_spread(data.train), "held_out": data.held_out}
    return {name: assistant_loss(model, part, batch) for name, part in parts.items()}


def show(report: dict, output_dir: str) -> None:
    """Print the report."""
    for sample in report["samples"]:
        print("\n" + "\n".join(f"{name:<9} {text!r}" for name, text in sample.items()))
    print()
    for name, loss in report["loss_before"].items():
        after, reduction = report["loss_after"][name], report["reduction"][name]
        print(f"{name:<9} {loss:.4f} -> {after:.4f} nats per assistant byte, {reduction:.1%} less")
    print(
        f"adapter   {report['adapter_bytes']:,} bytes, {report['adapter_share_of_float16']:.2%} of the base in float16"
    )
    print(f"base      unchanged, sha256 {report['base_sha256'][:16]}")
    print(f"written   {output_dir}/final, loss.png, report.json in {report['seconds']:.0f} s")


def merge(model: PeftModel, args: LoraTrainingArguments, data: Data) -> None:
    """Write merged/, a ternary model, with its losses on both parts. Nothing is written if merging loses the adapter's
    gain."""
    batch, held_out = args.per_device_eval_batch_size, data.held_out
    with model.disable_adapter():
        held_out_losses = {"base": assistant_loss(model, held_out, batch)}
    held_out_losses["adapter"] = assistant_loss(model, held_out, batch)
    merged, report = merge_adapter(model, evenly_spread(data.train), seed=args.seed, batch_size=batch)
    held_out_losses["merged"] = assistant_loss(merged, held_out, batch)
    with new_folder(Path(args.output_dir) / "merged") as folder:
        merged.save_pretrained(folder)
        ArbTokenizer().save_pretrained(folder)
        write_json(folder / "merge.json", {**report.to_dict(), "held_out": held_out_losses})
        write_checksums(folder)
    print(f"merged    {report}")
    print("held out  " + ", ".join(f"{loss:.4f} {name}" for name, loss in held_out_losses.items()))
    print(f"written   {args.output_dir}/merged, sha256 {base_hash(merged)[:16]}")


if __name__ == "__main__":
    run(main)
