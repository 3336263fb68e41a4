"""Starting from a checkpoint with another number of trits a weight: exact from one to two, least squares back."""

import pytest
import torch

from arb_kernels.formats.momentum_format import MomentumFormat
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.tensors import assert_same
from training_arb.checkpoints.starting_point import describe_start, start_from
from training_arb.checkpoints.trit_conversion import halve_scale, round_to_one_trit
from training_arb.memory.state_audit import audit_model

IDS = torch.tensor([list(b"def f(x): return x + 1\n")])
FORM = MomentumFormat()


def saved(folder, preset="arb-tiny-full", training_state=True, **fields):
    """A checkpoint with random weights and random training state."""
    torch.manual_seed(1)
    model = ArbForCausalLM(preset_config(preset, **{"table_rule": "momentum", **fields})).eval()
    for matrix in model.ternary_matrices().values():
        if hasattr(matrix, "accum"):
            matrix.accum.copy_(torch.randint(0, 128, matrix.accum.shape))
            matrix.accum_exp.copy_(torch.randint(-90, -40, matrix.accum_exp.shape))
    model.save_pretrained(folder, training_state=training_state)
    return model


def weights(model):
    return {name: matrix.effective_weight(torch.float32) for name, matrix in model.ternary_matrices().items()}


@pytest.mark.parametrize(
    ("group_size", "compute", "training_state"),
    [(0, "int8", True), (0, "float", False), (32, "float", True), (32, "float", False)],
)
def test_two_trits_keep_the_function_of_one(tmp_path, group_size, compute, training_state):
    given = {"group_size": group_size, "compute": compute, "training_state": training_state}
    stored = saved(tmp_path, **given)
    model, origin = start_from(str(tmp_path), fields={"trits_per_weight": 2})
    assert model.config.trits_per_weight == 2 and audit_model(model).clean
    kept_weights = weights(model)
    for name, weight in weights(stored).items():
        assert_same(name, weight, kept_weights[name])
    assert torch.equal(model.eval()(IDS).logits, stored(IDS).logits)
    for name, matrix in model.ternary_matrices().items():
        before = stored.ternary_matrices()[name]
        for key in ("accum", "accum_exp"):
            kept = getattr(before, key) if training_state else torch.zeros_like(getattr(matrix, key))
            assert_same(f"{name}.{key}", kept, getattr(matrix, key))
    assert origin["relative_rms_error"] == 0
    assert describe_start(origin, model.config).endswith(
        f"; trits a weight from 1 to 2, {len(kept_weights)} matrices converted without error"
    )
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(ArbForCausalLM.from_pretrained(tmp_path / "again").eval()(IDS).logits, stored(IDS).logits)


