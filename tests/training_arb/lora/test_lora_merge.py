"""Merging an adapter into integer weights: the arithmetic, what the loss says, and what is refused."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model

from arb_kernels.formats.momentum_format import MomentumFormat
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import ROOT
from support.tensors import assert_same
from training_arb.data.chat_data import ConversationDataset, collate_conversations, read_conversations
from training_arb.lora import lora_merge
from training_arb.lora.lora_adapter import add_adapter, assistant_loss, base_hash
from training_arb.lora.lora_merge import (
    ROUNDINGS,
    _merge_layer,
    input_moments,
    merge_adapter,
    mergeable_layers,
    round_compensated,
    weight_change,
)
from training_arb.memory.state_audit import audit_model

CHATS = read_conversations(ROOT / "training_arb" / "data" / "instructions.jsonl", 160).kept[:16]
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 2}


def base(trits=1, **overrides):
    """A small model: of the same levels whatever the overrides."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "trits_per_weight": trits}
    model, other = (ArbForCausalLM(preset_config("arb-tiny", **shape, **extra)) for extra in ({}, overrides))
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".T_packed", ".E"))}
    other.load_state_dict(weights, strict=False)
    return other.eval()


@cache
def learned(trits):
    """Adapter weights that have learned something, by name."""
    model = add_adapter(base(trits), r=2, alpha=4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    batch = collate_conversations([ConversationDataset(CHATS)[i] for i in range(len(CHATS))])
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


@pytest.fixture
def trained():
    return learned(1)


def tuned(trained, **overrides):
    model = add_adapter(base(**overrides), r=2, alpha=4)
    model.load_state_dict(trained, strict=False)
    return model.eval()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("trits", "training_state"), [(1, True), (1, False), (2, True)])
def test_a_merged_model_is_integers_and_better_than_its_base(tmp_path, rounding, trits, training_state):
    model = tuned(learned(trits), trits=trits, training_state=training_state)
    untouched, wanted = assistant_loss(base(trits), CHATS), assistant_loss(model, CHATS)
    merged, report = merge_adapter(model, CHATS, rounding)
    assert type(merged) is ArbForCausalLM
    assert list(merged.named_parameters()) == [] and audit_model(merged).clean
    assert (report.loss_base, report.loss_adapter) == pytest.approx((untouched, wanted), rel=1e-5)
    assert report.loss_merged < report.loss_base and report.flips > 0
    assert 0 < report.kept == (report.loss_base - report.loss_merged) / (report.loss_base - report.loss_adapter)
    merged.save_pretrained(tmp_path)
    again = ArbForCausalLM.from_pretrained(tmp_path).eval()
    assert assistant_loss(again, CHATS) == pytest.approx(report.loss_merged, rel=1e-6)


def test_passing_errors_on_keeps_a_layers_outputs(trained):
    """By the squared error of outputs over the inputs that the conversations give."""
    model = tuned(trained)
    layers, errors = mergeable_layers(model), {"nearest": 0.0, "compensated": 0.0}
    with torch.no_grad():
        moments = input_moments(model, layers, CHATS, 16)
        for name, layer in layers.items():
            wanted = layer.get_base_layer().levels() + weight_change(layer) / layer.get_base_layer().scale()
            rounded = {"nearest": wanted.round().clamp(-1, 1), "compensated": round_compensated(wanted, moments[name])}
            for rounding, trits in rounded.items():
                off = (trits - wanted) * layer.get_base_layer().scale()
                errors[rounding] += ((off @ moments[name]) * off).sum().item()
    assert errors["compensated"] < 0.9 * errors["nearest"]


