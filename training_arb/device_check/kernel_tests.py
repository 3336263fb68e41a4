"""Run one kernel test file without pytest on this device, with a JSON line before and after each test.

Besides the test's assertions, the torch reference that it calls is also run on the CPU and must give the same result.
The line of a test names the kernels that it launched and, where it failed, the first element that differs.

PYTHONPATH=FOLDER_OF_FILE:tests python -m training_arb.device_check.kernel_tests FILE FIRST SEEDS OUT
runs the tests from number FIRST on, with seeds 0 .. SEEDS - 1.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import traceback
import types
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

import arb_kernels.triton_support as triton_support
from arb_kernels.backend import use_backend

from .pytest_stand_in import Skipped, Test, calls_of, fixtures_of, install

TESTS = Path(__file__).parents[2] / "tests"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
DEAD = ("CUDA error", "Triton Error [CUDA]")  # a kernel may have broken the device's context: nothing runs after it


class Witness:
    """Records a test: the kernels launched, and the last comparison that failed."""

    def __init__(self):
        self.kernels: set[str] = set()
        self.difference = ""
        launch, equal = triton_support.launch, torch.equal

        def recorded_launch(kernel, *arguments, **options):
            self.kernels.add(kernel.fn.__name__)
            launch(kernel, *arguments, **options)

        def recorded_equal(expected, got):
            same = equal(expected, got)
            if not same:
                self.difference = first_difference(expected, got)
            return same

        # the kernels' modules take `launch` from there when they are imported, after this
        triton_support.launch, torch.equal = recorded_launch, recorded_equal

    def start(self) -> None:
        self.kernels.clear()
        self.difference = ""


def first_difference(expected: torch.Tensor, got: torch.Tensor) -> str:
    """The difference of two tensors as text: number of elements, first index and both values."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"expected {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}"
    expected, got = expected.detach().cpu(), got.detach().cpu()
    places = (expected != got).nonzero()
    if not len(places):
        return "no element differs"
    index = tuple(places[0].tolist())
    count = f"{len(places)} of {expected.numel()} differ"
    return f"{count}, the first at {index}: expected {expected[index].item()!r}, got {got[index].item()!r}"


def checked_on_cpu(reference: Callable, assert_same: Callable) -> Callable:
    """`reference`, in torch alone; its result on the device must be the CPU's."""

    @wraps(reference)
    def on_both(*arguments, **options):
        on_cpu = tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, (arguments, options))
        with use_backend("torch"):
            here = reference(*arguments, **options)
            there = reference(*on_cpu[0], **on_cpu[1])
        pairs = zip(tree_leaves(there), tree_leaves(here), strict=True)
        for i, (expected, got) in enumerate(pairs):
            if isinstance(expected, torch.Tensor):
                assert_same(f"{reference.__name__}: result {i} on the device against the CPU's", expected, got.cpu())
        return here

    return on_both


def check_references(module: types.ModuleType, assert_same: Callable) -> None:
    """Let every pure reference that a test module imported be run on the CPU as well."""
    for name, value in list(vars(module).items()):
        if name.startswith("naive_") and callable(value):
            setattr(module, name, checked_on_cpu(value, assert_same))


def run_tests(path: Path, first: int, seeds: int, out: Path) -> None:
    """Write a line when each test starts and when it has ended."""
    witness = Witness()
    install()
    conftest, tensors = importlib.import_module("conftest"), importlib.import_module("support.tensors")
    module = importlib.import_module(path.stem)
    check_references(module, tensors.assert_same)
    fixtures = fixtures_of(conftest, module)
    with out.open("a", buffering=1) as lines:
        for number, test in enumerate(calls_of(module)):
            if number < first or not runs_kernels(test):
                continue
            lines.write(json.dumps({"number": number, "test": f"{path.stem}::{test.name}"}) + "\n")
            result, detail = PASSED, ""
            witness.start()
            for seed in range(seeds):
                try:
                    test.run(fixtures, partial(torch.manual_seed, seed))
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                except Skipped as reason:
                    result, detail = SKIPPED, str(reason)
                except torch.OutOfMemoryError as error:
                    result, detail = SKIPPED, f"does not fit: {str(error).partition('. ')[0]}"
                except Exception as error:
                    result, detail = FAILED, f"seed {seed}: {describe(error, witness.difference)}"
                if result != PASSED:
                    break
            if torch.cuda.is_available() and not any(words in detail for words in DEAD):
                torch.cuda.empty_cache()  # the other processes want it
            ended = {"number": number, "result": result, "detail": detail, "kernels": sorted(witness.kernels)}
            lines.write(json.dumps(ended) + "\n")
            if any(words in detail for words in DEAD):
                return
        lines.write(json.dumps({"ended": True}) + "\n")


def runs_kernels(test: Test) -> bool:
    """Whether a test concerns Triton: it uses the device fixture, or a parameter names the backend."""
    return "triton" in test.parameters.values() or "triton_device" in inspect.signature(test.function).parameters


def describe(error: Exception, difference: str) -> str:
    """An error in one line: message, line of the test, and first difference of the tensors."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "test_" in Path(frame.filename).name]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = " ".join(str(error).split())[:600]
    known = f"; {difference}" if isinstance(error, AssertionError) and difference else ""
    return f"{type(error).__name__}: {said}{place}{known}"


if __name__ == "__main__":
    run_tests(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
