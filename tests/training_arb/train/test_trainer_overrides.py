"""What our trainers override of transformers' private methods, each for a reason, under the version that is pinned.

A minor version of transformers may rename any of them without notice: a new one takes a look at this list, at
`transformers>=` in setup.cfg and a run of these tests.
"""

from configparser import ConfigParser

import pytest
import transformers
from packaging.requirements import Requirement
from transformers import Trainer

from support.scripting import ROOT
from training_arb.lora.lora_trainer import LoraTrainer
from training_arb.train.trainer_arb import ArbTrainer

SAVING = {
    "_save_checkpoint": "run.json comes first and checksums.json last; a full disk costs one checkpoint",
    "_load_from_checkpoint": "every file is checked, and the run's settings compared, before anything is loaded",
    "_determine_best_metric": "a step without a checkpoint cannot become the best one",
}
REASONS = {
    LoraTrainer: SAVING,
    ArbTrainer: {**SAVING, "_wrap_model": "DistributedDataParallel refuses a model without float parameters"},
}


def private_overrides(trainer):
    ours = trainer.__mro__[: trainer.__mro__.index(Trainer)]
    found = {name for part in ours for name in vars(part) if name.startswith("_") and not name.startswith("__")}
    return {name for name in found if hasattr(Trainer, name)}


def set_privately(trainer):
    """Private names that our classes call on the trainer and Trainer has, apart from those overridden."""
    ours = trainer.__mro__[: trainer.__mro__.index(Trainer)]
    used = {name for part in ours for method in vars(part).values() for name in names_in(method)}
    return {name for name in used if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}


def names_in(method):
    function = getattr(method, "fget", method)
    return getattr(getattr(function, "__code__", None), "co_names", ())


@pytest.mark.parametrize("trainer", REASONS)
def test_private_methods_of_the_trainer_that_we_override(trainer):
    assert private_overrides(trainer) == REASONS[trainer].keys()
    assert all(REASONS[trainer].values())


@pytest.mark.parametrize("trainer", REASONS)
def test_private_methods_of_the_trainer_that_we_call(trainer):
    assert set_privately(trainer) - private_overrides(trainer) <= {"_finish_current_push"}


def test_transformers_is_pinned_to_the_minor_version_that_is_tested():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (pin,) = (line for line in setup["options"]["install_requires"].split("\n") if line.startswith("transformers"))
    installed = transformers.__version__
    major, minor, _ = installed.split(".", 2)
    assert installed in Requirement(pin).specifier
    assert f"{major}.{int(minor) + 1}.0" not in Requirement(pin).specifier
