"""Counting a step's tensors, and forecasting a larger step from smaller ones."""

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.integer_optimizer import IntegerOptimizer
from training_arb.memory_forecast import CountedTensors, forecast_step, measure_step


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


def test_checkpointing_saves_less_and_the_forecast_knows():
    model = make("arb-small", num_hidden_layers=6)
    plain = forecast_step(model, 4, 64)
    model.gradient_checkpointing_enable()
    assert forecast_step(model, 4, 64).peak < 0.6 * plain.peak


def test_a_forecast_leaves_the_model_without_an_optimizer():
    model = make("arb-tiny")
    forecast_step(model, 4, 32)
    assert not any(matrix.armed for matrix in model.ternary_matrices().values())
