"""Compare ternary training on integer state with AdamW, on the same shape, data, order and steps.

Adam_FP32    float weights, AdamW: the ceiling           12 bytes of state a weight (weight and two moments)
Adam_BF16    the same in bfloat16 autocast, on request      12
Adam_STE     BitNet-style: absmean ternary, straight-through, float latents, AdamW          12
SignSGD_Old  sign votes flip trits (`flip`, groups of 32)                                   1.3
TrueTernary  int4 residual and int4 momentum (`momentum`), one trit a weight                1.2
TwoTrit      the same with two trits a weight, nine levels                                  1.4
TwoTrit_Edges  two trits in embedding and head, one in between                              1.25
Correlation  fixed trits, scales that follow correlations (`correlation`, groups of 32)     0.5

On request, Adam_STE_TwoTrit and Adam_STE_TwoTrit_Edges round AdamW's weights to the same levels. Learning rates are
tuned in the same run, and the best is reported: --adam-rates for AdamW, --ternary-rates for TrueTernary and TwoTrit.
The two other rules have no learning rate. Losses are held-out nats per byte.

examples:
  python scripts/benchmark_true_ternary.py --configs TrueTernary --preset arb-tiny --steps 50 --ctx 64
  python scripts/benchmark_true_ternary.py --steps 600 --batch 16 --ctx 128 --data corpus.txt --json out.json
  python scripts/benchmark_true_ternary.py --configs TwoTrit --json out.json --reuse-base
  python scripts/benchmark_true_ternary.py --configs TrueTernary --preset arb-tiny --batch 8 --micro-batches 8
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import json
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from arb_kernels.backend import BACKENDS, use_backend
from configuration_arb import COMPUTE, PRESETS
from training_arb.bench.measurement import describe_environment
from training_arb.bench.quality_benchmark import (
    ADAM_CONFIGS,
    CONFIGS,
    DEFAULT_CONFIGS,
    MOMENTUM_CONFIGS,
    BenchmarkResult,
    BenchmarkSettings,
    build,
    train,
    tuned,
)
from training_arb.cli.command_line import check_known, check_least, run, script_parser
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.common.text_table import format_table
from training_arb.data.byte_data import load_corpus
from training_arb.report.training_plots import plot_comparison


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--configs", default=",".join(DEFAULT_CONFIGS), help=f"comma-separated, of {', '.join(CONFIGS)}")
    add("--steps", type=int, default=600, help="training steps")
    add("--batch", type=int, default=16, help="windows per step")
    add("--micro-batches", type=int, default=1, help="equal parts of a step's windows, one backward each")
    add("--ctx", type=int, default=128, help="bytes per window")
    add("--data", nargs="+", help="files, folders, globs; default: the running Python's standard library")
    add("--seed", type=int, default=0, help="seed of initial weights, data order and rounding")
    add("--preset", default="arb-bench", help=f"shape: {', '.join(PRESETS)}")
    add("--adam-rates", default="3e-3,6e-3,1e-2", help="AdamW's learning rates to try")
    add(
        "--ternary-rates",
        default="0.035,0.05",
        help="learning rates of the momentum rule to try, in cells per step and trit",
    )
    add("--compute", choices=COMPUTE, default="auto", help="matmuls of the momentum rule")
    add(
        "--update-backend",
        choices=["auto", *BACKENDS],
        default="auto",
        help="kernels; all give the same bits",
    )
    add("--scale-update-interval", type=int, default=1, help="flip: vote on scales every so many steps; 0: never")
    add("--accum-threshold", type=int, default=32, help="flip: votes after which a trit moves")
    add("--print-every", type=int, default=100, help="steps between held-out losses of the curve")
    add(
        "--reuse-base",
        action="store_true",
        help="keep the rows of an earlier --json OUT that --configs does not name",
    )
    add("--json", metavar="OUT", help="write the results here, and a plot beside it")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    keep_freed_memory()
    with nullcontext() if args.update_backend == "auto" else use_backend(args.update_backend):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Train every configuration, print the table, write JSON and plot."""
    names = [name for name in args.configs.split(",") if name]
    check_known("configs", names, CONFIGS)
    check_least(args, {"steps": 1, "batch": 1, "ctx": 8, "print_every": 1})
    if args.micro_batches < 1 or args.batch % args.micro_batches:
        raise ValueError(f"micro_batches={args.micro_batches} must divide batch={args.batch}")
    rates = dict.fromkeys(MOMENTUM_CONFIGS, parse_rates(args, "ternary_rates"))
    rates |= dict.fromkeys(ADAM_CONFIGS, parse_rates(args, "adam_rates"))
    settings = BenchmarkSettings(**{field.name: getattr(args, field.name) for field in fields(BenchmarkSettings)})
    data = " ".join(args.data or ["Python's standard library"])
    train_ids, held_out = load_corpus(args.data, args.ctx)
    earlier = reusable_rows(args, settings, data) if args.reuse_base else {}
    for name in names:  # so that a shape that cannot be built is refused before the first hour of training
        for rate in rates.get(name, [NO_RATE]):
            build(name, settings, rate)

    results = {name: row for name, row in earlier.items() if name not in names}
    for name in names:
        results[name] = tuned(
            rates.get(name, [NO_RATE]), lambda rate, name=name: train(name, settings, rate, train_ids, held_out)
        )
        print(table({name: results[name]}), flush=True)
        if args.json:
            save(args, settings, data, results)
    print(f"\n{data}: {args.steps} steps of {args.batch} x {args.ctx} bytes, {args.preset}, seed {args.seed}\n")
    print(table(results))


