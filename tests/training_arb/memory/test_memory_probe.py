"""Where a step's memory is: by area and by phase, and nothing is left behind."""

import json

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from support.tensors import random_text
from training_arb.memory.counted_tensors import BLOCK_MLP, CountedTensors
from training_arb.memory.memory_probe import describe_probes, probe_step, probe_table, state_by_area
from training_arb.memory.state_audit import audit_model, state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer


def make(preset):
    torch.manual_seed(0)
    return ArbForCausalLM(preset_config(preset))


@pytest.fixture(scope="module")
def full():
    """Every block: the model, its optimizer, and the probes of two steps after a first."""
    model = make("arb-tiny-full")
    optimizer, ids = IntegerOptimizer(model), random_text(0, 2, 24)
    probe_step(model, optimizer, ids)
    return model, optimizer, [probe_step(model, optimizer, ids) for _ in range(2)]


def test_every_area_saves_and_nothing_piles_up(full):
    model, _, (first, second) = full
    areas = {*audit_model(model).areas, BLOCK_MLP, "other"}
    assert first.saved.keys() == areas
    assert first.left == second.left
    assert sum(first.left.values()) < 0.02 * sum(first.saved.values())
    assert sum(first.saved.values()) <= first.peaks["forward"] <= first.peaks["backward"]


def test_state_by_area_is_the_audits_with_the_mlp_apart(full):
    audit = audit_model(full[0])
    state = state_by_area(audit)
    assert sum(state.values()) == audit.state_bytes
    blocks = sum(row.bytes for row in audit.tensors if row.area == "MLA attention")
    assert state["MLA attention"] + state[BLOCK_MLP] == blocks and state[BLOCK_MLP] > 0


def test_a_probe_counts_what_the_same_step_without_areas_does():
    probed, counted = make("arb-tiny"), make("arb-tiny")
    ids = random_text(0, 2, 24)
    probe = probe_step(probed, IntegerOptimizer(probed), ids)
    optimizer = IntegerOptimizer(counted)
    with CountedTensors() as tensors:
        loss = counted(ids, labels=ids).loss
        assert tensors.alive_by_area() == {"other": sum(probe.saved.values())}
        loss.backward()
        optimizer.step()
    assert tensors.peak == max(probe.peaks.values())
    assert state_hash(probed) == state_hash(counted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in probed.modules())


def test_a_leak_is_left_in_its_area():
    model, kept = make("arb-tiny"), []
    hook = model.byte_head.register_forward_hook(lambda _, given, out: kept.append(out.detach().clone()))
    ids = random_text(0, 2, 24)
    probe = probe_step(model, IntegerOptimizer(model), ids)
    hook.remove()
    assert probe.left == {"ByteHead": kept[0].numel() * 4}


def test_without_an_optimizer_a_forward_saves_nothing():
    model = make("arb-tiny")
    before = state_hash(model)
    probe = probe_step(model, None, random_text(0, 2, 24))
    assert (probe.saved, list(probe.peaks)) == ({}, ["forward"]) and probe.peaks["forward"] > 0
    assert state_hash(model) == before


def test_the_table_names_every_area_and_phase(full):
    model, _, probes = full
    described = describe_probes(state_by_area(audit_model(model)), probes)
    lines = probe_table(described).splitlines()
    assert [line for line in lines if line.startswith("total")]
    for name in (*described["areas"], "forward", "backward", "update"):
        assert any(line.startswith(name) for line in lines)


@pytest.mark.parametrize("preset", ["arb-tiny", "arb-tiny-full"])
def test_smoke_probes_memory_over_steps(preset, tmp_path, capsys):
    out = tmp_path / "smoke.json"
    shape = ["--preset", preset, "--ctx", 16, "--batch", 2, "--steps", 3, "--backward", "--json", out]
    assert run_script("smoke", *shape) == 0
    result = json.loads(out.read_text())
    live, peaks = result["live_mb_by_step"], result["peak_mb_by_step"]
    assert len(live) == len(peaks) == 3
    assert max(live) - min(live) < 1 and peaks[-1] - peaks[0] < 4
    assert sum(area["state_mb"] for area in result["areas"].values()) == pytest.approx(result["state_bytes"] / 2**20)
    assert all(len(area["saved_mb"]) == len(area["left_mb"]) == 3 for area in result["areas"].values())
    assert set(result["phases"]) == {f"{phase}_peak_mb" for phase in ("forward", "backward", "update")}
    assert "saved, last step" in capsys.readouterr().out
