"""The other scripts as a user runs them: evaluate, benchmark; their numbers, JSON keys and refusals."""

import json
import math

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from training_arb.bench.ablation import variant_config, worst_spike
from training_arb.bench.float_baselines import ArbFloatBaseline
from training_arb.bench.quality_benchmark import DEFAULT_CONFIGS, rate_at
from training_arb.memory.state_audit import audit_config

TEXT = b"The quick brown fox jumps over the lazy dog. " * 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(path, training_state=False)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_bytes(TEXT)
    return path


def test_evaluate_agrees_with_one_byte_at_a_time(folder, corpus, tmp_path):
    arguments = ["--data", corpus, "--max_bytes", 90, "--ctx", 32, "--stride", 16, "--json", tmp_path / "score.json"]
    assert run_script("evaluate", folder, *arguments) == 0
    scores = json.loads((tmp_path / "score.json").read_text())
    model = ArbForCausalLM.from_pretrained(folder).eval()
    ids = list(TEXT[:90])
    nats = 0.0
    for position in range(3, 90):  # the window that first reaches this position
        begin = 0 if position < 32 else min((position - 32) // 16 * 16 + 16, 90 - 32)
        logits = model(torch.tensor([ids[begin:position]])).logits[0, -1].double()
        nats -= torch.log_softmax(logits, -1)[ids[position]].item()
    assert scores["bytes"] == 87
    assert scores["nats_per_byte"] == pytest.approx(nats / 87, abs=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(nats / 87 / math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("evaluate", ["nowhere", "--data", "x"], "data='x'"),
        ("evaluate", ["MODEL", "--data", "EMPTY"], "is empty"),
        ("evaluate", ["MODEL", "--data", "CORPUS", "--ctx", 3], "ctx=3"),
        ("evaluate", ["MODEL", "--data", "CORPUS", "--stride", 300], "stride=300"),
        ("evaluate", ["MODEL", "--data", "CORPUS", "--max_bytes", -1], "max_bytes=-1"),
        ("evaluate", ["MODEL", "--data", "CORPUS", "--max_bytes", 2], "bytes=2"),
        ("benchmark_true_ternary", ["--configs", "Lion", "--data", "CORPUS"], "configs='Lion'"),
        ("benchmark_true_ternary", ["--data", "nowhere.txt"], "data='nowhere.txt'"),
        ("benchmark_true_ternary", ["--data", "EMPTY"], "is empty"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--ctx", 5000], "ctx=5000"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--steps", 0], "steps=0"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--micro-batches", 3], "micro_batches=3"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--preset", "arb-9z"], "preset='arb-9z'"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--adam-rates", "fast"], "adam_rates='fast'"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--accum-threshold", 200], "flip_threshold=200"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--reuse-base", "--json", "none.json"], "none.json"),
        ("benchmark_true_ternary", ["--data", "CORPUS", "--update-backend", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, corpus, tmp_path, capsys, monkeypatch, script, arguments, said):
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr(torch.Tensor, "backward", None)  # whatever is wrong must be found before training starts
    names = {"MODEL": folder, "CORPUS": corpus, "EMPTY": tmp_path / "empty.txt"}
    assert run_script(script, *(names.get(argument, argument) for argument in arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert said in errors[0]


@pytest.mark.parametrize("script", ["pretrain", "benchmark_true_ternary", "audit_state", "evaluate", "export_hub"])
def test_help_shows_examples(script, capsys):
    assert run_script(script, "--help") == 0
    assert f"python scripts/{script}.py" in capsys.readouterr().out


def test_benchmark_writes_its_contract(corpus, tmp_path, capsys):
    out = tmp_path / "out.json"
    settings = ["--data", corpus, "--preset", "arb-tiny", "--steps", 6, "--batch", 2, "--ctx", 32, "--print-every", 3]
    settings += ["--adam-rates", "3e-3,1e-2", "--json", out]
    assert run_script("benchmark_true_ternary", *settings) == 0
    result = json.loads(out.read_text())
    assert {"configs", "data", "steps", "seed", "env"} <= result.keys()
    keys = ["val_loss", "val_bpb", "train_loss_final", "state_bytes", "state_bytes_per_weight", "logical_weights"]
    keys += ["trainable_float_params", "step_ms_median", "peak_mem_mb", "learning_rate"]
    assert {*result["configs"]} == {*DEFAULT_CONFIGS}
    for name, row in result["configs"].items():
        assert {*keys} <= row.keys()
        assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2))
        assert (row["trainable_float_params"] == 0) == (not name.startswith("Adam"))
        assert row["logical_weights"] == 171_008
        assert row["curve"][-1] == [6, row["val_loss"]]
    assert result["configs"]["TrueTernary"]["state_bytes_per_weight"] <= 1.25
    assert 1.42 <= result["configs"]["TwoTrit"]["state_bytes_per_weight"] <= 1.45
    assert 12 <= result["configs"]["Adam_FP32"]["state_bytes_per_weight"] < 12.01
    assert result["configs"]["Adam_STE"]["rates_tried"].keys() == {"0.003", "0.01"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    assert run_script("benchmark_true_ternary", *settings, "--reuse-base", "--configs", "TrueTernary") == 0
    again = json.loads(out.read_text())["configs"]
    assert again["Adam_FP32"] == result["configs"]["Adam_FP32"]
    assert again["TrueTernary"]["val_loss"] == result["configs"]["TrueTernary"]["val_loss"]
    capsys.readouterr()
    assert run_script("benchmark_true_ternary", *settings, "--reuse-base", "--seed", 3) == 2
    assert "seed=0, not 3" in capsys.readouterr().err
    assert run_script("benchmark_true_ternary", *settings, "--configs", "TrueTernary", "--micro-batches", 2) == 0
    in_parts = json.loads(out.read_text())["configs"]["TrueTernary"]["val_loss"]
    assert in_parts != again["TrueTernary"]["val_loss"]
    assert in_parts == pytest.approx(again["TrueTernary"]["val_loss"], rel=0.02)


@pytest.mark.parametrize(("trits", "levels", "step"), [(1, 3, 1.0), (2, 9, 0.675)])
def test_straight_through_baseline_has_levels_in_forward_and_the_identity_in_backward(trits, levels, step):
    torch.manual_seed(0)
    model = ArbFloatBaseline(preset_config("arb-tiny", trits_per_weight={"head": trits}), straight_through=True)
    layer = model.byte_head.proj
    latent = layer.parametrizations.weight.original
    assert layer.weight.unique().numel() == levels
    assert layer.weight.max().item() == pytest.approx(levels // 2 * step * latent.abs().mean().item())
    assert model.model.blocks[0].mlp.up_proj.weight.unique().numel() == 3
    x = torch.randn(5, 64)
    layer(x).sum().backward()
    assert torch.allclose(latent.grad, x.sum(0).expand_as(latent), atol=1e-5)


def test_wider_variant_of_one_trit_has_the_bytes_of_two_trits():
    one, two, wider = (
        audit_config(variant_config("arb-bench", name)) for name in ("backbone", "two trits", "wider, one trit")
    )
    assert two.logical_weights == one.logical_weights < wider.logical_weights
    assert wider.state_bytes == pytest.approx(two.state_bytes, rel=2e-3)


def test_autocast_baseline_multiplies_in_bfloat16_and_keeps_float32_gradients():
    torch.manual_seed(0)
    model, ids = ArbFloatBaseline(preset_config("arb-tiny"), autocast=True), torch.randint(0, 256, (2, 16))
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    model.autocast = False
    assert 0 < abs(model(ids, labels=ids).loss.item() - out.loss.item()) < 0.02 * out.loss.item()


def test_baseline_has_the_same_shape_and_initial_variance():
    ternary = ArbForCausalLM(preset_config("arb-tiny"))
    baseline = ArbFloatBaseline(preset_config("arb-tiny"))
    assert sum(p.numel() for p in baseline.parameters()) == ternary.num_parameters()
    for name, matrix in ternary.ternary_matrices().items():
        weight = baseline.get_submodule(name).weight
        assert weight.var().item() == pytest.approx(matrix.effective_weight(torch.float32).var().item(), rel=0.15)


def test_baselines_refuse_blocks_that_they_do_not_have():
    assert ArbFloatBaseline(preset_config("arb-tiny", memgram={"slots": 8, "dim": 4}), straight_through=True)
    with pytest.raises(ValueError, match=r"codebook=.*: the float baselines do not have this block"):
        ArbFloatBaseline(preset_config("arb-tiny", codebook={"size": 8, "dim": 4}), straight_through=True)


def test_ablation_rows(corpus, tmp_path, capsys):
    """Equal time means the backbone's time: a dearer variant gets fewer steps, and rows are saved as they come."""
    out = tmp_path / "ablation.json"
    size = ["--preset", "arb-tiny", "--steps", 12, "--batch", 2, "--ctx", 24, "--data", corpus]
    assert run_script("ablate", "--variants", "text_sequencer", "memgram", *size, "--json", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["backbone", "text_sequencer", "memgram"]
    backbone, sequencer = rows["backbone"], rows["text_sequencer"]
    assert backbone["steps_in_equal_time"] == 12
    assert backbone["bits_per_byte_equal_time"] == backbone["bits_per_byte_equal_steps"]
    assert sequencer["steps_in_equal_time"] == max(1, round(12 * backbone["step_ms"] / sequencer["step_ms"])) < 12
    assert sequencer["bits_per_byte_equal_time"] > sequencer["bits_per_byte_equal_steps"]
    assert rows["memgram"]["logical_weights"] > backbone["logical_weights"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{sequencer['bits_per_byte_equal_time']:.4f}" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "mlp"], "variants='mlp'"),
        (["--steps", 0], "steps=0"),
        (["--preset", "arb-9z"], "preset='arb-9z'"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_ablation_refuses(options, said, capsys):
    assert run_script("ablate", *options) == 2
    assert said in capsys.readouterr().err


def test_spikes_are_measured_against_what_came_before():
    assert worst_spike([2.0] * 60 + [5.0] + [2.0] * 60) == pytest.approx(2.5)
    assert worst_spike([9.0] + [2.0] * 40) == 1.0


def test_benchmark_schedule_warms_up_and_decays_to_two_percent():
    rates = [rate_at(step, 600) for step in range(600)]
    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (49, 50)
    assert rates[-1] == pytest.approx(0.02, abs=2e-3)
