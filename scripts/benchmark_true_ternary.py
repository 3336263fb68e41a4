"""Compare ternary training on integer state with AdamW, on the same shape, data, order and steps.

Adam_FP32    float weights, AdamW: the ceiling           12 bytes of state a weight (weight and two moments)
Adam_BF16    the same in bfloat16 autocast, on request      12
Adam_STE     BitNet-style: absmean ternary, straight-through, float latents, AdamW          12
SignSGD_Old  the seeds' rule: sign votes flip trits (`flip`, groups of 32)                  1.3
TrueTernary  int4 residual and int4 momentum (`momentum`), the default                      1.2
Correlation  fixed trits, scales that follow correlations (`correlation`, groups of 32)     0.5

Learning rates are tuned in the same run and the best is reported: AdamW's over --adam-rates, TrueTernary's over
--ternary-rates; the two other rules have none. Losses are held-out nats per byte.

examples:
  python scripts/benchmark_true_ternary.py --configs TrueTernary --preset arb-tiny --steps 50 --ctx 64
  python scripts/benchmark_true_ternary.py --steps 600 --batch 16 --ctx 128 --data corpus.txt --json out.json
  python scripts/benchmark_true_ternary.py --preset arb-14m --steps 600 --json big.json --reuse-base
  python scripts/benchmark_true_ternary.py --configs TrueTernary --preset arb-tiny --batch 8 --micro-batches 8
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import json
import os
import platform
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import transformers

from arb_kernels.backend import BACKENDS, describe_backend, use_backend
from configuration_arb import COMPUTE, PRESETS
from training_arb.bench.quality_benchmark import (
    ADAM_CONFIGS,
    CONFIGS,
    DEFAULT_CONFIGS,
    BenchmarkResult,
    BenchmarkSettings,
    build,
    train,
    tuned,
)
from training_arb.cli.command_line import HelpFormatter, run
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.byte_data import load_corpus
from training_arb.report.training_plots import plot_comparison


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
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
    add("--ternary-rates", default="0.035,0.05", help="TrueTernary's learning rates to try, in cells per step")
    add("--compute", choices=COMPUTE, default="auto", help="TrueTernary's matmuls")
    add(
        "--update-backend",
        choices=["auto", *BACKENDS],
        default="auto",
        help="kernels; all give the same bits",
    )
    add("--scale-update-interval", type=int, default=1, help="flip: vote on scales every so many steps; 0: never")
    add("--accum-threshold", type=int, default=32, help="flip: votes after which a trit moves")
    add("--print-every", type=int, default=100, help="steps between held-out losses of the curve")
    add("--reuse-base", action="store_true", help="train TrueTernary only; the rest from an earlier --json OUT")
    add("--json", metavar="OUT", help="write the results here, and a plot beside it")
    return parser.parse_args()


def main() -> None:
    args = parse()
    keep_freed_memory()
    with nullcontext() if args.update_backend == "auto" else use_backend(args.update_backend):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Train every configuration, print the table, write JSON and plot."""
    names = [name for name in args.configs.split(",") if name]
    for name in names:
        if name not in CONFIGS:
            raise ValueError(f"configs={name!r} is not one of {', '.join(CONFIGS)}")
    for field, least in (("steps", 1), ("batch", 1), ("ctx", 8), ("print_every", 1)):
        if getattr(args, field) < least:
            raise ValueError(f"{field}={getattr(args, field)} must be at least {least}")
    if args.micro_batches < 1 or args.batch % args.micro_batches:
        raise ValueError(f"micro_batches={args.micro_batches} must divide batch={args.batch}")
    rates = {"TrueTernary": parse_rates(args, "ternary_rates")}
    rates |= dict.fromkeys(ADAM_CONFIGS, parse_rates(args, "adam_rates"))
    settings = BenchmarkSettings(**{field.name: getattr(args, field.name) for field in fields(BenchmarkSettings)})
    data = " ".join(args.data or ["Python's standard library"])
    train_ids, held_out = load_corpus(args.data, args.ctx)
    reused = reusable_rows(args, settings, data) if args.reuse_base else {}
    for name in names:  # what cannot be built is refused before the first hour of training
        for rate in rates.get(name, [NO_RATE]):
            build(name, settings, rate)

    results: dict[str, BenchmarkResult] = {}
    for name in names:
        if name in reused:
            results[name] = reused[name]
        else:
            results[name] = tuned(
                rates.get(name, [NO_RATE]), lambda rate, name=name: train(name, settings, rate, train_ids, held_out)
            )
        print(row(name, results[name]), flush=True)

    print(f"\n{data}: {args.steps} steps of {args.batch} x {args.ctx} bytes, {args.preset}, seed {args.seed}\n")
    print("\n".join([HEADER, *(row(name, result) for name, result in results.items())]))
    if args.json:
        write_json(
            args.json,
            {
                "configs": {name: result.to_dict() for name, result in results.items()},
                "data": data,
                "steps": args.steps,
                "seed": args.seed,
                "settings": vars(settings),
                "env": environment(),
            },
        )
        curves = {name: result.curve for name, result in results.items()}
        title = f"{Path(data).name}, {args.preset}, {args.batch} x {args.ctx} bytes a step"
        plot_comparison(curves, Path(args.json).with_suffix(".png"), title)


NO_RATE = 0.0  # votes and correlations have thresholds instead
HEADER = (
    f"{'configuration':<14}{'held-out':>10}{'bits/byte':>11}{'bytes/weight':>14}{'at 3B, GB':>11}"
    f"{'step, ms':>10}{'peak, MB':>10}{'rate':>9}"
)


def parse_rates(args: argparse.Namespace, option: str) -> list[float]:
    try:
        return [float(rate) for rate in getattr(args, option).split(",")]
    except ValueError as error:
        raise ValueError(f"{option}={getattr(args, option)!r} must be numbers with commas between") from error


def row(name: str, result: BenchmarkResult) -> str:
    return (
        f"{name:<14}{result.val_loss:>10.4f}{result.val_bpb:>11.4f}{result.state_bytes_per_weight:>14.3f}"
        f"{result.state_bytes_at_3b / 1e9:>11.2f}{result.step_ms_median:>10.1f}{result.peak_mem_mb:>10.0f}"
        f"{result.learning_rate:>9g}"
    )


def reusable_rows(args: argparse.Namespace, settings: BenchmarkSettings, data: str) -> dict[str, BenchmarkResult]:
    """All rows but TrueTernary's of an earlier run with the same settings and data."""
    if not args.json or not Path(args.json).is_file():
        raise ValueError(f"reuse_base: json={args.json!r} is no earlier result to take rows from")
    earlier = json.loads(Path(args.json).read_text(encoding="utf-8"))
    wanted = {**vars(settings), "data": data}
    del wanted["compute"]  # TrueTernary's alone
    for key, value in wanted.items():
        found = earlier["data"] if key == "data" else {"micro_batches": 1, **earlier["settings"]}.get(key)
        if found != value:
            raise ValueError(f"reuse_base: {args.json} was measured with {key}={found!r}, not {value!r}")
    return {name: BenchmarkResult(**row) for name, row in earlier["configs"].items() if name != "TrueTernary"}


def environment() -> dict:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernels": describe_backend(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    run(main)
