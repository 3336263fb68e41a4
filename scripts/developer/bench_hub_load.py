"""Time decoding by a model loaded as from the hub, with the native kernels of an installed arb_kernels and without.

The model runs in a process that can import nothing of this repository but arb_kernels, from the code that was saved
beside the weights. Both ways decode the same bytes in turn, and must give the same ids.

examples:
  python scripts/developer/bench_hub_load.py --preset arb-tiny --new-bytes 4 --repeats 2
  python scripts/developer/bench_hub_load.py --preset arb-14m --json hub_load.json
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import arb_kernels.native_library as native
from configuration_arb import PRESETS, preset_config
from modeling_arb import ArbForCausalLM
from training_arb.bench.bench_report import report
from training_arb.bench.measurement import describe_environment
from training_arb.cli.command_line import check_least, run, script_parser

KERNELS = Path(str(native.__file__)).parent
COLUMNS = {"preset": "", "kernels": "", "tokens_per_s": ".1f", "of_torch": ".2f"}
# Arguments: the model's folder, a folder that holds arb_kernels, new bytes, rounds. Prints {kernels: [seconds]}.
DECODE = """
import json, os, sys, time
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
folder, site, new_bytes, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path = [site, *(path for path in sys.path if "__editable__" not in path)]
import torch
from transformers import AutoModelForCausalLM
ways = ("native", "torch")
models = {way: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval() for way in ways}
kernels = sys.modules[type(models["native"]).__module__.replace("modeling_arb", "kernels_arb")]
assert "modeling_arb" not in sys.modules, "the repository's code was loaded, not the saved one"
prompt = torch.tensor([list(b"def read(self, size=-1):")])
seconds, ids = {way: [] for way in ways}, {}
for number in range(repeats + 1):
    for way in ways:
        os.environ["ARB_BACKEND"] = way
        assert kernels.backend_for(prompt.device) == way
        started = time.perf_counter()
        ids[way] = models[way].generate(prompt, max_new_tokens=new_bytes, min_new_tokens=new_bytes, do_sample=False)
        if number:  # the first lays out the weights
            seconds[way].append(time.perf_counter() - started)
    assert torch.equal(ids["native"], ids["torch"]), "the kernels gave other ids"
print(json.dumps(seconds))
"""


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="arb-14m")
    add("--new-bytes", type=int, default=64, help="bytes decoded in a round")
    add("--repeats", type=int, default=7, help="timed rounds")
    add("--json", help="where to write the result")
    return parser


def decode_seconds(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round by kernels, native and torch. Raises ValueError if the process fails."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, site = Path(folder) / "model", Path(folder) / "site"
        ArbForCausalLM(preset_config(args.preset)).save_pretrained(model, training_state=False)
        site.mkdir()
        (site / "arb_kernels").symlink_to(KERNELS)
        command = [sys.executable, "-I", "-c", DECODE, str(model), str(site), str(args.new_bytes), str(args.repeats)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise ValueError(f"preset={args.preset!r}: the process failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    args = build_parser().parse_args()
    check_least(args, {"new_bytes": 1, "repeats": 1})
    if native.native_library() is None:
        raise ValueError("arb_kernels: the native kernels are not built here; reinstall with a C++ compiler")
    medians = {way: statistics.median(taken) for way, taken in decode_seconds(args).items()}
    rows = [
        {
            "preset": args.preset,
            "kernels": way,
            "tokens_per_s": args.new_bytes / seconds,
            "of_torch": medians["torch"] / seconds,
        }
        for way, seconds in medians.items()
    ]
    settings = {name: getattr(args, name) for name in ("preset", "new_bytes", "repeats")}
    report({"rows": rows, "settings": settings, "env": describe_environment()}, COLUMNS, args.json)


if __name__ == "__main__":
    run(main)
