"""Timing, interleaving, limits and the environment. How long anything takes is nobody's assertion."""

import json
import os
import socket

import pytest
import torch

from arb_kernels.backend import instruction_set
from training_arb.bench.bench_report import format_table, plot_fractions
from training_arb.bench.measurement import (
    LimitJobs,
    Limits,
    Timing,
    describe_environment,
    interleaved,
    measure_limits,
    rotating,
    set_threads,
)
from training_arb.memory.live_memory import live_memory_mb, peak_device_mb


def test_percentiles_and_units():
    timing = Timing.of([seconds / 1000 for seconds in range(1, 102)])
    assert timing.row("step_ms", 1e3) == pytest.approx({"step_ms_p20": 21, "step_ms_p50": 51, "step_ms_p80": 81})


def test_every_job_runs_once_a_round_in_changing_order():
    ran = []
    jobs = {name: lambda name=name: ran.append(name) for name in "abc"}
    timings = interleaved(jobs, repeats=12)
    assert ran[:6] == list("aabbcc")
    rounds = [tuple(ran[i : i + 3]) for i in range(6, len(ran), 3)]
    assert len(rounds) == 12
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 1
    assert all(timing.p20 <= timing.p50 <= timing.p80 for timing in timings.values())


def test_a_fast_job_is_called_in_bursts(monkeypatch):
    clock = iter(range(10_000))
    calls = []
    monkeypatch.setattr("training_arb.bench.measurement.time.perf_counter", lambda: float(next(clock)))
    # on this clock a job takes a second, so a burst of four seconds is four calls
    timings = interleaved({"job": lambda: calls.append(1)}, repeats=3, burst_seconds=4)
    assert len(calls) == 2 + 3 * 4
    assert timings["job"].p50 == 1 / 4


def test_rotating_goes_round():
    seen = []
    job = rotating(seen.append, 3)
    for _ in range(7):
        job()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_limit_is_what_binds_first():
    limits = Limits(dram_gb_per_s=20, int8_gops=400)
    assert limits.gops(operations=8, dram_bytes=1) == 160
    assert limits.gops(operations=800, dram_bytes=1) == 400
    assert Limits().gops(8, 1) is None


@pytest.mark.skipif(not instruction_set(), reason="no native matmul kernels here")
def test_limits_are_measured_by_the_native_library():
    limits = measure_limits(repeats=2, buffer_bytes=1_000_000)
    assert limits.dram_gb_per_s > 0 and limits.int8_gops > 0


def test_without_native_kernels_there_are_no_limits(monkeypatch):
    monkeypatch.setattr("training_arb.bench.measurement.instruction_set", lambda: 0)
    assert LimitJobs(1000).limits({}) == Limits(None, None)


def test_threads_are_checked():
    with pytest.raises(ValueError, match="threads=0"):
        set_threads(0)
    assert set_threads(None) == torch.get_num_threads()


def test_the_environment_names_no_host_and_no_path():
    env = describe_environment()
    assert {"cpu", "threads", "torch", "commit", "date", "backend"} <= env.keys()
    text = json.dumps(env)
    assert socket.gethostname() not in text
    assert os.getcwd() not in text and os.path.expanduser("~") not in text


def test_live_memory_sees_a_tensor_come_and_go():
    cpu = torch.device("cpu")
    before = live_memory_mb(cpu)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    with_it = live_memory_mb(cpu)
    assert with_it - before == pytest.approx(64, abs=8)
    del held
    assert with_it - live_memory_mb(cpu) == pytest.approx(64, abs=8)
    assert peak_device_mb(cpu) == 0


def test_table_aligns_and_marks_what_is_missing():
    rows = [{"op": "long name", "us": 1.25, "limit": None}, {"op": "x", "us": 100.0, "limit": 3.0}]
    table = format_table(rows, {"op": "", "us": ".1f", "limit": ".0f"})
    assert table.splitlines() == ["op            us  limit", "long name    1.2      -", "x          100.0      3"]


def test_fractions_are_drawn(tmp_path):
    rows = [{"contest": "a 4x4", "peer": peer, "fraction_of_limit": value} for peer, value in [("x", 0.5), ("y", None)]]
    plot_fractions(rows, tmp_path / "plot.png", "title")
    plot_fractions([], tmp_path / "empty.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")
