"""Time training steps of several configurations in turn, one step each a round, in one process.

Adam_FP32    float weights and fused AdamW               Adam_STE     the same with straight-through ternary weights
Adam_BF16    the same in bfloat16 autocast
TrueTernary  the momentum rule, the default              TwoTrit      the same with two trits a weight
TwoTrit_Edges  two trits in embedding and head           SignSGD_Old, Correlation  the other two rules, groups of 32

step_ms: forward, backward and update. update_ms: the part inside the update, which TrueTernary runs during backward,
matrix by matrix, and AdamW after it; on a GPU it is not measured separately. --compute selects the matmuls of ternary
rules with one scale a row (bf16: float matmuls with bfloat16 activations); all others use float matmuls. Peak memory is
measured in a separate process per row; on a GPU it is that of the device before the other rows are built.

examples:
  python scripts/bench_train.py --preset arb-tiny --batch 2 --ctx 32 --configs Adam_FP32,TrueTernary --steps 3
  python scripts/bench_train.py --preset arb-14m --batch 8 --ctx 256 --steps 20 --json train.json
  python scripts/bench_train.py --configs TrueTernary,TwoTrit --compute int8 --threads 1 --steps 10
  python scripts/bench_train.py --preset 100m --device cuda --compute int8,bf16 --configs Adam_BF16,TrueTernary
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from configuration_arb import PRESETS
from modeling_arb import ArbForCausalLM
from training_arb.bench.bench_report import report
from training_arb.bench.bench_shapes import SHAPES, shape_config
from training_arb.bench.measurement import MILLISECONDS, describe_environment, interleaved, set_threads
from training_arb.bench.quality_benchmark import ADAM_CONFIGS, CONFIGS, GROUP_SIZES, float_baseline, state_fields
from training_arb.cli.command_line import check_known, check_least, run, script_parser
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.common.device_names import checked_device
from training_arb.memory.live_memory import peak_device_mb, peak_memory_mb, reset_device_peak, reset_peak_memory
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.optim.integer_rules import TableRule, UpdateRule

COMPUTES = ("int8", "float", "bf16")
PEAK_STEPS = 4  # AdamW's state is there from the second on
COLUMNS = {
    "config": "",
    "compute": "",
    "step_ms_p20": ".1f",
    "step_ms_p50": ".1f",
    "step_ms_p80": ".1f",
    "update_ms_p50": ".2f",
    "update_share": ".3f",
    "bytes_per_s": ".0f",
    "peak_mem_mb": ".0f",
    "start_mem_mb": ".0f",
}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", default="arb-14m", help=f"shape: {', '.join([*PRESETS, *SHAPES])}")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--batch", type=int, default=8, help="windows per step")
    add("--ctx", type=int, default=256, help="bytes per window")
    add("--configs", default="Adam_FP32,Adam_STE,TrueTernary", help=f"comma-separated, of {', '.join(CONFIGS)}")
    add("--steps", type=int, default=20, help="timed steps of each configuration")
    add("--compute", default="int8,float", help=f"comma-separated, of {', '.join(COMPUTES)}")
    add("--threads", type=int, help="default: torch's own choice")
    add("--seed", type=int, default=0, help="of weights and data")
    add("--json", metavar="OUT", help="write the rows here")
    add("--only-peak-memory", action="store_true", help="run one configuration briefly; print its peak, nothing else")
    return parser


@dataclass
class Trainee:
    """A configuration that is ready to step, with the time spent in its updates."""

    model: ArbForCausalLM
    optimizer: torch.optim.Optimizer
    block: torch.Tensor
    update_seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        self.update_seconds.append(0.0)
        self.model(self.block, labels=self.block).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.block.is_cuda:
            torch.cuda.synchronize(self.block.device)

    def timed(self, update: Callable) -> Callable:
        """`update`, with its time added to that of the current step."""

        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = update(*args, **kwargs)
            self.update_seconds[-1] += time.perf_counter() - started
            return result

        return wrapper


class TimedRule:
    """An update rule whose updates are timed, those of tables' rows among them."""

    def __init__(self, rule: UpdateRule | TableRule, timed: Callable[[Callable], Callable]):
        for name in ("update", "update_rows"):
            if hasattr(rule, name):
                setattr(self, name, timed(getattr(rule, name)))


