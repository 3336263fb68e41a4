"""Run a few steps of one exact shape: forward, or with --backward also backward and the update of every weight.

The first call compiles kernels for these shapes, builds tables and allocates memory. It is timed separately, before the
steps, and also warms the caches for a real run on the same machine. Bytes are random, weights are new.

live_mb_by_step: memory in use after each step, constant unless something leaks; peak_mb_by_step: highest resident
memory so far. The same number of steps runs again, untimed, to count tensors: state and saved activations by area, and
the peaks of forward, backward and update. Exit code 2 on bad input.

examples:
  python scripts/smoke.py --preset arb-tiny --ctx 16 --batch 1 --backward
  python scripts/smoke.py --preset arb-14m --ctx 256 --batch 8 --steps 5 --backward --json smoke.json
  python scripts/smoke.py --preset arb-14m --ctx 256 --batch 8 --backward --trits-per-weight 2
  python scripts/smoke.py --preset arb-14m --device cuda --ctx 256 --batch 8 --backward --update-rule flip
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import json
import statistics
import time

import torch
from tqdm.auto import tqdm

from arb_kernels.backend import describe_backend
from configuration_arb import PRESETS, ArbConfig, preset_config
from modeling_arb import ArbForCausalLM
from training_arb.bench.measurement import describe_environment
from training_arb.cli.command_line import add_trits_option, check_least, run, script_parser, trits_field
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.common.device_names import checked_device
from training_arb.memory.live_memory import live_memory_mb, peak_device_mb, peak_memory_mb, reset_device_peak
from training_arb.memory.memory_probe import describe_probes, probe_step, probe_table, state_by_area
from training_arb.memory.state_audit import audit_model
from training_arb.optim.integer_optimizer import IntegerOptimizer


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", default="arb-tiny", help=f"shape: {', '.join(PRESETS)}")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--ctx", type=int, default=64, help="bytes per window")
    add("--batch", type=int, default=2, help="windows per step")
    add("--steps", type=int, default=3, help="steps after the first call")
    add("--max-moe-iters", type=int, help="iterations of the expert graph's loop, for presets that have one")
    add("--backward", action="store_true", help="also run backward and update the weights")
    add("--update-rule", default="momentum", help="momentum, flip or correlation")
    add_trits_option(parser)
    add("--seed", type=int, default=0, help="of weights and bytes")
    add("--json", metavar="OUT", help="write the result here")
    return parser


def smoke_config(args: argparse.Namespace) -> ArbConfig:
    """The shape asked for. Raises ValueError on options that do not fit it."""
    rule = {"update_rule": args.update_rule, **trits_field(args.trits_per_weight)}
    config = preset_config(args.preset, **rule)
    if args.max_moe_iters is not None:
        if config.moe_graph is None:
            raise ValueError(f"max_moe_iters={args.max_moe_iters}: preset={args.preset!r} has no expert graph")
        loop = {**config.block("moe_graph"), "max_iterations": args.max_moe_iters}
        config = preset_config(args.preset, **rule, moe_graph=loop)
    if args.ctx > config.max_position_embeddings:
        raise ValueError(f"ctx={args.ctx} is more than the {config.max_position_embeddings} positions of the preset")
    return config


def main() -> None:
    args = build_parser().parse_args()
    check_least(args, {"ctx": 4, "batch": 1, "steps": 1})
    config, device = smoke_config(args), checked_device(args.device)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    before_mb = peak_memory_mb()
    with device:  # initialising billions of weights takes minutes on a CPU
        model = ArbForCausalLM(config)
    built_mb = peak_memory_mb()
    optimizer = IntegerOptimizer(model, seed=args.seed) if args.backward else None
    audit = audit_model(model, optimizer)
    print(f"{args.preset}: {audit.logical_weights:,} weights, {audit.state_bytes:,} bytes of state, {args.update_rule}")
    print(f"peak memory of the process: {before_mb:.0f} MB before the model was built, {built_mb:.0f} MB after")
    print(f"{args.batch} x {args.ctx} bytes, {describe_backend(device)}", flush=True)
    block = torch.randint(0, 256, (args.batch, args.ctx), generator=torch.Generator().manual_seed(args.seed)).to(device)
    measured, times = run_steps(model, optimizer, block, args.steps)
    after = audit_model(model, optimizer)
    probed = describe_probes(state_by_area(after), [probe_step(model, optimizer, block) for _ in range(args.steps)])
    result = {
        "state_bytes": after.state_bytes,
        "logical_weights": audit.logical_weights,
        **measured,
        **probed,
        "rss_before_build_mb": before_mb,
        "rss_after_build_mb": built_mb,
        "backend": describe_backend(device),
        "backward": args.backward,
        "update_rule": args.update_rule,
        "trits_per_weight": config.trits_per_weight,
        "env": describe_environment(args.device),
    }
    show(result, times, probed)
    if args.json:
        write_json(args.json, result)
    print(json.dumps(result), flush=True)


def run_steps(
    model: ArbForCausalLM, optimizer: IntegerOptimizer | None, block: torch.Tensor, steps: int
) -> tuple[dict[str, object], list[float]]:
    """The first call, then `steps` more: their losses, times and memory as the JSON names them; ms of each step."""
    reset_device_peak(block.device)
    first_loss, first_call_ms = timed_step(model, optimizer, block)
    losses, live, peaks, times = [], [], [], []
    for _ in tqdm(range(steps), desc="steps", mininterval=2, leave=False):
        loss, milliseconds = timed_step(model, optimizer, block)
        losses.append(loss)
        times.append(milliseconds)
        live.append(live_memory_mb(block.device))
        peaks.append(peak_device_mb(block.device) or peak_memory_mb())
    measured = {
        "live_mb_by_step": live,
        "peak_mb_by_step": peaks,
        "peak_rss_mb": peak_memory_mb(),
        "peak_device_mb": peak_device_mb(block.device),
        "first_loss": first_loss,
        "loss": losses,
        "first_call_ms": first_call_ms,
        "warm_ms": statistics.median(times),
    }
    return measured, times


def show(result: dict, times: list[float], probed: dict[str, dict]) -> None:
    """The result for people."""
    losses, live, peaks = (result[name] for name in ("loss", "live_mb_by_step", "peak_mb_by_step"))
    for step, (loss, milliseconds, megabytes, peak) in enumerate(zip(losses, times, live, peaks, strict=True)):
        print(
            f"step {step}: loss {loss:.4f}, {milliseconds:.1f} ms, {megabytes:.1f} MB live, peak {peak:.0f} MB so far"
        )
    first = f"first call {result['first_call_ms']:.1f} ms, loss {result['first_loss']:.4f}"
    print(f"{first}; then {result['warm_ms']:.1f} ms a step")
    print(f"peak {result['peak_device_mb'] or result['peak_rss_mb']:.0f} MB\n\n{probe_table(probed)}\n")


def timed_step(model: ArbForCausalLM, optimizer: IntegerOptimizer | None, block: torch.Tensor) -> tuple[float, float]:
    """One step's loss in nats per byte and its milliseconds, waiting for the device."""
    started = time.perf_counter()
    with torch.set_grad_enabled(optimizer is not None):
        loss = model(block, labels=block).loss
    if optimizer is not None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    value = loss.item()
    if block.is_cuda:
        torch.cuda.synchronize(block.device)
    return value, 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    run(main)