@pytest.mark.parametrize(("bits", "trits"), [(4, 1), (8, 1), (4, 2)])
def test_nearest_goes_by_level_residual_and_change(bits, trits):
    model = tuned(learned(trits), trits=trits, momentum_bits=bits)
    layer = next(iter(mergeable_layers(model).values()))
    matrix, form = layer.get_base_layer(), MomentumFormat(bits)
    levels, largest = matrix.levels().double(), matrix.largest_level
    residual, momentum = (part.clone() for part in form.split(matrix.accum))
    with torch.no_grad():
        latent = levels + residual / form.cell + weight_change(layer).double() / matrix.scale()
        flips = _merge_layer(layer, "nearest", None, 0)
    wanted = latent.round().clamp(-largest, largest)
    left = ((latent - wanted) * form.cell).round().clamp(-form.cell // 2, form.cell // 2 - 1)
    new_residual, new_momentum = form.split(matrix.accum)
    assert (matrix.levels() != wanted).sum() <= 1  # halves: float32 against float64
    assert (new_residual != left).float().mean() < 1e-3
    assert_same("momentum", momentum, new_momentum)
    assert flips == (wanted != levels).sum() > 0


def test_weight_change_is_what_the_adapter_adds(trained):
    for settings in ({}, {"use_dora": True}):
        model = get_peft_model(base(compute="float"), LoraConfig(**LORA, init_lora_weights=False, **settings)).eval()
        layer = next(iter(mergeable_layers(model).values()))
        if settings:
            layer.lora_magnitude_vector["default"].weight.data.mul_(1.3)
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            added = layer(x) - layer.get_base_layer()(x)
            assert torch.allclose(x @ weight_change(layer).T, added, atol=1e-4)


def test_stochastic_rounding_is_right_in_the_mean(trained):
    model = tuned(trained, training_state=False)
    layer = next(iter(mergeable_layers(model).values()))
    matrix = layer.get_base_layer()
    packed = matrix.T_packed.clone()
    total = torch.zeros(matrix.rows, matrix.columns)
    with torch.no_grad():
        wanted = (matrix.levels() + weight_change(layer) / matrix.scale()).clamp(-1, 1)
        for key in range(400):
            matrix.T_packed.copy_(packed)
            _merge_layer(layer, "stochastic", None, key)
            total += matrix.levels()
    assert (total / 400 - wanted).abs().max() < 0.15  # six standard deviations of a mean of 400


@pytest.mark.parametrize("largest", [1, 4])
def test_compensation_lowers_the_error_of_outputs(largest):
    inputs = torch.randn(300, 12) @ torch.randn(12, 70) + 0.1 * torch.randn(300, 70)
    wanted = torch.randint(-largest, largest + 1, (20, 70)) + 0.3 * torch.randn(20, 70)
    compensated = round_compensated(wanted, inputs.T @ inputs, largest)
    nearest = wanted.round().clamp(-largest, largest)
    assert set(compensated.unique().tolist()) == set(range(-largest, largest + 1))
    error, plain = (((levels - wanted) @ inputs.T).norm() for levels in (compensated, nearest))
    assert error < 0.6 * plain


def test_compensation_of_unrelated_inputs_is_nearest():
    wanted = 1.5 * torch.randn(9, 130)
    assert_same("trits", wanted.round().clamp(-1, 1), round_compensated(wanted, torch.rand(130).diag()))
    assert_same("unused", wanted.round().clamp(-1, 1), round_compensated(wanted, torch.zeros(130, 130)))


def test_moments_leave_padding_out():
    model = add_adapter(base(), r=2, alpha=4).eval()
    layers = mergeable_layers(model)
    with torch.no_grad():
        together = input_moments(model, layers, CHATS[:4], 4)
        alone = [input_moments(model, layers, [chat], 1) for chat in CHATS[:4]]
    for name in layers:
        assert torch.allclose(together[name], sum(part[name] for part in alone), rtol=1e-3, atol=1e-2)


def test_an_adapter_that_gains_nothing_is_refused():
    model = add_adapter(base(), r=2, alpha=4)
    before = base_hash(model)
    with pytest.raises(ValueError, match=r"it does not lower the loss: (\S+) base, \1 with it"):
        merge_adapter(model, CHATS[:4])
    assert base_hash(model) == before


def test_a_merge_that_loses_the_gain_is_undone(trained, monkeypatch):
    model, ids = tuned(trained), torch.tensor([CHATS[0].ids])
    before, adapted = base_hash(model), model(input_ids=ids).logits
    monkeypatch.setattr(lora_merge, "round_compensated", lambda wanted, moments, largest: -wanted.sign())
    with pytest.raises(ValueError, match=r"its gain is lost in rounding: compensated: loss .* merged \(-"):
        merge_adapter(model, CHATS)
    assert base_hash(model) == before
    assert torch.equal(model(input_ids=ids).logits, adapted)


def test_what_integers_cannot_hold_is_refused():
    with_bias = get_peft_model(base(), LoraConfig(**LORA, lora_bias=True))
    with_copy = get_peft_model(base(), LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["mlp"]))
    two = get_peft_model(base(), LoraConfig(**LORA, use_dora=True))
    two.add_adapter("other", LoraConfig(**LORA))
    two.base_model.set_adapter(["default", "other"])
    for model, said in ((with_bias, "lora_bias"), (with_copy, "modules_to_save"), (two, "DoRA merges alone")):
        with pytest.raises(ValueError, match=said):
            merge_adapter(model, CHATS[:4])
    with pytest.raises(ValueError, match="rounding='up'"):
        merge_adapter(add_adapter(base(), r=2, alpha=4), CHATS[:4], "up")


def test_an_adapter_of_broken_numbers_is_refused(trained):
    model = tuned(trained)
    layer = next(iter(mergeable_layers(model).values()))
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = base_hash(model)
    with pytest.raises(ValueError, match="nan with it"):
        merge_adapter(model, CHATS[:4], "nearest")
    assert base_hash(model) == before


def test_stock_merging_names_the_way_that_works():
    model = get_peft_model(base(), LoraConfig(**LORA, init_lora_weights=False)).eval()
    before = base_hash(model)
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match=r"lora_merge\.merge_adapter or scripts/finetune_lora\.py --merge"):
            merge()
    assert base_hash(model.unload()) == before
