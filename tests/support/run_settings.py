"""The numeric part of the tests under each setting that makes torch or our kernels compute in another way.

Every setting stands for machines: a CPU without AVX-512, a CPU for which torch has no vectors and two
cores, a machine without a C++ compiler or VNNI. All run side by side. The output of failing ones follows the table.

examples:
  python tests/support/run_settings.py
  python tests/support/run_settings.py --only ATEN_CPU_CAPABILITY=avx2 'ARB_BACKEND=torch OMP_NUM_THREADS=2'
  python tests/support/run_settings.py --only ARB_ISA=avx2 --tests tests/kernels/matmul/test_int8_matmul.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "ARB_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2",
    "ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2",
    "ARB_BACKEND=torch ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2",
)
TESTS = (
    "tests/training_arb/optim/test_golden_runs.py",
    "tests/kernels/matmul/test_int8_matmul.py",
    "tests/kernels/formats/test_exponents.py",
    "tests/kernels/formats/test_packing.py",
    "tests/kernels/test_random_bits.py",
    "tests/kernels/formats/test_groups.py",
    "tests/kernels/matmul/test_quantise.py",
    "tests/kernels/formats/test_decode_layout.py",
    "tests/kernels/rules/test_gradient_sum.py",
    "tests/kernels/rules/test_flip.py",
    "tests/kernels/rules/test_correlation.py",
    "tests/kernels/rules/test_sparse_momentum.py",
    "tests/kernels/rules/test_momentum_kernels.py",
    "tests/kernels/blocks/test_lstm_gates.py",
    "tests/kernels/blocks/test_sigmoid.py",
    "tests/modeling_arb/blocks/test_ternary_codebook.py",
    "tests/modeling_arb/blocks/test_blocks.py::test_cached_decode_equals_the_full_forward",
    "tests/modeling_arb/blocks/test_blocks.py::test_logits_depend_on_the_bytes_before_and_nothing_else",
)
SELECTION = "not triton"  # Triton's interpreter is slow, and asks none of these
AT_A_TIME = 3
COUNT = re.compile(r"(\d+) (passed|failed|error)")


def run_setting(setting: str, tests: list[str]) -> tuple[str, dict[str, int], float, str]:
    """-> the setting, counts by outcome, seconds, output. A run that ended before any test counts as an error."""
    variables = dict(part.split("=", 1) for part in setting.split())
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "-k", SELECTION, *tests],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    last_line = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {outcome: int(count) for count, outcome in COUNT.findall(last_line)}
    counts["failed"] = counts.get("failed", 0) + counts.pop("error", 0)
    if done.returncode and not counts["failed"]:
        counts["failed"] = 1
    return setting, counts, time.monotonic() - started, done.stdout


def outcomes(settings: list[str], tests: list[str]) -> Iterator[tuple[str, dict[str, int], float, str]]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from pool.map(lambda setting: run_setting(setting, tests), settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME=VALUE", default=SETTINGS, help="these instead of all")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what to run, as pytest names it")
    args = parser.parse_args()
    wrong = [part for setting in args.only for part in setting.split() if "=" not in part]
    if wrong:
        parser.error(f"only={wrong[0]!r}: not a NAME=VALUE")
    width = max(map(len, args.only)) + 2
    print(f"{'setting':<{width}}{'passed':>8}{'failed':>8}{'seconds':>9}")
    failing = []
    for setting, counts, seconds, output in outcomes(list(args.only), list(args.tests)):
        print(f"{setting:<{width}}{counts.get('passed', 0):>8}{counts['failed']:>8}{seconds:>9.1f}", flush=True)
        if counts["failed"]:
            failing.append((setting, output))
    for setting, output in failing:
        print(f"\n{setting}\n{output}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
