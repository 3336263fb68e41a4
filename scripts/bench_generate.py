"""Time greedy generation with a cache: the ternary model against a float model of the same shape.

ternary     the model as it generates: decode kernels on 2 bits a weight, 4 with two trits
fp32, bf16  the same blocks with F.linear

tokens_per_s: new bytes divided by the time of generate(), prompt included. token_ms: time between new bytes.
limit_tokens_per_s: DRAM bandwidth, measured in the same rounds, divided by the bytes of the weights that a step
multiplies. A model that fits into the CPU's cache can exceed it. It is not measured on a GPU. --profile shows what the
ternary model's steps spend their time on; torch's profiler does not see the native kernels: their time appears as self
time of the layer.

examples:
  python scripts/bench_generate.py --preset arb-tiny --prompt-bytes 8 --new-bytes 8 --repeats 2
  python scripts/bench_generate.py --preset arb-14m,200m --prompt-bytes 32 --new-bytes 64 --json generate.json
  python scripts/bench_generate.py --preset 200m --models ternary --trits_per_weight 1 2 embedding:2,head:2
  python scripts/bench_generate.py --preset 200m --models ternary --profile
  python scripts/bench_generate.py --preset 100m --device cuda --batch 1,32 --models ternary,bf16
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import copy
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.generation.streamers import BaseStreamer

from configuration_arb import PRESETS, ArbConfig
from configuration_arb.trits_per_weight import describe_trits, parse_trits
from modeling_arb import ArbForCausalLM
from modeling_arb.layers.ternary_linear import TernaryLinear
from training_arb.bench.bench_report import report
from training_arb.bench.bench_shapes import SHAPES, parse_batches, shape_config
from training_arb.bench.float_baselines import ArbFloatBaseline, FloatLinear
from training_arb.bench.measurement import (
    MILLISECONDS,
    LimitJobs,
    Limits,
    Timing,
    describe_environment,
    interleaved,
    set_threads,
)
from training_arb.cli.command_line import check_known, check_least, run, script_parser
from training_arb.common.device_names import checked_device

TERNARY = "ternary"
MODELS = (TERNARY, "fp32", "bf16")
COLUMNS = {
    "preset": "",
    "model": "",
    "trits_per_weight": "",
    "batch": "",
    "tokens_per_s": ".1f",
    "prompt_ms_p50": ".1f",
    "token_ms_p20": ".3f",
    "token_ms_p50": ".3f",
    "token_ms_p80": ".3f",
    "weight_mb": ".1f",
    "limit_tokens_per_s": ".1f",
    "fraction_of_limit": ".3f",
}


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", default="arb-14m,200m", help=f"comma-separated shapes: {', '.join([*PRESETS, *SHAPES])}")
    add("--models", default=",".join(MODELS), help="comma-separated models to time")
    add(
        "--trits_per_weight",
        nargs="+",
        help="a ternary model each: 1, 2, or ROLE:TRITS,ROLE:TRITS; default: the preset's",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--batch", default="1", help="comma-separated numbers of texts generated at once")
    add("--prompt-bytes", type=int, default=32, help="length of the prompt")
    add("--new-bytes", type=int, default=64, help="bytes to generate")
    add("--repeats", type=int, default=7, help="rounds over all models")
    add("--threads", type=int, help="default: torch's own choice")
    add("--limit-mb", type=int, default=512, help="size of the buffer that measures DRAM bandwidth")
    add("--seed", type=int, default=0, help="of weights and prompt")
    add("--profile", action="store_true", help="show where the ternary model's time goes")
    add("--json", metavar="OUT", help="write the rows here")
    return parser


class TokenClock(BaseStreamer):
    """When the prompt and every new byte arrived."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: all times are recorded already."""


class Generator:
    """One model, and for every call the seconds to the first new byte and between the others."""

    def __init__(self, model: ArbForCausalLM, prompt: torch.Tensor, new_bytes: int):
        self.model, self.prompt, self.new_bytes = model.eval(), prompt, new_bytes
        # a byte that happens to mean the end would cut a run short
        self.model.generation_config.eos_token_id = None
        self.calls: list[np.ndarray] = []

    def __call__(self) -> None:
        clock = TokenClock()
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.new_bytes,
            do_sample=False,
            streamer=clock,
        )
        self.calls.append(np.diff(clock.times))

    def weight_bytes(self) -> int:
        """Bytes of the matrices that every step multiplies."""
        layers = self.model.modules()
        sizes = [m.inference_weight()[0].nbytes if isinstance(m, TernaryLinear) else _float_bytes(m) for m in layers]
        return sum(sizes)

    def row(self, timing: Timing, repeats: int, limits: Limits) -> dict:
        calls = self.calls[-repeats:]
        token = Timing.of(np.concatenate([call[1:] for call in calls]).tolist())
        bandwidth = limits.dram_gb_per_s
        limit = None if bandwidth is None else 1e9 * bandwidth / self.weight_bytes()
        return {
            "trits_per_weight": None
            if isinstance(self.model, ArbFloatBaseline)
            else describe_trits(self.model.config.trits_per_weight),
            "batch": len(self.prompt),
            "tokens_per_s": len(self.prompt) * self.new_bytes / timing.p50,
            "prompt_ms_p50": float(np.median([call[0] for call in calls])) * MILLISECONDS,
            **token.row("token_ms", MILLISECONDS),
            "weights": self.model.num_parameters(),
            "weight_mb": self.weight_bytes() / 1e6,
            "limit_tokens_per_s": limit,
            "fraction_of_limit": None if limit is None else 1 / token.p50 / limit,
            "dram_gb_per_s": bandwidth,
        }


