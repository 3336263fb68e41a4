"""Export a checkpoint as a self-contained folder, on this machine or on the Hugging Face hub.

Weights, config, generation config, code, tokenizer, licence and a model card filled from the run's record and an audit
of the files. It loads with AutoModelForCausalLM.from_pretrained(NAME, trust_remote_code=True) where this repo is not
installed. Training state is left out unless asked for. A push is one commit, by the token of `hf auth login` or of
HF_TOKEN.

examples:
  python scripts/export_hub.py runs/pretrain/final runs/export
  python scripts/export_hub.py runs/pretrain/checkpoint-1200 runs/resumable --training_state
  python scripts/export_hub.py runs/pretrain/final --push USER/NAME --private
  python scripts/export_hub.py runs/pretrain/best --push USER/NAME --branch best --max_shard_size 500MB
  python scripts/export_hub.py USER/NAME runs/copy --revision COMMIT
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path

from modeling_arb import ArbForCausalLM
from training_arb.checkpoints.checkpoint_files import verify_checksums
from training_arb.checkpoints.checkpoint_source import find_checkpoint
from training_arb.cli.command_line import run, script_parser
from training_arb.common.atomic_files import new_folder
from training_arb.hub.hub_export import SHARD_SIZE, export_model
from training_arb.hub.hub_push import check_target, push_folder
from training_arb.report.run_facts import facts_of


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("model", help="a checkpoint folder or hub name")
    add("output", nargs="?", help="the folder to write; must not exist; may be left out with --push")
    add("--push", metavar="USER/NAME", help="also commit the export to this repository of the hub")
    add("--private", action="store_true", help="of --push: to a private repository")
    add("--branch", help="of --push: the branch to commit to, made where it is missing")
    add("--revision", help="of a model on the hub: branch, tag or commit")
    add("--max_shard_size", default=SHARD_SIZE, help="split the weights into files of at most this size")
    add("--training_state", action="store_true", help="keep the update rule's accumulators")
    return parser


def parse() -> argparse.Namespace:
    """The command line. Raises ValueError on options that contradict each other or are out of range."""
    args = build_parser().parse_args()
    if args.output is None and args.push is None:
        raise ValueError("output=None: give a folder to write, or a repository with --push")
    if args.output is not None and Path(args.output).exists():
        raise ValueError(f"output={args.output!r} exists already")
    if not re.fullmatch(r"[\d.]+ ?[KMGT]B", args.max_shard_size):
        raise ValueError(f"max_shard_size={args.max_shard_size!r} must be a number and KB, MB, GB or TB")
    if args.push is None and (args.private or args.branch):
        raise ValueError(f"{'private' if args.private else 'branch'} goes with --push only")
    return args


def main() -> None:
    args = parse()
    if args.push:
        check_target(args.push, args.private)
    source = find_checkpoint(args.model, args.revision).folder
    verify_checksums(source)
    model = ArbForCausalLM.from_pretrained(source)
    facts = facts_of(source, model)
    with ExitStack() as stack:
        if args.output is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:  # a push that fails leaves nothing here either
            folder = stack.enter_context(new_folder(args.output))
        audit = export_model(model, folder, facts, args.push, args.training_state, args.max_shard_size)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if args.push:
            message = f"Export {audit.logical_weights:,} ternary weights"
            commit = push_folder(folder, args.push, message, private=args.private or None, branch=args.branch)
    weights = audit.logical_weights
    print(f"{args.output or args.push}: {weights:,} weights in {size:,} bytes, {size / weights:.4f} bytes a weight")
    if args.push:
        print(f"pushed to {commit.repo_url}, commit {commit.oid}; from_pretrained(..., revision=) pins it")


if __name__ == "__main__":
    run(main)
