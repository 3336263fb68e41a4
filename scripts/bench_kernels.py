"""Time the CPU kernels against the machine's physical limits and against their peers, all in the same rounds.

cpu_matvec    at most 8 tokens, quantised on the way, weights from DRAM; limit: DRAM bandwidth at 2 bits a weight
cpu_matmul    more tokens, int8 already; limit: the int8 dot-product instruction from registers
cpu_update    momentum_update, gradient and state from DRAM; limit: reading each of them once
cpu_quantise  quantise_tokens, activations from DRAM; limit: reading them once

Peers: torch F.linear in fp32 and bf16, torch._int_mm (on ready int8 codes), fused AdamW, and ggml's TQ1_0 and TQ2_0
where training_arb/bench/build_ggml_peer.sh has built them. An operation is one multiply or one add. Limits are medians
of the same rounds, so a fraction can exceed 1 on a noisy machine. A shape is that of the weight matrix, out x in.

examples:
  python scripts/bench_kernels.py --ops cpu_matvec --shapes 512x512 --repeats 5 --cold-mb 16
  python scripts/bench_kernels.py --shapes 4096x4096,2048x8192 --batch 1,128 --threads 2 --json kernels.json
  ARB_GGML=~/ggml-peer python scripts/bench_kernels.py --ops cpu_matvec,cpu_matmul --json kernels.json
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import gc
from pathlib import Path

import torch

from training_arb.bench.bench_report import plot_fractions, report
from training_arb.bench.bench_shapes import parse_batches
from training_arb.bench.ggml_peer import BLOCK, ENVIRONMENT, find_ggml
from training_arb.bench.kernel_contest import (
    OWN,
    Contest,
    batches_of,
    matmul_contest,
    quantise_contest,
    update_contest,
)
from training_arb.bench.measurement import (
    MICROSECONDS,
    LimitJobs,
    Limits,
    Timing,
    describe_environment,
    interleaved,
    set_threads,
)
from training_arb.cli.command_line import check_known, check_least, run, script_parser

OPS = ("cpu_matvec", "cpu_matmul", "cpu_update", "cpu_quantise")
BURST_SECONDS = 0.02
COLUMNS = {
    "op": "",
    "shape": "",
    "batch": "d",
    "threads": "d",
    "us_p20": ".1f",
    "us_p50": ".1f",
    "us_p80": ".1f",
    "gops_p50": ".1f",
    "limit_gops": ".1f",
    "fraction_of_limit": ".3f",
    "gb_per_s": ".1f",
}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--ops", default=",".join(OPS), help="comma-separated kernels")
    add("--shapes", default="4096x4096,2048x8192", help="comma-separated weight matrices, out x in")
    add("--batch", default="1,128", help="comma-separated numbers of tokens; a kernel runs at those that it supports")
    add("--threads", type=int, help="threads of all implementations; default: torch's choice")
    add("--repeats", type=int, default=30, help="rounds over all implementations")
    add(
        "--cold-mb",
        type=int,
        default=256,
        help="megabytes of operands; the bandwidth limit reads twice as much",
    )
    add("--ggml", metavar="PATH", help=f"ggml's CPU library or its folder; default: {ENVIRONMENT}")
    add("--seed", type=int, default=0, help="of the operands")
    add("--json", metavar="OUT", help="write the rows here, and a plot beside it")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    ops, shapes, batches = parse_ops(args.ops), parse_shapes(args.shapes), parse_batches(args.batch)
    check_least(args, {"repeats": 1, "cold_mb": 1})
    plan = [(op, shape, batch) for op in ops for batch in batches_of(op, batches) for shape in shapes]
    ggml = find_ggml(args.ggml)
    threads = set_threads(args.threads)
    torch.manual_seed(args.seed)
    if ggml is None:
        print(f"ggml not found: its rows are left out; give --ggml PATH or set {ENVIRONMENT}")
    elif any(shape[1] % BLOCK for shape in shapes):
        print(f"ggml's rows are left out for shapes whose columns are not a multiple of {BLOCK}")

    env, rows = describe_environment(), []
    limit_jobs = LimitJobs(2_000_000 * args.cold_mb)
    for op, shape, batch in plan:
        cold_bytes = 1e6 * args.cold_mb
        if op == "cpu_update":
            contest = update_contest(shape, cold_bytes)
        elif op == "cpu_quantise":
            contest = quantise_contest(shape, batch or 1, cold_bytes)
        else:
            contest = matmul_contest(op, shape, batch or 1, cold_bytes, threads, ggml)
        jobs = {name: competitor.job() for name, competitor in contest.competitors.items()}
        timings = interleaved({**jobs, **limit_jobs.jobs}, args.repeats, BURST_SECONDS, contest.title)
        rows += contest_rows(contest, timings, limit_jobs.limits(timings), threads)
        # its operands make room for the next one's
        del contest, jobs
        gc.collect()

    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        plot_fractions(rows, Path(args.json).with_suffix(".png"), f"{env['cpu']}, {threads} threads")
    report({"rows": rows, "repeats": args.repeats, "cold_mb": args.cold_mb, "env": env}, COLUMNS, args.json)


def contest_rows(contest: Contest, timings: dict[str, Timing], limits: Limits, threads: int) -> list[dict]:
    rows = []
    for name, competitor in contest.competitors.items():
        timing = timings[name]
        gops = competitor.operations / timing.p50 / 1e9
        limit = limits.gops(competitor.operations, contest.least_bytes)
        rows.append(
            {
                "op": contest.op if name == OWN else f"{contest.op}:{name}",
                "peer": name,
                "contest": contest.title,
                "shape": "x".join(map(str, contest.shape)),
                "batch": contest.batch,
                "threads": threads,
                **timing.row("us", MICROSECONDS),
                "gops_p50": gops,
                "limit_gops": limit,
                "fraction_of_limit": None if limit is None else gops / limit,
                "gb_per_s": competitor.bytes / timing.p50 / 1e9,
                "dram_gb_per_s": limits.dram_gb_per_s,
                "int8_gops": limits.int8_gops,
            }
        )
    return rows


def parse_ops(text: str) -> list[str]:
    ops = [op for op in text.split(",") if op]
    check_known("ops", ops or [text], OPS)
    return ops


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for shape in text.split(","):
        sizes = shape.split("x")
        if len(sizes) != 2 or not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
            raise ValueError(f"shapes={shape!r} must be OUTxIN, such as 4096x4096")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return shapes


if __name__ == "__main__":
    run(main)
