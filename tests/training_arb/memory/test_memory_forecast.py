"""Counting a step's tensors, and forecasting a larger step from smaller ones."""

import json
import sys

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from training_arb.memory.counted_tensors import CountedTensors
from training_arb.memory.memory_forecast import FIRST_STEP_MB, StepMemory, StepTrace, forecast_step, measure_step
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


def test_a_trace_gives_the_peak_and_what_the_forward_left():
    trace = StepTrace(7, [10, 40, 30], [0, 1, ~1, 2, ~0, ~2], forward_events=2)
    memory = trace.memory()
    assert memory == StepMemory(state=7, saved=50, transient_peak=50)
    assert memory.peak == 57


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_process_is_forecast_by_a_margin_over_its_tensors(recomputed):
    memory = StepMemory(100 << 20, 200 << 20, 300 << 20, recomputed)
    assert memory.process_peak_mb(500.0) == 500 + FIRST_STEP_MB + memory.margin * 400
    assert memory.margin == (2.4 if recomputed else 1.6)


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
def test_the_peak_of_a_process_is_forecast_from_above_within_its_margin(tmp_path, capsys):
    """Tensors, and at most the stated multiple of them: never less, never more."""
    out = tmp_path / "memory.json"
    shapes = ["arb-tiny:64x128", "arb-tiny:64x128+checkpointing"]
    run = ["--steps", 2, "--trits_per_weight", 2, "--json", out, "--shapes", *shapes]
    assert run_script("bench_memory", *run) == 0
    plain, checkpointed = json.loads(out.read_text())["rows"]
    for row in (plain, checkpointed):
        assert row["trits_per_weight"] == "2"
        assert 1 < row["over_tensors"] < row["margin"]
        forecast = row["base_mb"] + row["forecast_mb"] - row["forecast_base_mb"]  # pytest has imported more
        assert row["peak_mb"] < forecast < 1.25 * row["peak_mb"]
    assert checkpointed["saved_mb"] < 0.3 * plain["saved_mb"]
    assert "over_tensors" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["arb-tiny", "arb-tiny:3", "arb-9z:2x16", "arb-tiny:0x16", "arb-tiny:2x4"])
def test_the_bench_refuses_what_is_no_shape(shape, capsys):
    assert run_script("bench_memory", "--shapes", shape) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
