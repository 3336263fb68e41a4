"""Measure what each block, and a second trit for some of the weights, gains in bits per byte: backbone against variant,
at equal steps and at equal time.

Step times are measured first, all variants in the same rounds. Each variant then trains for --steps, and again for as
many steps as the backbone's time allows it, with a learning-rate schedule of that length.

examples:
  python scripts/ablate.py --preset arb-tiny --variants memgram codebook --steps 60 --ctx 64 --batch 4
  python scripts/ablate.py --steps 600 --data corpus.txt --json ablation.json
  python scripts/ablate.py --preset arb-bench --variants 'two trits' 'two trits: mlp' 'wider, one trit'
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
from pathlib import Path

from training_arb.bench.ablation import (
    BACKBONE,
    BLOCK_VARIANTS,
    VARIANTS,
    AblationRow,
    ablate,
    step_times,
    variant_config,
)
from training_arb.bench.measurement import describe_environment
from training_arb.bench.quality_benchmark import BenchmarkSettings
from training_arb.cli.command_line import check_known, check_least, run, script_parser
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.common.text_table import format_table
from training_arb.data.byte_data import load_corpus
from training_arb.report.training_plots import plot_ablation

OTHERS = [name for name in VARIANTS if name not in BLOCK_VARIANTS]
COLUMNS = {
    "variant": "",
    "equal steps": ".4f",
    "equal time": ".4f",
    "its steps": "d",
    "step, ms": ".1f",
    "weights": ",",
    "state, bytes": ",",
    "spike": ".2f",
}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--variants",
        nargs="+",
        default=list(BLOCK_VARIANTS),
        help=f"variants to train; the backbone is always included. Besides the default: {', '.join(OTHERS)}",
    )
    add("--preset", default="arb-small", help="preset whose backbone is used")
    add("--steps", type=int, default=600, help="training steps")
    add("--batch", type=int, default=16, help="windows per step")
    add("--ctx", type=int, default=128, help="bytes per window")
    add("--rate", type=float, default=0.035, help="learning rate, in cells per step and trit")
    add("--data", nargs="+", help="files, folders, globs; default: the running Python's standard library")
    add("--seed", type=int, default=0, help="seed of initial weights, data order and rounding")
    add("--json", metavar="OUT", help="write the results here, and a plot beside it")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    check_known("variants", args.variants, VARIANTS)
    check_least(args, {"steps": 1, "batch": 1, "ctx": 8})
    names = [BACKBONE, *(name for name in args.variants if name != BACKBONE)]
    for name in names:
        variant_config(args.preset, name)
    keep_freed_memory()
    settings = BenchmarkSettings(
        args.preset,
        args.steps,
        args.batch,
        args.ctx,
        args.seed,
        accum_threshold=32,
        scale_update_interval=1,
        print_every=args.steps,
    )
    train_ids, held_out = load_corpus(args.data, args.ctx)
    times = step_times(names, settings)
    rows: dict[str, AblationRow] = {}
    for name in names:
        rows[name] = ablate(name, times, settings, args.rate, train_ids, held_out)
        print(table(rows), flush=True)
        if args.json:
            save(args, settings, rows)


def table(rows: dict[str, AblationRow]) -> str:
    """A line for each variant: bits per byte at equal steps and at equal time, and what it costs."""
    lines = [
        {
            "variant": name,
            "equal steps": row.bits_per_byte_equal_steps,
            "equal time": row.bits_per_byte_equal_time,
            "its steps": row.steps_in_equal_time,
            "step, ms": row.step_ms,
            "weights": row.logical_weights,
            "state, bytes": row.state_bytes,
            "spike": row.worst_spike,
        }
        for name, row in rows.items()
    ]
    return format_table(lines, COLUMNS)


def save(args: argparse.Namespace, settings: BenchmarkSettings, rows: dict[str, AblationRow]) -> None:
    data = " ".join(args.data or ["Python's standard library"])
    result = {
        "rows": {name: row.to_dict() for name, row in rows.items()},
        "data": data,
        "rate": args.rate,
        "settings": vars(settings),
        "env": describe_environment(),
    }
    write_json(args.json, result)
    title = f"{Path(data).name}, {args.preset}, {args.batch} x {args.ctx} bytes a step"
    plot_ablation(rows, BACKBONE, Path(args.json).with_suffix(".png"), title)


if __name__ == "__main__":
    run(main)