def _float_bytes(module: nn.Module) -> int:
    return module.weight.nbytes if isinstance(module, FloatLinear) else 0


def main() -> None:
    args = build_parser().parse_args()
    check_least(args, {"prompt_bytes": 1, "new_bytes": 2, "repeats": 1, "limit_mb": 1})
    wanted = args.models.split(",")
    check_known("models", wanted, MODELS)
    trits = [{"trits_per_weight": parse_trits(text)} for text in args.trits_per_weight or []]
    shapes = {
        preset: [shape_config(preset, training_state=False, **value) for value in trits or [{}]]
        for preset in args.preset.split(",")
    }
    device, batches = checked_device(args.device), parse_batches(args.batch)
    for preset, (config, *_) in shapes.items():
        if args.prompt_bytes + args.new_bytes > config.max_position_embeddings:
            raise ValueError(f"new_bytes={args.new_bytes}: {preset} has {config.max_position_embeddings} positions")
    set_threads(args.threads)
    limit_jobs, rows = LimitJobs(1_000_000 * args.limit_mb), []
    limited = limit_jobs.jobs if device.type == "cpu" else {}
    draw = torch.Generator().manual_seed(args.seed)
    prompts = [torch.randint(32, 127, (batch, args.prompt_bytes), generator=draw).to(device) for batch in batches]
    for preset, configs in shapes.items():
        models = build(configs, wanted, args.seed, device)
        for prompt in prompts:
            generators = {label: Generator(model, prompt, args.new_bytes) for label, model in models.items()}
            timings = interleaved({**generators, **limited}, args.repeats, label=f"{preset}, batch {len(prompt)}")
            limits = limit_jobs.limits(timings) if limited else Limits()
            for label, generator in generators.items():
                named = {"preset": preset, "model": label.split()[0]}
                rows.append({**named, **generator.row(timings[label], args.repeats, limits)})
        if args.profile:
            for label in (label for label in models if label.startswith(TERNARY)):
                print(f"{preset}, {label}, {args.new_bytes} steps:\n{profile_table(generators[label])}", flush=True)
    settings = {key: getattr(args, key) for key in ("prompt_bytes", "new_bytes", "repeats", "seed")}
    report({"rows": rows, **settings, "env": describe_environment(args.device)}, COLUMNS, args.json)


def build(
    configs: Sequence[ArbConfig], wanted: Sequence[str], seed: int, device: torch.device
) -> dict[str, ArbForCausalLM]:
    """The wanted models by label, which begins with the model's name: a ternary one for every config, float ones of
    the first config's shape."""
    models: dict[str, ArbForCausalLM] = {}
    for name in wanted:
        for config in configs if name == TERNARY else configs[:1]:
            torch.manual_seed(seed)
            label = f"{name} {describe_trits(config.trits_per_weight)}" if name == TERNARY else name
            models[label] = (ArbForCausalLM if name == TERNARY else ArbFloatBaseline)(copy.deepcopy(config))
            if name == "bf16":
                models[label].to(torch.bfloat16).config.dtype = "bfloat16"
    return {label: model.to(device) for label, model in models.items()}


def profile_table(generator: Generator) -> str:
    """torch's profile of one generate(), with the time in each kind of module as separate rows."""
    ranges: list[record_function] = []

    def enter(module: nn.Module, _inputs) -> None:
        ranges.append(record_function(f"[{type(module).__name__}]"))
        ranges[-1].__enter__()

    def leave(_module: nn.Module, _inputs, _output) -> None:
        ranges.pop().__exit__(None, None, None)

    own = [module for module in generator.model.modules() if type(module).__module__.startswith("modeling_arb")]
    hooks = [hook for m in own for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            generator()
    finally:
        for hook in hooks:
            hook.remove()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=40)


if __name__ == "__main__":
    run(main)