def save(args: argparse.Namespace, settings: BenchmarkSettings, data: str, results: dict[str, BenchmarkResult]) -> None:
    """Write the rows so far as JSON, and their curves as a picture beside it."""
    result = {
        "configs": {name: row.to_dict() for name, row in results.items()},
        "data": data,
        "steps": args.steps,
        "seed": args.seed,
        "settings": vars(settings),
        "env": describe_environment(),
    }
    write_json(args.json, result)
    title = f"{Path(data).name}, {args.preset}, {args.batch} x {args.ctx} bytes a step"
    plot_comparison({name: row.curve for name, row in results.items()}, Path(args.json).with_suffix(".png"), title)


NO_RATE = 0.0  # votes and correlations have thresholds instead
COLUMNS = {
    "configuration": "",
    "held-out": ".4f",
    "bits/byte": ".4f",
    "bytes/weight": ".3f",
    "at 3B, GB": ".2f",
    "step, ms": ".1f",
    "peak, MB": ".0f",
    "rate": "g",
}


def parse_rates(args: argparse.Namespace, option: str) -> list[float]:
    try:
        return [float(rate) for rate in getattr(args, option).split(",")]
    except ValueError as error:
        raise ValueError(f"{option}={getattr(args, option)!r} must be numbers separated by commas") from error


def table(results: dict[str, BenchmarkResult]) -> str:
    """A line for each configuration."""
    rows = [
        {
            "configuration": name,
            "held-out": result.val_loss,
            "bits/byte": result.val_bpb,
            "bytes/weight": result.state_bytes_per_weight,
            "at 3B, GB": result.state_bytes_at_3b / 1e9,
            "step, ms": result.step_ms_median,
            "peak, MB": result.peak_mem_mb,
            "rate": result.learning_rate,
        }
        for name, result in results.items()
    ]
    return format_table(rows, COLUMNS)


def reusable_rows(args: argparse.Namespace, settings: BenchmarkSettings, data: str) -> dict[str, BenchmarkResult]:
    """The rows of an earlier run with the same settings and data."""
    if not args.json or not Path(args.json).is_file():
        raise ValueError(f"reuse_base: json={args.json!r} is not an earlier result to take rows from")
    earlier = json.loads(Path(args.json).read_text(encoding="utf-8"))
    wanted = {**vars(settings), "data": data}
    del wanted["compute"]  # the momentum rule's alone
    for key, value in wanted.items():
        found = earlier["data"] if key == "data" else {"micro_batches": 1, **earlier["settings"]}.get(key)
        if found != value:
            raise ValueError(f"reuse_base: {args.json} was measured with {key}={found!r}, not {value!r}")
    return {name: BenchmarkResult(**row) for name, row in earlier["configs"].items()}


if __name__ == "__main__":
    run(main)
