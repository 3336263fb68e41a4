"""Run the kernel tests on this device and report one row per Triton kernel.

Each test file runs in its own process with a time limit. Several run at once, because most of the time is compilation.
After a test that hangs or breaks the device's context, the file continues with the next test in a new process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import arb_kernels.triton_support as triton_support

from .bounded_process import run_bounded
from .kernel_tests import FAILED, PASSED, SKIPPED, TESTS

TEST_RUNNER = "training_arb.device_check.kernel_tests"
HELPERS, MARKERS = "from support.tensors import", ("triton_device", "BACKENDS")  # what a test file of the kernels holds
MOST_RESTARTS = 4  # of a file
MOST_PROCESSES = 4  # each has a context on the device, half a gigabyte
NOT_RUN = "not run"


def kernel_test_files() -> list[Path]:
    """The test files that run kernels, the larger ones first. Raises ValueError outside a checkout."""
    texts = {path: path.read_text() for path in TESTS.rglob("test_*.py")}
    files = [path for path, text in texts.items() if HELPERS in text and any(name in text for name in MARKERS)]
    if not files:
        raise ValueError(f"tests={str(TESTS)!r} has no test of the kernels: run this from a checkout of the repository")
    return sorted(files, key=lambda path: -path.stat().st_size)


def kernel_names() -> list[str]:
    """Every kernel of the Triton modules."""
    names: set[str] = set()
    kernels = Path(triton_support.__file__).parent
    for path in sorted(kernels.rglob("*_triton.py")):
        module = ".".join(path.relative_to(kernels).with_suffix("").parts)
        members = vars(importlib.import_module(f"arb_kernels.{module}"))
        names |= {name for name, value in members.items() if name.endswith("_kernel") and hasattr(value, "fn")}
    return sorted(names)


def run_file(path: Path, seeds: int, deadline: float) -> list[dict]:
    """A row for each test of one file: its name, result, detail and kernels. deadline: of time.monotonic()."""
    rows: list[dict] = []
    paths = (str(path.parent), str(TESTS), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        out, first = Path(folder) / "tests.jsonl", 0
        for _ in range(MOST_RESTARTS + 1):
            command = [sys.executable, "-m", TEST_RUNNER, str(path), str(first), str(seeds), str(out)]
            ended = run_bounded(command, deadline - time.monotonic(), environment, own_group=False)
            lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
            rows = _rows_of(lines)
            if lines and lines[-1].get("ended"):
                return rows
            open_row = rows[-1] if rows and "result" not in rows[-1] else None
            said = " ".join(ended.last_lines[-3:])
            died = f"its process ended with code {ended.code}: {said}"
            why = "still ran at the stage's bound" if ended.hung else died
            if open_row is not None:
                open_row |= {"result": FAILED, "detail": why, "kernels": []}
                with out.open("a") as file:
                    file.write(json.dumps(open_row) + "\n")
            elif not rows or ended.hung or ended.code:
                rows.append({"test": path.stem, "result": FAILED, "detail": why, "kernels": []})
                return rows
            if ended.hung:
                return rows
            first = rows[-1]["number"] + 1
    given_up = f"given up after {MOST_RESTARTS + 1} processes that died"
    return [*rows, {"test": path.stem, "result": FAILED, "detail": given_up, "kernels": []}]


def _rows_of(lines: list[dict]) -> list[dict]:
    """Joins the lines written before and after a test into one row."""
    rows: dict[int, dict] = {}
    for line in lines:
        if "number" in line:
            rows[line["number"]] = {**rows.get(line["number"], {}), **line}
    return list(rows.values())


def check_kernels(
    files: list[Path], kernels: list[str], seeds: int, seconds: float, write: Callable[[dict], None]
) -> dict:
    """Run the files and give the result, also written after each of them:
    {"passed", "summary", "kernels": [...], "failures": [...], "tests"}."""
    deadline, rows = time.monotonic() + seconds, []
    result = summarise(kernels, rows)
    with ThreadPoolExecutor(min(len(files), MOST_PROCESSES, os.cpu_count() or 1)) as pool:
        running = [pool.submit(run_file, path, seeds, deadline) for path in files]
        for done in as_completed(running):
            rows += done.result()
            result = summarise(kernels, rows)
            write(result)
    return result


def summarise(kernels: list[str], rows: list[dict]) -> dict:
    """Tests by kernel. A kernel that no test launched has not passed."""
    by_kernel = []
    for kernel in kernels:
        mine = [row for row in rows if kernel in row["kernels"]]
        failed = [row for row in mine if row["result"] == FAILED]
        passed = [row for row in mine if row["result"] == PASSED]
        result = FAILED if failed else PASSED if passed else NOT_RUN
        by_kernel.append({"kernel": kernel, "result": result, "tests": len(mine), "failed": len(failed)})
        if failed:
            by_kernel[-1]["first_failure"] = {key: failed[0][key] for key in ("test", "detail")}
    failures = [{key: row[key] for key in ("test", "kernels", "detail")} for row in rows if row["result"] == FAILED]
    good = sum(row["result"] == PASSED for row in by_kernel)
    counts = {name: sum(row["result"] == name for row in rows) for name in (PASSED, FAILED, SKIPPED)}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return {
        "passed": good == len(kernels) and not failures,
        "summary": f"{good} of {len(kernels)} kernels; tests: {said or 'none'}",
        "kernels": by_kernel,
        "failures": failures,
        "tests": counts,
    }