@pytest.mark.parametrize("group_size", [5, 13])
def test_every_scale_is_halved_or_stays(group_size):
    levels = torch.randint(-1, 2, (256, 13), dtype=torch.int8)
    exponent = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(-1, -(-13 // group_size)).contiguous()
    finer, lowered = halve_scale(levels, exponent, group_size)
    kept = torch.arange(-128, 128) < -120
    assert_same("kept", levels[kept], finer[kept])
    assert_same("doubled", 2 * levels[~kept], finer[~kept])
    assert_same("E", torch.where(kept[:, None], exponent, exponent - 8), lowered)


def least_error(levels):
    """Of one group: the sum of squares in units of S, least over the thresholds."""
    sizes = levels.abs().double()
    errors = []
    for threshold in range(1, 5):
        kept = sizes >= threshold
        mean = sizes[kept].mean() if kept.any() else torch.tensor(1.0)
        scale = 2 ** ((mean.log2() * 8).round() / 8)
        errors.append(((sizes - kept * scale) ** 2).sum())
    return torch.stack(errors).min()


@pytest.mark.parametrize("group_size", [4, 11, 30])
def test_one_trit_is_the_best_of_four_thresholds(group_size):
    torch.manual_seed(0)
    spread = torch.rand(40, 1) * 3
    levels = (torch.randn(40, 30) * spread).round().clamp(-4, 4).to(torch.int8)
    levels[3] = 0
    exponent = torch.randint(-100, 100, (40, -(-30 // group_size)), dtype=torch.int8)
    exponent[5:7] = 127
    trits, raised = round_to_one_trit(levels, exponent, group_size)
    assert trits.abs().max() == 1 and not trits[3].any() and torch.equal(raised[3], exponent[3])
    assert (raised[5:7] == 127).all()
    for row in set(range(40)) - {5, 6}:
        for group, columns in enumerate(torch.arange(30).split(group_size)):
            factor = 2 ** (int(raised[row, group] - exponent[row, group]) / 8)
            off = levels[row, columns].double() - trits[row, columns].double() * factor
            assert off.square().sum() == pytest.approx(least_error(levels[row, columns]).item(), abs=1e-9)


@pytest.mark.parametrize("training_state", [True, False], ids=["resumable", "inference"])
def test_one_trit_takes_the_nearest_weights_and_says_the_error(tmp_path, training_state):
    stored = saved(tmp_path, trits_per_weight=2, training_state=training_state)
    model, origin = start_from(str(tmp_path), fields={"trits_per_weight": 1})
    before, after = weights(stored), weights(model)
    off = {name: (before[name] - after[name]).norm().item() for name in before}
    relative = {name: off[name] / before[name].norm().item() for name in before}
    worst = max(relative, key=relative.get)
    total = sum(value**2 for value in off.values()) ** 0.5 / sum(w.norm().item() ** 2 for w in before.values()) ** 0.5
    assert origin["relative_rms_error"] == pytest.approx(total, rel=1e-4) and 0.1 < total < 0.4
    assert origin["largest_error"] == {"matrix": worst, "relative_rms_error": pytest.approx(relative[worst], rel=1e-4)}
    line = describe_start(origin, model.config)
    assert f"trits a weight from 2 to 1, {len(before)} matrices converted with a relative RMS error of" in line
    assert f"{total:.2%}, at most {relative[worst]:.2%} ({worst})" in line
    for name, matrix in model.ternary_matrices().items():
        two = stored.ternary_matrices()[name]
        residual, codes = FORM.split(two.accum) if training_state else (torch.zeros_like(two.levels()), None)
        place = (two.levels() + residual / 16) * two.scale() / matrix.scale() - matrix.levels()
        left, kept = FORM.split(matrix.accum)
        steps = (place * 16).clamp(-8, 7)
        assert (left - steps).abs().max() <= 0.5001, name
        assert_same(name, torch.zeros_like(kept) if codes is None else codes, kept)


def test_only_roles_whose_number_changes_are_converted(tmp_path):
    stored = saved(tmp_path, trits_per_weight={"head": 2, "mlp": 2})
    model, origin = start_from(str(tmp_path), fields={"trits_per_weight": {"head": 2, "embedding": 2}})
    changed = {name for name, m in model.ternary_matrices().items() if m.role in ("mlp", "embedding")}
    assert model.config.trits_per_weight == {"head": 2, "embedding": 2} and origin["converted_matrices"] == len(changed)
    state = stored.state_dict()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in changed:
            assert_same(name, state[name], tensor)


def test_a_rule_without_levels_takes_one_trit_in_the_same_command(tmp_path):
    saved(tmp_path, "arb-tiny", trits_per_weight=2)
    with pytest.raises(ValueError, match="trits_per_weight=2 must be 1 with update_rule='flip'"):
        start_from(str(tmp_path), fields={"update_rule": "flip"})
    model, origin = start_from(str(tmp_path), fields={"update_rule": "flip", "trits_per_weight": 1})
    assert {matrix.trits for matrix in model.ternary_matrices().values()} == {1} and not origin["training_state"]
    assert not any(matrix.T_accum.any() for matrix in model.ternary_matrices().values())
    assert "its votes start at zero; trits a weight from 2 to 1" in describe_start(origin, model.config)


def test_flip_grows_into_momentum_with_two_trits(tmp_path):
    stored = saved(tmp_path, "arb-tiny", update_rule="flip", group_size=32)
    model, _ = start_from(str(tmp_path), fields={"update_rule": "momentum", "trits_per_weight": 2})
    assert torch.equal(model.eval()(IDS).logits, stored(IDS).logits)


def test_tables_that_vote_stay_at_one_trit(tmp_path):
    saved(tmp_path, table_rule="votes")
    with pytest.raises(ValueError, match="trits_per_weight=2 must be 1 for tables with table_rule='votes'"):
        start_from(str(tmp_path), fields={"trits_per_weight": 2})
    finer = {"table_rule": "momentum", "trits_per_weight": 2}
    assert {m.trits for m in start_from(str(tmp_path), fields=finer)[0].ternary_matrices().values()} == {2}