def build(name: str, compute: str, args: argparse.Namespace) -> Trainee:
    torch.manual_seed(args.seed)
    device, dtype = torch.device(args.device), "bfloat16" if compute == "bf16" else "float32"
    compute = "float" if compute == "bf16" else compute
    config = shape_config(args.preset, **state_fields(name), compute=compute, dtype=dtype)
    block = torch.randint(0, 256, (args.batch, args.ctx), generator=torch.Generator().manual_seed(args.seed)).to(device)
    if name in ADAM_CONFIGS:
        model = float_baseline(name, config).to(device)
        trainee = Trainee(model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True), block)
        trainee.optimizer.step = trainee.timed(trainee.optimizer.step)
    else:
        model = ArbForCausalLM(config).to(device)
        optimizer: Any = IntegerOptimizer(model, seed=args.seed)
        trainee = Trainee(model, optimizer, block)
        optimizer.rule = TimedRule(optimizer.rule, trainee.timed)
        optimizer.table_rules = {key: TimedRule(rule, trainee.timed) for key, rule in optimizer.table_rules.items()}
    return trainee


def main() -> None:
    args = build_parser().parse_args()
    keep_freed_memory()
    runs = parse_runs(args)
    set_threads(args.threads)
    if args.only_peak_memory:
        print(json.dumps(peak_memory(*runs[0], args)))
        return

    on_gpu = args.device != "cpu"
    peaks = [device_peak(name, compute, args) for name, compute in runs] if on_gpu else []
    trainees = {f"{name} {compute}": build(name, compute, args) for name, compute in runs}
    jobs = {label: trainee.step for label, trainee in trainees.items()}
    timings = interleaved(jobs, args.steps, label=f"{args.preset}, {args.batch} x {args.ctx} bytes")
    rows = []
    for (name, compute), (label, trainee) in zip(runs, trainees.items(), strict=True):
        timing, update = timings[label], statistics.median(trainee.update_seconds[-args.steps :])
        rows.append(
            {
                "config": name,
                "compute": compute,
                **timing.row("step_ms", MILLISECONDS),
                "update_ms_p50": None if on_gpu else update * MILLISECONDS,
                "update_share": None if on_gpu else update / timing.p50,
                "bytes_per_s": args.batch * args.ctx / timing.p50,
            }
        )
    weights = next(iter(trainees.values())).model.num_parameters()
    # so that the processes to come have the memory
    trainees.clear()
    jobs.clear()
    for i, row in enumerate(tqdm(rows, desc="peak memory", leave=False)):
        row |= peaks[i] if on_gpu else peak_memory_apart(row["config"], row["compute"], args)
    settings = {key: getattr(args, key) for key in ("preset", "batch", "ctx", "steps", "seed")}
    report({"rows": rows, **settings, "weights": weights, "env": describe_environment(args.device)}, COLUMNS, args.json)


def parse_runs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of configuration and compute mode, without duplicates."""
    check_least(args, {"batch": 1, "ctx": 8, "steps": 1})
    names, computes = args.configs.split(","), args.compute.split(",")
    check_known("configs", names, CONFIGS)
    check_known("compute", computes, COMPUTES)
    checked_device(args.device)
    longest = shape_config(args.preset).max_position_embeddings
    if args.ctx > longest:
        raise ValueError(f"ctx={args.ctx} is more than the {longest} positions of preset={args.preset!r}")
    runs = []
    for name in names:
        chooses = name not in ADAM_CONFIGS and not GROUP_SIZES.get(name, 0)
        runs += [(name, compute) for compute in (computes if chooses else ["float"])]
    return list(dict.fromkeys(runs))


def peak_memory(name: str, compute: str, args: argparse.Namespace) -> dict[str, float]:
    """Resident memory of this process in MB: before the model is built, and at most."""
    reset_peak_memory()
    before = peak_memory_mb()
    trainee = build(name, compute, args)
    for _ in range(PEAK_STEPS):
        trainee.step()
    return {"peak_mem_mb": peak_memory_mb(), "start_mem_mb": before}


def device_peak(name: str, compute: str, args: argparse.Namespace) -> dict[str, float]:
    """Memory of the device in MB: before the model is built, and at most."""
    device = torch.device(args.device)
    reset_device_peak(device)
    before = peak_device_mb(device)
    trainee = build(name, compute, args)
    for _ in range(PEAK_STEPS):
        trainee.step()
    return {"peak_mem_mb": peak_device_mb(device), "start_mem_mb": before}


def peak_memory_apart(name: str, compute: str, args: argparse.Namespace) -> dict[str, float]:
    """`peak_memory` in a separate process."""
    command = [sys.executable, __file__, "--only-peak-memory", "--configs", name, "--compute", compute]
    for option in ("preset", "batch", "ctx", "seed"):
        command += [f"--{option}", str(getattr(args, option))]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: peak memory was not measured: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run(main)
