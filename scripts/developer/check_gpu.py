"""Check kernels, training, speed and memory on a GPU. One card, under eight minutes.

Nothing needs to be installed beyond Python, torch, triton and transformers: run it from a checkout. Every stage is a
separate process with a time limit. A stage that fails or hangs is reported, and the next one starts. The JSON is
written after each stage, so an interrupted run keeps the results so far. Exit code 2 without a GPU, 1 when a stage
failed.

examples:
  make gpu
  python scripts/developer/check_gpu.py --json gpu.json
  python scripts/developer/check_gpu.py --only kernels,training-arb-tiny
  python scripts/developer/check_gpu.py --device cpu --tiny --only kernels
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = {"arb_kernels": "kernels", "arb_scripts": "scripts"}  # import names that are not a folder's
TOTAL_SECONDS = 470
LEAST_SECONDS = 10  # with less left, a stage is not started
MEGABYTE, GIGABYTE = 2**20, 1e9
PASSED, FAILED, HUNG = "passed", "failed", "hung"
TOO_LARGE, NO_TIME, LEFT_OUT = "does not fit", "no time left", "left out"
TRAININGS: dict[str, tuple[str, dict, int]] = {  # by stage: preset, its changes, context
    "training-arb-tiny": ("arb-tiny", {}, 64),
    "training-two-trits": ("arb-tiny", {"trits_per_weight": 2}, 64),
    "training-arb-tiny-full": ("arb-tiny-full", {}, 64),
    "training-arb-small": ("arb-small", {}, 128),
}
STATE_LIMITS_GB = {"correlation": 2.0, "momentum": 4.2}  # of the device, for arb-3b


@dataclass(frozen=True)
class Stage:
    """A script with its arguments, its time limit in seconds, and a summary of its JSON.

    summarise: JSON -> whether it passed, and one line of text.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    summarise: Callable[[dict], tuple[bool, str]]


def said_by_itself(result: dict) -> tuple[bool, str]:
    return result["passed"], result["summary"]


def training_speed(result: dict) -> tuple[bool, str]:
    rows = [f"{row['config']} {row['compute']} {row['step_ms_p50']:.1f} ms" for row in result["rows"]]
    return True, ", ".join(rows)


def generation_speed(result: dict) -> tuple[bool, str]:
    rows = result["rows"]
    return True, ", ".join(f"{r['preset']} {r['model']} x{r['batch']} {r['tokens_per_s']:.0f}/s" for r in rows)


def memory_of(rule: str, limited: bool) -> Callable[[dict], tuple[bool, str]]:
    def summarise(result: dict) -> tuple[bool, str]:
        limit, used = STATE_LIMITS_GB[rule], result["peak_device_mb"] * MEGABYTE / GIGABYTE
        good = not limited or used <= limit
        wanted = f" of {limit} GB" if limited else " GB"
        return good, f"peak {used:.2f}{wanted}, {result['warm_ms']:.0f} ms a step, loss {result['loss'][-1]:.3f}"

    return summarise


