"""Time a training step alone and beside other trainings on the same cores, for several settings of how threads wait.

libgomp's threads spin while they wait. Alone that is fastest; with more threads than cores they spin through each
other's time. GOMP_SPINCOUNT and OMP_WAIT_POLICY control this and are read once, so every figure comes from a separate
process.

examples:
  python scripts/developer/bench_neighbours.py --preset arb-tiny --batch 2 --ctx 32 --steps 3 --rounds 1
  python scripts/developer/bench_neighbours.py --preset arb-small --runs 2 --json neighbours.json
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401
from training_arb.common.thread_waiting import ASKED_FOR, ROUNDS

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from configuration_arb import PRESETS
from training_arb.bench.bench_report import report
from training_arb.bench.measurement import describe_environment
from training_arb.cli.command_line import check_least, run, script_parser

SETTINGS = {
    "GOMP_SPINCOUNT=300000, libgomp's": {"GOMP_SPINCOUNT": "300000"},
    f"GOMP_SPINCOUNT={ROUNDS}, ours": {"GOMP_SPINCOUNT": ROUNDS},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
COLUMNS = {"waiting": "", "runs": "", "step_ms": ".1f", "of_alone": ".2f"}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="arb-small")
    add("--batch", type=int, default=8, help="blocks a step")
    add("--ctx", type=int, default=256, help="bytes a block")
    add("--steps", type=int, default=20, help="timed steps of each process")
    add("--runs", type=int, default=2, help="trainings at once, each with all threads")
    add("--rounds", type=int, default=3, help="of all settings, one after the other")
    add("--json", help="where to write the result")
    return parser


def step_ms(args: argparse.Namespace, setting: dict[str, str], runs: int) -> float:
    """The median step of the slowest of `runs` simultaneous processes, in milliseconds. Raises ValueError if one
    fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ASKED_FOR}
    shape = ["--preset", args.preset, "--batch", str(args.batch), "--ctx", str(args.ctx), "--steps", str(args.steps)]
    script = Path(__file__).resolve().parents[1] / "bench_train.py"
    with tempfile.TemporaryDirectory() as folder:
        targets = [Path(folder) / f"{run}.json" for run in range(runs)]
        command = [sys.executable, str(script), *shape, "--configs", "TrueTernary", "--compute", "int8", "--json"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment | setting}
        processes = [subprocess.Popen([*command, str(target)], text=True, **silent) for target in targets]
        for process in processes:
            _, error = process.communicate()
            if process.returncode:
                raise ValueError(f"{script.name} failed: {error.strip().splitlines()[-1]}")
        return max(json.loads(target.read_text())["rows"][0]["step_ms_p50"] for target in targets)


def main() -> None:
    args = build_parser().parse_args()
    check_least(args, {"batch": 1, "ctx": 8, "steps": 1, "runs": 2, "rounds": 1})
    jobs = [(waiting, runs) for waiting in SETTINGS for runs in (1, args.runs)]
    found: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
    for _ in range(args.rounds):
        for waiting, runs in tqdm(jobs, desc="steps", leave=False):
            found[waiting, runs].append(step_ms(args, SETTINGS[waiting], runs))
    rows = [
        {"waiting": waiting, "runs": runs, "step_ms": statistics.median(found[waiting, runs])} for waiting, runs in jobs
    ]
    for row in rows:
        row["of_alone"] = row["step_ms"] / statistics.median(found[row["waiting"], 1])
    settings = {name: getattr(args, name) for name in ("preset", "batch", "ctx", "steps", "runs", "rounds")}
    report({"rows": rows, "settings": settings, "env": describe_environment()}, COLUMNS, args.json)


if __name__ == "__main__":
    run(main)
