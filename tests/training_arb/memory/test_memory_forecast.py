"""Counting a step's tensors, and forecasting a larger step from smaller ones."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from training_arb.memory.counted_tensors import CountedTensors
from training_arb.memory.live_memory import MEGABYTE
from training_arb.memory.memory_forecast import StepMemory, StepTrace, forecast_step, measure_step
from training_arb.optim.integer_optimizer import IntegerOptimizer


def test_tensors_are_counted_while_they_live():
    before = torch.ones(1000)
    with CountedTensors() as counted:
        first = before + 1
        view = first[10:20]
        before.add_(1)
        assert counted.now == 4000
        second = torch.cat([first, first])
        assert counted.now == counted.peak == 12000
        del first, second
        assert counted.now == 4000  # the view holds on
        del view
        assert (counted.now, counted.peak) == (0, 12000)
    assert counted.sizes == [4000, 8000]
    assert counted.events == [0, 1, ~1, ~0]


def test_large_blocks_are_told_from_the_heaps():
    large, small = 40 << 20, 1 << 20
    trace = StepTrace(7, [small, large, small], [0, 1, ~1, 2, ~0, ~2], forward_events=2)
    memory = trace.memory()
    assert memory == StepMemory(7, small + large, small + large, 2 * small, large)
    assert memory.peak == 7 + small + large
    grown = memory.process_peak_mb(100.0) - StepMemory(7, 0, 0, 0, 0).process_peak_mb(100.0)
    assert grown - large / MEGABYTE == pytest.approx(2, rel=0.5)  # of the heap, with its holes
    assert grown - large / MEGABYTE > 2
    recomputed = replace(memory, recomputed=True)
    assert recomputed.process_peak_mb(0.0) > memory.process_peak_mb(0.0) + large / MEGABYTE / 2


def make(preset, **changes):
    torch.manual_seed(0)
    return ArbForCausalLM(preset_config(preset, **changes))


@pytest.mark.parametrize(
    ("preset", "batch", "ctx"),
    [
        pytest.param("arb-small", 8, 150, id="small"),
        pytest.param("arb-small", 3, 150, id="measured-as-it-is"),
        pytest.param("arb-tiny-full", 16, 96, id="every-block"),
        pytest.param("arb-14m", 5, 150, id="14m"),
    ],
)
def test_a_forecast_is_right_within_ten_per_cent(preset, batch, ctx):
    forecast = forecast_step(make(preset), batch, ctx)
    model = make(preset)
    optimizer = IntegerOptimizer(model)
    measure_step(model, optimizer, 1, ctx)
    measured = measure_step(model, optimizer, batch, ctx)
    assert forecast.state == measured.state
    assert forecast.transient_peak == pytest.approx(measured.transient_peak, rel=0.1)
    assert forecast.saved == pytest.approx(measured.saved, rel=0.1)
    assert forecast.heap_peak + forecast.mapped_peak == pytest.approx(measured.transient_peak, rel=0.1)
    assert measured.saved < measured.transient_peak < 2 * measured.saved


def test_a_dense_models_forecast_is_exact():
    forecast, model = forecast_step(make("arb-tiny"), 11, 40), make("arb-tiny")
    optimizer = IntegerOptimizer(model)
    measure_step(model, optimizer, 1, 40)
    assert forecast == measure_step(model, optimizer, 11, 40)


def test_checkpointing_saves_less_and_the_forecast_knows():
    model = make("arb-small", num_hidden_layers=6)
    plain = forecast_step(model, 4, 64)
    model.activation_checkpointing_enable()
    assert forecast_step(model, 4, 64).peak < 0.6 * plain.peak


def test_a_forecast_leaves_the_model_without_an_optimizer():
    model = make("arb-tiny")
    forecast_step(model, 4, 32)
    assert not any(matrix.armed for matrix in model.ternary_matrices().values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads a process's peak")
def test_the_peak_of_a_process_is_forecast_within_ten_per_cent(tmp_path, capsys):
    out = tmp_path / "memory.json"
    shapes = ["arb-tiny:64x128", "arb-tiny:64x128+checkpointing"]
    assert run_script("bench_memory", "--steps", 2, "--json", out, "--shapes", *shapes) == 0
    plain, checkpointed = json.loads(out.read_text())["rows"]
    for row in (plain, checkpointed):
        forecast = row["base_mb"] + row["forecast_mb"] - row["forecast_base_mb"]  # pytest has imported more
        assert forecast == pytest.approx(row["peak_mb"], rel=0.1)
        assert row["peak_mb"] > row["base_mb"] + row["tensors_mb"]
    assert checkpointed["saved_mb"] < 0.3 * plain["saved_mb"]
    assert "error_above_base" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["arb-tiny", "arb-tiny:3", "arb-9z:2x16", "arb-tiny:0x16", "arb-tiny:2x4"])
def test_the_bench_refuses_what_is_no_shape(shape, capsys):
    assert run_script("bench_memory", "--shapes", shape) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