def stages(device: str, tiny: bool) -> list[Stage]:
    """All stages, the most important first. `tiny`: sizes that take seconds on a CPU, without time limits."""
    small, large, huge = ("arb-tiny",) * 3 if tiny else ("arb-14m", "100m", "arb-3b")
    on = ("--device", device)

    def own(name: str, seconds: float) -> Stage:
        size = ("--tiny",) if tiny else ()
        return Stage(name, seconds, ("scripts/developer/check_gpu.py", "--stage", name, *on, *size), said_by_itself)

    def speed(name: str, preset: str, ctx: int) -> Stage:
        size = ("--batch", "8", "--ctx", str(ctx), "--configs", "Adam_FP32,Adam_BF16,TrueTernary")
        if tiny:
            size = ("--batch", "1", "--ctx", "16", "--steps", "1", "--configs", "TrueTernary")
        computes = ("--compute", "bf16" if tiny else "int8,float,bf16")
        command = ("scripts/bench_train.py", "--preset", preset, *on, *size, *computes)
        return Stage(f"speed-{name}", 60, command, training_speed)

    def memory(rule: str, ctx: int) -> Stage:
        size = ("--ctx", "4", "--steps", "1") if tiny else ("--ctx", str(ctx), "--steps", "3")
        command = ("scripts/smoke.py", "--preset", huge, *on, "--batch", "1", *size)
        limited = ctx == 4 and not tiny
        rows = memory_of(rule, limited)
        return Stage(f"arb-3b-{rule}-{ctx}", 50, (*command, "--backward", "--update-rule", rule), rows)

    length = ("--new-bytes", "2", "--repeats", "1", "--limit-mb", "1") if tiny else ("--repeats", "3")
    texts = ("--batch", "1,2" if tiny else "1,32", "--models", "ternary,bf16", *length)
    shapes = ",".join(dict.fromkeys((small, large)))
    generation = ("scripts/bench_generate.py", "--preset", shapes, *on, *texts)
    planned = [
        own("environment", 45),
        own("kernels", 140),
        own("training-arb-tiny", 45),
        own("training-two-trits", 45),
        own("training-arb-tiny-full", 60),
        own("training-arb-small", 60),
        speed("arb-14m", small, 256),
        memory("correlation", 4),
        memory("momentum", 4),
        Stage("generation", 70, generation, generation_speed),
        speed("100m", large, 512),
        memory("correlation", 256),
        memory("momentum", 256),
    ]
    return [replace(stage, seconds=TOTAL_SECONDS) for stage in planned] if tiny else planned


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cuda:N; cpu, with --tiny, tries the stages themselves")
    add("--only", help="comma-separated stages; default: all")
    add("--json", metavar="OUT", help="write the result here; default: benchmarks/gpu_<card>.json")
    add("--seconds", type=float, default=TOTAL_SECONDS, help="for all stages together")
    add("--tiny", action="store_true", help="the smallest sizes, to try the stages")
    add("--stage", help=argparse.SUPPRESS)  # run this one here, and write what it found
    return parser


def main() -> int:
    args = build_parser().parse_args()
    sys.path.insert(0, str(ROOT))  # this script runs where the packages are not installed
    if args.stage:
        return run_stage(args)
    planned = stages(args.device, args.tiny)
    wanted = [stage.name for stage in planned] if args.only is None else args.only.split(",")
    for name in wanted:
        if name not in [stage.name for stage in planned]:
            raise ValueError(f"only={name!r} is not one of {', '.join(stage.name for stage in planned)}")
    with package_links() as environment:
        return check(args, planned, wanted, environment)


