"""When a loss counts as exploding."""

import math

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from training_arb.checkpoints.checkpoint_files import write_checksums
from training_arb.train.divergence import DivergenceStop, strikes

FALLING = [6.0, 4.0, 3.0, 2.5, 2.2, 2.0]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 0),
        ([9.0], 0),
        (FALLING, 0),
        ([*FALLING, 8.0], 0),  # below three times the mean of a loss that was 6 not long ago
        ([*FALLING, 20.0], 1),
        ([*FALLING, 20.0, 30.0, 40.0], 3),  # what is above does not lift the mean
        ([*FALLING, 20.0, 2.0], 0),
        ([*FALLING, 20.0, 2.0, 20.0], 1),
        ([*FALLING, math.nan], 1),
        ([*FALLING, math.inf, 2.0, -math.inf], 1),
        ([math.nan, math.nan], 2),
    ],
)
def test_strikes(losses, expected):
    assert strikes(losses, 3.0) == expected


def test_without_a_factor_only_what_is_not_finite_counts():
    assert strikes([1.0, 1e30], math.inf) == 0
    assert strikes([1.0, math.nan], math.inf) == 1


def feed(losses, tmp_path, **settings):
    """The losses, logged every 10 steps; returns the last control."""
    stop = DivergenceStop(**{"factor": 3.0, "patience": 3, **settings})
    args, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerState()
    for i, loss in enumerate(losses):
        control = TrainerControl(should_save=True)
        state.global_step = 10 * (i + 1)
        state.log_history.append({"loss": loss, "step": state.global_step})
        stop.on_log(args, state, control, logs=state.log_history[-1])
    return control


def test_stops_after_patience_naming_the_last_checkpoint_from_before(tmp_path):
    for step in (40, 60, 70):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_checksums(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-65").mkdir()  # unfinished
    assert feed([*FALLING, 20.0], tmp_path).should_save is False
    assert feed([*FALLING, 20.0, 2.0], tmp_path).should_save is True
    feed([*FALLING, 20.0, 20.0], tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 90: the loss is 20 and .* for 3 logs; .*checkpoint-60$"):
        feed([*FALLING, 20.0, 20.0, 20.0], tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 70: the loss is nan; .*checkpoint-60$"):
        feed([*FALLING, math.nan], tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 10: the loss is inf; no checkpoint from before"):
        feed([math.inf], tmp_path)
    feed([*FALLING, *[20.0] * 9], tmp_path, factor=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"factor": 1.0}, "stop_loss_factor=1.0"),
        ({"factor": math.nan}, "stop_loss_factor=nan"),
        ({"patience": 0}, "stop_loss_patience=0"),
    ],
)
def test_impossible_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        DivergenceStop(**{"factor": 3.0, "patience": 3, **settings})
