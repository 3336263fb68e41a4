"""Time several processes on one machine: N ranks of one thread each against one process with N threads.

The work is the same: --batch windows a step, shared among the ranks. Ranks are gloo replicas that average each layer's
gradient; `overlapped` sends while backward continues with the next layer, as in pretrain.py; `waiting` waits for every
average. All three run in turn, --rounds times.

examples:
  python scripts/developer/bench_ranks.py --preset arb-tiny --batch 2 --ctx 32 --rounds 1 --steps 2
  python scripts/developer/bench_ranks.py --preset arb-14m --batch 8 --ctx 256 --json ranks.json
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tqdm.auto import tqdm

from configuration_arb import PRESETS, preset_config
from modeling_arb import ArbForCausalLM
from training_arb.bench.bench_report import report
from training_arb.bench.measurement import MILLISECONDS, Timing, describe_environment
from training_arb.cli.command_line import check_least, run, script_parser
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.memory.state_audit import state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer
from training_arb.ranks.rank_exchange import AveragedGradient

ONE, OVERLAPPED, WAITING = "one process", "overlapped", "waiting"
COLUMNS = {"config": "", "ranks": "", "threads": "", "step_ms_p20": ".1f", "step_ms_p50": ".1f", "step_ms_p80": ".1f"}
COLUMNS |= {"bytes_per_s": ".0f", "of_one_process": ".3f"}


class WaitingGradient(AveragedGradient):
    """An average that backward waits for."""

    def __init__(self, dW: torch.Tensor, owner: int):
        super().__init__(dW, owner)
        self.wait()


def train(rank: int, config: str, args: argparse.Namespace, folder: str, answers) -> None:
    """One rank's timed steps: puts (rank, seconds per step, state hash) in the queue."""
    ranks = 1 if config == ONE else args.ranks
    torch.set_num_threads(args.ranks // ranks)
    keep_freed_memory()
    if ranks > 1:
        path = str(Path(folder) / "store")
        store = dist.FileStore(path, ranks)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if config == WAITING:
        import training_arb.ranks.gradient_exchange as exchange_module

        exchange_module.AveragedGradient = WaitingGradient
    torch.manual_seed(args.seed)
    model = ArbForCausalLM(preset_config(args.preset))
    optimizer = IntegerOptimizer(model, seed=args.seed, rank_check_steps=0)
    generator = torch.Generator().manual_seed(args.seed)
    block = torch.randint(0, 256, (args.batch, args.ctx), generator=generator).chunk(ranks)[rank]
    seconds = []
    for _ in range(args.steps + 2):
        started = time.perf_counter()
        model(block, labels=block).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    answers.put((rank, seconds[2:], state_hash(model)))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def time_config(config: str, args: argparse.Namespace) -> list[float]:
    """Rank 0's seconds per step, from fresh processes. Raises RuntimeError when ranks end with different states."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = 1 if config == ONE else args.ranks
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=train, args=(r, config, args, folder, answers)) for r in range(ranks)]
        for process in processes:
            process.start()
        found = sorted(answers.get() for _ in processes)
        for process in processes:
            process.join()
    if len({digest for _, _, digest in found}) > 1:
        raise RuntimeError(f"{config}: the ranks end with different states")
    return found[0][1]


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", default="arb-14m", help=f"shape: {', '.join(PRESETS)}")
    add("--ranks", type=int, default=2, help="processes; also the threads of the one process")
    add("--batch", type=int, default=8, help="windows per step over all ranks")
    add("--ctx", type=int, default=256, help="bytes per window")
    add("--rounds", type=int, default=3, help="times that each is started anew")
    add("--steps", type=int, default=8, help="timed steps per start, after two that are not")
    add("--seed", type=int, default=0, help="of weights and bytes")
    add("--json", metavar="OUT", help="write the rows here")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    check_least(args, {"ranks": 2, "batch": args.ranks, "ctx": 8, "rounds": 1, "steps": 1})
    if args.batch % args.ranks:
        raise ValueError(f"batch={args.batch} must be a multiple of ranks={args.ranks}: all do the same work")
    preset_config(args.preset)
    seconds: dict[str, list[float]] = {ONE: [], OVERLAPPED: [], WAITING: []}
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False):
        for config, samples in seconds.items():
            samples += time_config(config, args)
    rows = []
    for config, samples in seconds.items():
        timing, ranks = Timing.of(samples), 1 if config == ONE else args.ranks
        rows.append(
            {
                "config": config,
                "ranks": ranks,
                "threads": args.ranks // ranks,
                **timing.row("step_ms", MILLISECONDS),
                "bytes_per_s": args.batch * args.ctx / timing.p50,
                "of_one_process": Timing.of(seconds[ONE]).p50 / timing.p50,
            }
        )
    settings = {key: getattr(args, key) for key in ("preset", "batch", "ctx", "rounds", "steps", "seed")}
    report({"rows": rows, **settings, "env": describe_environment()}, COLUMNS, args.json)


if __name__ == "__main__":
    run(main)
