"""Compare the peak memory of training runs, each in a separate process, with its forecast.

A shape is PRESET:BATCHxCTX; append +checkpointing for --gradient_checkpointing. Each trains --steps steps of random
bytes with ArbTrainer; the forecast comes from this process, which runs batches of at most three rows. In MB: base:
resident memory of a process before it builds the model; forecast and peak, of the whole process. over_tensors: the peak
above the base and a first step's own needs, over the tensors; margin: what the forecast takes for it. Linux only:
elsewhere a peak cannot be read.

examples:
  python scripts/developer/bench_memory.py --shapes arb-tiny:4x64 arb-tiny:4x64+checkpointing
  python scripts/developer/bench_memory.py --shapes arb-14m:8x256 --trits_per_weight 2
  python scripts/developer/bench_memory.py --json memory.json
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from configuration_arb import PRESETS, preset_config
from configuration_arb.trits_per_weight import describe_trits, parse_trits
from modeling_arb import ArbForCausalLM
from training_arb.bench.bench_report import report
from training_arb.bench.measurement import describe_environment
from training_arb.cli.command_line import add_trits_option, check_least, run, script_parser, trits_field
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.byte_data import ByteBlocks, collate_blocks
from training_arb.memory.live_memory import MEGABYTE, peak_memory_mb, resident_mb
from training_arb.memory.memory_forecast import FIRST_STEP_MB, forecast_step
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

CHECKPOINTING = "+checkpointing"
SMALL = [
    "arb-small:1x128",
    "arb-small:8x128",
    "arb-small:32x128",
    "arb-small:8x256",
    "arb-small:32x256",
    "arb-small:8x1024",
]
LARGE = ["arb-14m:1x128", "arb-14m:32x128", "arb-14m:8x256", "arb-14m:1x1024", "arb-14m:4x1024", "arb-14m:8x1024"]
CHECKPOINTED = ["arb-small:32x256", "arb-14m:8x256", "arb-14m:32x256", "arb-14m:8x1024"]
SHAPES = [*SMALL, *LARGE, *(f"{shape}{CHECKPOINTING}" for shape in CHECKPOINTED)]
MEGABYTES = ("state_mb", "saved_mb", "tensors_mb", "base_mb", "forecast_mb", "peak_mb")
COLUMNS = {
    "preset": "",
    "batch": "",
    "ctx": "",
    "checkpointing": "",
    "trits_per_weight": "",
    **dict.fromkeys(MEGABYTES, ".0f"),
}
COLUMNS |= {"over_tensors": ".2f", "margin": ".2f", "step_s": ".2f"}


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    preset: str
    batch: int
    ctx: int
    checkpointing: bool = False
    trits_per_weight: str = "1"

    @classmethod
    def parse(cls, text: str, trits_per_weight: str | None = None) -> Shape:
        try:
            preset, _, size = text.removesuffix(CHECKPOINTING).partition(":")
            batch, ctx = map(int, size.split("x"))
        except ValueError as error:
            raise ValueError(
                f"shapes: {text!r} must look like arb-small:8x256 or arb-small:8x256+checkpointing"
            ) from error
        trits = describe_trits(preset_config(preset, **trits_field(trits_per_weight)).trits_per_weight)
        for field, value, least in (("batch", batch, 1), ("ctx", ctx, 8)):
            if value < least:
                raise ValueError(f"shapes: {text!r} has {field}={value}, which must be at least {least}")
        return cls(preset, batch, ctx, text.endswith(CHECKPOINTING), trits)

    def __str__(self) -> str:
        return f"{self.preset}:{self.batch}x{self.ctx}{CHECKPOINTING if self.checkpointing else ''}"

    def model(self) -> ArbForCausalLM:
        torch.manual_seed(0)
        trits = parse_trits(self.trits_per_weight)
        positions = max(self.ctx, 4096)
        return ArbForCausalLM(preset_config(self.preset, trits_per_weight=trits, max_position_embeddings=positions))


def train(shape: Shape, steps: int) -> dict[str, float]:
    """Train in this process, which should be new. Returns MB before the model is built, MB at the peak, seconds per
    step."""
    keep_freed_memory()
    base = resident_mb()
    ids = np.random.default_rng(0).integers(0, 256, shape.ctx * max(64, 2 * shape.batch), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        args = ArbTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=shape.batch,
            gradient_checkpointing=shape.checkpointing,
            eval_strategy="no",
            save_strategy="no",
            metric_for_best_model=None,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = ArbTrainer(
            shape.model(), args, train_dataset=ByteBlocks(ids, shape.ctx), data_collator=collate_blocks
        )
        seconds = trainer.train().metrics["train_runtime"] / steps
    return {"base_mb": base, "peak_mb": peak_memory_mb(), "step_s": seconds}


def measure(shape: Shape, steps: int) -> dict[str, float]:
    """`train` in a separate process. Raises RuntimeError with its error output if it fails."""
    command = [sys.executable, __file__, "--measure", str(shape), "--steps", str(steps)]
    command += ["--trits_per_weight", shape.trits_per_weight]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shape}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def forecast(shape: Shape, base_mb: float) -> dict[str, float]:
    model = shape.model()
    if shape.checkpointing:
        model.activation_checkpointing_enable()
    step = forecast_step(model, shape.batch, shape.ctx)
    sizes = {"state_mb": step.state, "saved_mb": step.saved, "tensors_mb": step.peak}
    forecast = {"forecast_base_mb": base_mb, "forecast_mb": step.process_peak_mb(base_mb), "margin": step.margin}
    return {**{key: size / MEGABYTE for key, size in sizes.items()}, **forecast}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, metavar="PRESET:BATCHxCTX", help=f"presets: {', '.join(PRESETS)}")
    add_trits_option(parser)
    add("--steps", type=int, default=3, help="steps of each run")
    add("--measure", metavar="SHAPE", help="train this shape in this process, print its memory, and exit")
    add("--json", metavar="OUT", help="write the rows here")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    check_least(args, {"steps": 1})
    if args.measure:
        print(json.dumps(train(Shape.parse(args.measure, args.trits_per_weight), args.steps)))
        return
    base, rows = resident_mb(), []
    shapes = [Shape.parse(text, args.trits_per_weight) for text in args.shapes]
    for shape in tqdm(shapes, desc="shapes", leave=False):
        measured, expected = measure(shape, args.steps), forecast(shape, base)
        above = measured["peak_mb"] - measured["base_mb"] - FIRST_STEP_MB
        rows.append({**asdict(shape), **expected, **measured, "over_tensors": above / expected["tensors_mb"]})
    report({"rows": rows, "steps": args.steps, "env": describe_environment()}, COLUMNS, args.json)


if __name__ == "__main__":
    run(main)
