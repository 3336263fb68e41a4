"""What each block buys in bits per byte: the backbone, then each block switched on, at equal steps and equal wall time.

Step times are measured first, all variants in the same rounds. Each variant then trains for --steps, and again for as
many steps as the backbone's time allows it, with a learning-rate schedule of that length.

examples:
  python scripts/ablate.py --preset arb-tiny --variants memgram codebook --steps 60 --ctx 64 --batch 4
  python scripts/ablate.py --steps 600 --data corpus.txt --json ablation.json
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
from pathlib import Path

from training_arb.bench.ablation import BACKBONE, VARIANTS, AblationRow, ablate, step_times, variant_config
from training_arb.bench.measurement import describe_environment
from training_arb.bench.quality_benchmark import BenchmarkSettings
from training_arb.cli.command_line import HelpFormatter, run
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.byte_data import load_corpus
from training_arb.report.training_plots import plot_ablation

HEADER = (
    f"{'variant':<20}{'equal steps':>12}{'equal time':>12}{'its steps':>11}{'step, ms':>10}"
    f"{'weights':>12}{'state, bytes':>14}{'spike':>7}"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--variants", nargs="+", default=list(VARIANTS), help="the backbone is always among them")
    add("--preset", default="arb-small", help="whose backbone it is")
    add("--steps", type=int, default=600, help="training steps")
    add("--batch", type=int, default=16, help="windows per step")
    add("--ctx", type=int, default=128, help="bytes per window")
    add("--rate", type=float, default=0.035, help="learning rate, in cells per step")
    add("--data", nargs="+", help="files, folders, globs; default: the running Python's standard library")
    add("--seed", type=int, default=0, help="seed of initial weights, data order and rounding")
    add("--json", metavar="OUT", help="write the results here, and a plot beside it")
    return parser.parse_args()


def main() -> None:
    args = parse()
    for name in args.variants:
        if name not in VARIANTS:
            raise ValueError(f"variants={name!r} is not one of {', '.join(VARIANTS)}")
    for field, least in (("steps", 1), ("batch", 1), ("ctx", 8)):
        if getattr(args, field) < least:
            raise ValueError(f"{field}={getattr(args, field)} must be at least {least}")
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
        print("\n".join([HEADER, *(line(*item) for item in rows.items())]), flush=True)
        if args.json:
            save(args, settings, rows)


def line(name: str, row: AblationRow) -> str:
    return (
        f"{name:<20}{row.bits_per_byte_equal_steps:>12.4f}{row.bits_per_byte_equal_time:>12.4f}"
        f"{row.steps_in_equal_time:>11}{row.step_ms:>10.1f}{row.logical_weights:>12,}{row.state_bytes:>14,}"
        f"{row.worst_spike:>7.2f}"
    )


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
