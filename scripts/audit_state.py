"""Audit a model's persistent state: every tensor by role, dtype and bytes, and the weights and their trits by area.

Caches, which generation keeps in memory besides the state and never saves, are shown separately. Exit code 1 when
there is a float tensor, an unlisted one, or a byte that does not hold trits; 2 when the model cannot be read.

examples:
  python scripts/audit_state.py runs/pretrain/final
  python scripts/audit_state.py runs/pretrain/checkpoint-1200 --tensors
  python scripts/audit_state.py --preset arb-3b --json audit.json
  python scripts/audit_state.py --preset arb-14m --trits_per_weight 2
  python scripts/audit_state.py --preset arb-3b --trits_per_weight 2 --table_rule momentum
  python scripts/audit_state.py --preset arb-3b --update_rule correlation --allocate      # 0.9 GB, a minute
  python scripts/audit_state.py --preset arb-14m --batch 8 --ctx 256       # and what a training step would need
  python scripts/audit_state.py --preset arb-14m --batch 8 --ctx 1024 --gradient_checkpointing
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import time
from dataclasses import asdict
from typing import Any

from configuration_arb import PRESETS, ArbConfig, preset_config
from configuration_arb.configuration_arb import TABLE_RULES
from modeling_arb import ArbForCausalLM
from training_arb.checkpoints.checkpoint_files import check_finished
from training_arb.cli.command_line import add_trits_option, check_least, run, script_parser, trits_field
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.memory.live_memory import MEGABYTE, peak_memory_mb, resident_mb
from training_arb.memory.memory_forecast import StepMemory, forecast_step
from training_arb.memory.state_audit import StateAudit, audit_config, audit_folder, audit_model, forecast_caches


def audit_built(config: ArbConfig) -> tuple[StateAudit, dict[str, float]]:
    """Build the model and audit it. Also returns the seconds and megabytes of resident memory that building took."""
    keep_freed_memory()
    before, started = peak_memory_mb(), time.perf_counter()
    model = ArbForCausalLM(config)
    seconds, peak = time.perf_counter() - started, peak_memory_mb()
    audit = forecast_caches(audit_model(model), model)
    state = audit.state_bytes / MEGABYTE
    return audit, {"seconds": seconds, "rss_before_mb": before, "peak_rss_mb": peak, "state_mb": state}


def forecast(config: ArbConfig, args: argparse.Namespace) -> StepMemory:
    model = ArbForCausalLM(config)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return forecast_step(model, args.batch, args.ctx)


def training_base_mb() -> float:
    """What a training process has resident before it builds a model, in MB; right while this one has done nothing."""
    import training_arb.report.run_report
    import training_arb.train.trainer_arb  # noqa: F401

    return resident_mb()


def print_step(step: StepMemory, base: float, args: argparse.Namespace) -> None:
    sizes = (size / MEGABYTE for size in (step.peak, step.state, step.saved, step.transient_peak - step.saved))
    print(f"\na training step of {args.batch} x {args.ctx} bytes needs {next(sizes):.1f} MB of tensors:", end=" ")
    print("{:.1f} of state, {:.1f} saved by the forward, {:.1f} temporary".format(*sizes))
    print(
        f"a process on the CPU peaks at {step.process_peak_mb(base):.0f} MB at most: {base:.0f} before the model, and"
        f" up to {step.margin:g} times its tensors"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("model_dir", nargs="?", help="a checkpoint folder")
    add("--preset", help=f"audit a shape without allocating it: {', '.join(PRESETS)}")
    add("--update_rule", default="momentum", help="update rule of the preset")
    add("--table_rule", help=f"what moves the preset's tables: {', '.join(TABLE_RULES)}; default: the preset's")
    add_trits_option(parser)
    add("--allocate", action="store_true", help="build the preset's model and audit it")
    add("--batch", type=int, help="with --ctx: forecast the memory of a training step of the preset")
    add("--ctx", type=int, help="bytes per window of that step")
    add("--gradient_checkpointing", action="store_true", help="of that step: recompute the forward in backward")
    add("--tensors", action="store_true", help="list every tensor")
    add("--json", metavar="OUT", help="write the audit here")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError on options that contradict each other or are out of range."""
    if (args.model_dir is None) == (args.preset is None):
        raise ValueError("give either MODEL_DIR or --preset NAME")
    if args.allocate and not args.preset:
        raise ValueError("allocate=True: needs --preset NAME; a checkpoint folder is audited on disk")
    if (args.batch is None) != (args.ctx is None):
        raise ValueError(f"batch={args.batch}, ctx={args.ctx}: give both to forecast a training step")
    if args.batch is not None and not args.preset:
        raise ValueError(f"batch={args.batch}: needs --preset NAME; the forecast is for presets only")
    for name in ("table_rule", "trits_per_weight"):
        if getattr(args, name) is not None and not args.preset:
            raise ValueError(f"{name}={getattr(args, name)!r}: needs --preset NAME; a checkpoint's config says it")
    if args.gradient_checkpointing and args.batch is None:
        raise ValueError("gradient_checkpointing=True: needs --batch and --ctx of a training step")
    check_least(args, {"batch": 1, "ctx": 8})


def chosen_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the preset that an option sets. Raises ValueError if their text cannot be read."""
    table_rule = {} if args.table_rule is None else {"table_rule": args.table_rule}
    return {**table_rule, **trits_field(args.trits_per_weight)}


def show(audit: StateAudit, tensors: bool) -> None:
    if tensors:
        for row in audit.tensors:
            print(f"{row.name:<56}{row.role:<24}{row.dtype:<8}{row.bytes:>12,}  {row.shape}")
        print()
    print(audit.table())


def show_building(memory: dict[str, float]) -> None:
    before, peak, state = (memory[key] for key in ("rss_before_mb", "peak_rss_mb", "state_mb"))
    print(f"\nbuilt in {memory['seconds']:.0f} s; peak memory {peak:.0f} MB, {before:.0f} of it before")
    print(f"peak over state ({state:.1f} MB): {peak / state:.3f}, built alone {(peak - before) / state:.3f}")


def main() -> int:
    args = build_parser().parse_args()
    check(args)
    memory = step = None
    base = training_base_mb() if args.batch else 0.0
    if args.preset:
        config = preset_config(args.preset, update_rule=args.update_rule, **chosen_fields(args))
        audit, memory = audit_built(config) if args.allocate else (audit_config(config), None)
    else:
        check_finished(args.model_dir)
        audit = audit_folder(args.model_dir)
    if args.batch:
        step = forecast(config, args)
    show(audit, args.tensors)
    if memory:
        show_building(memory)
    if step:
        print_step(step, base, args)
    if args.json:
        process = {"process_base_mb": base, "process_peak_mb": step.process_peak_mb(base)} if step else {}
        extra = {"memory": memory, "training_step": {**asdict(step), "peak": step.peak, **process} if step else None}
        write_json(args.json, {**audit.to_dict(), **{key: value for key, value in extra.items() if value}})
    return 0 if audit.clean else 1


if __name__ == "__main__":
    run(main)
