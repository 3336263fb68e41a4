"""Bits per byte of models on text, by a sliding window; tasks of lm-evaluation-harness.

Any causal language model that transformers loads can be compared with ARB's, whatever its tokenizer: the loss of its
tokens is divided by the bytes that they stand for. Each document is scored by itself.

examples:
  python scripts/evaluate.py runs/pretrain/final --data book.txt
  python scripts/evaluate.py runs/pretrain/final --data corpus/ --max_bytes 100000 --ctx 512 --json score.json
  python scripts/evaluate.py runs/pretrain/final gpt2 --data book.txt --max_bytes 100000
  python scripts/evaluate.py runs/pretrain/final --dataset wikitext --dataset_config wikitext-2-raw-v1 --split test
  python scripts/evaluate.py runs/pretrain/final --lm_eval arb_text,arb_python      # after pip install 'arb[eval]'
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
from typing import Any

import torch

from training_arb.cli.command_line import run, script_parser
from training_arb.common.atomic_files import write_json
from training_arb.common.device_names import checked_device
from training_arb.common.text_table import format_table
from training_arb.data.document_readers import TEXT_COLUMN
from training_arb.data.text_files import collect_files
from training_arb.evaluation.eval_documents import MOST_BYTES, as_text, dataset_documents, file_documents, first_bytes
from training_arb.evaluation.eval_encoders import STARTS
from training_arb.evaluation.eval_harness import harness_scores, own_tasks
from training_arb.evaluation.eval_models import DEFAULT_CTX, EvaluatedModel, load_evaluated, score

COLUMNS = {"model": "", "bits/byte": ".4f", "nats/byte": ".4f", "tokens/byte": ".4f", "bytes": ",", "seconds": ".1f"}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("model", nargs="+", help="checkpoint folders or hub names")
    add("--data", nargs="+", help="files, folders, globs")
    add("--dataset", help="hub name of a dataset, or a folder of one")
    add("--dataset_config", help="which of the dataset's configurations")
    add("--split", default="test", help="which part of the dataset")
    add("--text_column", default=TEXT_COLUMN, help="where jsonl, parquet and datasets keep the text")
    add("--max_bytes", type=int, default=0, help=f"stop after so many; 0: all, {MOST_BYTES:,} at most")
    add("--ctx", type=int, default=0, help=f"ids per window; 0: {DEFAULT_CTX}, or all positions of a smaller model")
    add("--stride", type=int, default=0, help="ids between windows; 0: half a window")
    add("--batch", type=int, default=16, help="windows at a time")
    start = "before a document; auto: BOS where a tokenizer has one; for ARB EOS where there are several documents"
    add("--start", choices=STARTS, default="auto", help=start)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--trust_remote_code", action="store_true", help="allow running Python code from a checkpoint folder")
    add("--lm_eval", metavar="TASK[,TASK]", help=f"run tasks of lm-eval; ARB's own: {', '.join(own_tasks())}")
    add("--json", metavar="OUT", help="write the scores here")
    return parser


def parse() -> argparse.Namespace:
    """The command line. Raises ValueError on options that contradict each other or are out of range."""
    args = build_parser().parse_args()
    if args.max_bytes < 0 or args.batch < 1:
        raise ValueError(f"max_bytes={args.max_bytes}, batch={args.batch}: need max_bytes >= 0 and batch >= 1")
    if args.ctx < 0 or args.stride < 0:
        raise ValueError(f"ctx={args.ctx}, stride={args.stride} must not be negative")
    if args.data and args.dataset:
        raise ValueError(f"data={' '.join(args.data)!r} and dataset={args.dataset!r}: give one of them")
    if not (args.data or args.dataset or args.lm_eval):
        raise ValueError("data=None: give --data, --dataset or --lm_eval")
    return args


def read_documents(args: argparse.Namespace) -> list[bytes]:
    """The documents of --data or --dataset; empty if only tasks are requested."""
    if args.dataset:
        found = dataset_documents(args.dataset, args.dataset_config, args.split, args.text_column)
    else:
        found = file_documents(collect_files(args.data), args.text_column, args.max_bytes) if args.data else []
    documents = first_bytes(found, args.max_bytes)
    if not documents and (args.data or args.dataset):
        named = f"dataset={args.dataset!r}" if args.dataset else f"data={' '.join(args.data)!r}"
        raise ValueError(f"{named} is empty: 0 bytes")
    return documents


def scores_of(evaluated: EvaluatedModel, documents: list[bytes], args: argparse.Namespace) -> dict:
    """A model's row of the table, and the results of its tasks."""
    row: dict[str, Any] = {"model": evaluated.name}
    if documents:
        row |= score(evaluated, documents, args.ctx, args.stride, args.batch, args.start, progress=True)
    if args.lm_eval:
        row["lm_eval"] = harness_scores(
            evaluated.name,
            evaluated.tokenizer,
            args.lm_eval.split(","),
            device=args.device,
            batch_size=args.batch,
            max_length=evaluated.ctx(args.ctx) - 1,
            prefix_token_id=evaluated.lm_eval_prefix(args.start),
            trust_remote_code=args.trust_remote_code,
        )
    return row


def table(rows: list[dict]) -> str:
    """Bits per byte, a line for each model."""
    return format_table([{name: row[name.replace("/", "_per_")] for name in COLUMNS} for row in rows], COLUMNS)


def task_lines(rows: list[dict]) -> list[str]:
    """Every metric of every task, a line for each."""
    found = [(row["model"], *task) for row in rows for task in row.get("lm_eval", {}).items()]
    return [f"{model}  {task}  {metric} {value:.4f}" for model, task, row in found for metric, value in row.items()]


def main() -> None:
    args = parse()
    device = checked_device(args.device)
    documents = read_documents(args)
    models = [load_evaluated(name, device, args.trust_remote_code) for name in args.model]
    for evaluated in models:
        evaluated.ctx(args.ctx)
    replaced = 0
    if not all(evaluated.encoder.reads_any_bytes for evaluated in models):
        documents, replaced = as_text(documents)
    if replaced:
        print(f"{replaced} of {len(documents)} documents are not UTF-8: U+FFFD replaces what is not, for every model")
    rows = [scores_of(evaluated, documents, args) for evaluated in models]
    if documents:
        print(table(rows))
    for row in rows:
        if row.get("changed_documents"):
            changed = f"{row['changed_documents']} of {row['documents']} documents"
            print(f"{row['model']}: {changed} are changed by its tokenizer: the score is that of the changed text")
    for line in task_lines(rows):
        print(line)
    if args.json:
        write_json(args.json, {**rows[0], "replaced_documents": replaced, "models": rows})


if __name__ == "__main__":
    run(main)
