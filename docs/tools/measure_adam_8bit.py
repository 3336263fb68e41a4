"""Train the float baseline with AdamW in 8 bits (torchao), on the quality benchmark's data, order, shape and steps.

The weights are float32, both moments are 8-bit codes in blocks of 256 with a float32 scale (Dettmers et al. 2022):
about 6 bytes of state a weight. All else is as for `Adam_FP32` of scripts/benchmark_true_ternary.py. The optimizer is
from torchao, which the other commands do not need: `pip install torchao`.

examples:
  python docs/tools/measure_adam_8bit.py --data wikitext2-valid.txt --json adam_8bit.json
  python docs/tools/measure_adam_8bit.py --preset arb-tiny --steps 4 --batch 2 --ctx 32 --rates 3e-3
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import platform
import statistics
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch

from training_arb.bench.measurement import describe_environment
from training_arb.bench.quality_benchmark import (
    BenchmarkResult,
    BenchmarkSettings,
    build,
    persistent_state,
    train_model,
    tuned,
)
from training_arb.cli.command_line import HelpFormatter, run
from training_arb.common.atomic_files import write_json
from training_arb.common.cpu_allocator import keep_freed_memory
from training_arb.data.byte_data import load_corpus
from training_arb.memory.live_memory import peak_memory_mb, reset_peak_memory

NAME = "Adam_8bit"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--preset", default="arb-bench", help="shape")
    add("--steps", type=int, default=600, help="training steps")
    add("--batch", type=int, default=16, help="windows per step")
    add("--ctx", type=int, default=128, help="bytes per window")
    add("--data", nargs="+", help="files, folders, globs; default: the running Python's standard library")
    add("--seed", type=int, default=0, help="seed of initial weights and data order")
    add("--rates", default="3e-3,6e-3,1e-2", help="learning rates to try; the best is reported")
    add("--json", metavar="OUT", help="write the result here")
    return parser.parse_args()


def adam_8bit(parameters, rate: float) -> torch.optim.Optimizer:
    """torchao's AdamW8bit with the benchmark's betas and weight decay; takes learning rates that are set as floats."""
    from torchao.optim import AdamW8bit

    class Optimizer(AdamW8bit):
        def step(self, closure=None):
            for group in self.param_groups:  # it insists on a tensor, so that a new rate is not compiled anew
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            return super().step(closure)

    return Optimizer(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and moments; of a quantized moment those of its codes, scales and code book."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        for value in state.values():
            if hasattr(value, "__tensor_flatten__"):
                tensors += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
            elif isinstance(value, torch.Tensor):
                tensors.append(value)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(settings: BenchmarkSettings, rate: float, train_ids: np.ndarray, held_out: np.ndarray) -> BenchmarkResult:
    """Train at one rate and measure."""
    reset_peak_memory()
    model, _ = build("Adam_FP32", settings, rate)
    optimizer = adam_8bit(model.parameters(), rate)
    trained = train_model(NAME, model, optimizer, rate, settings, train_ids, held_out)
    _, weights = persistent_state(model, optimizer)
    state = state_bytes(model, optimizer)
    return BenchmarkResult(
        val_loss=trained.val_loss,
        val_bpb=trained.val_bpb,
        train_loss_final=statistics.mean(trained.losses[-20:]),
        state_bytes=state,
        state_bytes_per_weight=state / weights,
        logical_weights=weights,
        trainable_float_params=weights,
        step_ms_median=statistics.median(trained.milliseconds),
        peak_mem_mb=peak_memory_mb(),
        learning_rate=rate,
        state_bytes_at_3b=round(state / weights * 3e9),
        curve=trained.curve,
    )


def main() -> None:
    args = parse()
    if find_spec("torchao") is None:
        raise ValueError("torchao is not installed: pip install torchao")
    try:
        rates = [float(rate) for rate in args.rates.split(",")]
    except ValueError as error:
        raise ValueError(f"rates={args.rates!r} must be numbers with commas between") from error
    keep_freed_memory()
    settings = BenchmarkSettings(
        preset=args.preset,
        steps=args.steps,
        batch=args.batch,
        ctx=args.ctx,
        seed=args.seed,
        accum_threshold=32,
        scale_update_interval=1,
        print_every=100,
    )
    train_ids, held_out = load_corpus(args.data, args.ctx)
    result = tuned(rates, lambda rate: train(settings, rate, train_ids, held_out))
    print(
        f"{NAME}: {result.val_loss:.4f} nats per byte held out at rate {result.learning_rate:g},"
        f" {result.state_bytes_per_weight:.3f} bytes of state a weight, {result.step_ms_median:.1f} ms a step"
    )
    if args.json:
        env = {**describe_environment("cpu"), "torchao": version("torchao"), "python": platform.python_version()}
        data = " ".join(args.data or ["Python's standard library"])
        write_json(
            args.json,
            {
                "configs": {NAME: result.to_dict()},
                "data": data,
                "steps": args.steps,
                "seed": args.seed,
                "settings": vars(settings),
                "env": env,
            },
        )


if __name__ == "__main__":
    run(main)