@contextmanager
def package_links() -> Iterator[dict[str, str]]:
    """An environment in which Python finds the checkout's packages. Temporary files are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="arb_gpu_") as folder:
        for name, source in LINKED.items():
            (Path(folder) / name).symlink_to(ROOT / source, target_is_directory=True)
        paths = [str(ROOT), folder, os.environ.get("PYTHONPATH")]
        yield {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONPYCACHEPREFIX": str(Path(folder) / "pycache"),
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            # threads that wait for each other's share of the CPU reference must not spin
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
            "ARB_SCRATCH": folder,
        }


def check(args: argparse.Namespace, planned: list[Stage], wanted: list[str], environment: dict[str, str]) -> int:
    """Run the wanted stages within the time there is; write the JSON after each. Returns the exit code."""
    started = time.monotonic()
    first = run_apart(planned[0], min(planned[0].seconds, args.seconds), environment)
    if first["status"] != PASSED:
        said = first["last_lines"][-1] if first["last_lines"] else "torch did not start"
        raise ValueError(said.removeprefix("error: "))
    card = first["result"]
    out = Path(args.json or ROOT / "benchmarks" / f"gpu_{file_name(card['card'])}.json")
    rows = [first, *({"stage": stage.name, "status": LEFT_OUT, "summary": ""} for stage in planned[1:])]
    report = {"card": card["card"], "date": date.today().isoformat(), "stages": rows, "passed": False, "seconds": 0.0}
    for i, stage in enumerate(planned):
        if i and stage.name in wanted:
            left = args.seconds - (time.monotonic() - started)
            if left < LEAST_SECONDS:
                rows[i]["status"] = NO_TIME
            else:
                rows[i] = run_apart(stage, min(stage.seconds, left), environment)
        ran = [row for row in rows if row["status"] != LEFT_OUT]
        report["passed"] = all(row["status"] in (PASSED, TOO_LARGE) for row in ran)
        report["seconds"] = round(time.monotonic() - started, 1)
        write(out, report)
        print(f"{stage.name:<24}{rows[i]['status']:<14}{rows[i]['summary']}", flush=True)
    print_table(report, out)
    return 0 if report["passed"] else 1


def run_apart(stage: Stage, seconds: float, environment: dict[str, str]) -> dict:
    """One stage in its own process: {"stage", "status", "summary", "seconds", "command", "last_lines", "result"}."""
    from training_arb.device_check.bounded_process import run_bounded

    out = Path(environment["ARB_SCRATCH"]) / f"{stage.name}.json"
    script, *options = stage.command
    command = [sys.executable, str(ROOT / script), *options, "--json", str(out)]
    ended = run_bounded(command, seconds, {**environment, "ARB_STAGE_SECONDS": f"{seconds:.0f}"})
    row = {"stage": stage.name, "status": PASSED, "summary": "", "seconds": round(ended.seconds, 1)}
    row |= {"command": " ".join(stage.command), "last_lines": [], "result": None}
    if out.exists():
        row["result"] = json.loads(out.read_text())
        good, row["summary"] = stage.summarise(row["result"])
        row["status"] = PASSED if good else FAILED
    if ended.hung:
        row["status"], row["summary"] = HUNG, f"killed after {seconds:.0f} s; {row['summary']}".removesuffix("; ")
    elif ended.code and "out of memory" in " ".join(ended.last_lines):
        row["status"], row["summary"] = TOO_LARGE, ended.last_lines[-1]
    elif ended.code:
        said = row["summary"] or (ended.last_lines[-1] if ended.last_lines else f"exit code {ended.code}")
        row["status"], row["summary"] = FAILED, said
    elif row["result"] is None:
        row["status"], row["summary"] = FAILED, "no result was written"
    if row["status"] != PASSED:
        row["last_lines"] = ended.last_lines
    return row


def print_table(report: dict, out: Path) -> None:
    print(f"\n{report['card']}: {'all good' if report['passed'] else 'not all good'}, {report['seconds']:.0f} s\n")
    print(f"{'stage':<24}{'status':<14}{'seconds':>8}  what")
    for row in report["stages"]:
        print(f"{row['stage']:<24}{row['status']:<14}{row.get('seconds', 0):>8.1f}  {row['summary'][:160]}")
    print(f"\nwritten: {out}", flush=True)


def file_name(card: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia_h100_80gb_hbm3'."""
    return re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")


def write(path: Path, value: dict) -> None:
    from training_arb.common.atomic_files import write_json

    write_json(path, value)


def run_stage(args: argparse.Namespace) -> int:
    """Run one stage in this process and write its result. Returns the exit code."""
    result = STAGES[args.stage](args)
    if args.json:
        write(Path(args.json), result)
    print(result["summary"])
    return 0 if result["passed"] else 1


def environment_stage(args: argparse.Namespace) -> dict:
    """Raises ValueError where the device is not found, or is not one that the kernels support."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"torch is not installed for {sys.executable}: {error}") from error
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={args.device!r}: torch {torch.__version__} does not find a GPU")
    from training_arb.device_check.device_environment import describe_device

    return describe_device(args.device)


def kernels_stage(args: argparse.Namespace) -> dict:
    from training_arb.device_check.kernel_check import check_kernels, kernel_names, kernel_test_files

    files, kernels, seeds = kernel_test_files(), kernel_names(), 3
    if args.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        files = [path for path in files if "matvec" in str(path)]
        kernels = [name for name in kernels if "matvec" in name]
        seeds = 1
    seconds = float(os.environ.get("ARB_STAGE_SECONDS", "140")) - 15  # to come to an end before the bound
    return check_kernels(files, kernels, seeds, seconds, lambda result: write(Path(args.json), result))


def training_stage(args: argparse.Namespace) -> dict:
    import torch

    from configuration_arb import preset_config
    from training_arb.device_check.training_comparison import compare_training

    preset, changes, ctx = TRAININGS[args.stage]
    steps, batch, ctx = (2, 1, 16) if args.tiny else (30, 4, ctx)
    found = compare_training(preset_config(preset, **changes), torch.device(args.device), steps, batch, ctx)
    return {**found, "preset": preset, **changes}


STAGES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "environment": environment_stage,
    "kernels": kernels_stage,
    **dict.fromkeys(TRAININGS, training_stage),
}


def run(main: Callable[[], int]) -> None:
    """Run main and exit; bad input is one line and code 2, as in the other scripts, but without importing torch."""
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
