"""Finetuning all weights from a checkpoint: same logits at the start, its training state, its own run, plain errors."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.loopback_hub import used_by_this_process
from support.pretraining import arguments, final_hash, report
from support.scripting import run_script
from training_arb.checkpoints.starting_point import describe_start, start_from
from training_arb.hub.model_card import card_metadata
from training_arb.memory.state_audit import inference_hash, state_hash
from training_arb.report.run_facts import RunFacts

NEW_TEXT = b"".join(f"{i} green bottles hanging on the wall, {i} green bottles\n".encode() for i in range(900))
GOING_ON = {"resume_from_checkpoint": "auto"}
IDS = torch.tensor([list(b"def f(x):")])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "bottles.txt"
    path.write_bytes(NEW_TEXT)
    return path


def saved(folder, preset="arb-tiny", training_state=True, **fields):
    """A checkpoint whose accumulators are anything but zero."""
    torch.manual_seed(1)
    model = ArbForCausalLM(preset_config(preset, **fields)).eval()
    for module in model.integer_states().values():
        for name, spec in module.layout().items():
            if not spec.inference:
                getattr(module, name).fill_(3)
    model.save_pretrained(folder, training_state=training_state)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same weights, with and without training state."""
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "resumable")
    saved(folder / "inference", training_state=False)
    return folder


def finetuning(text, source, output_dir, **changes):
    """Of a checkpoint with one trit a weight, with two."""
    settings = {"preset": None, "init_from": source, "max_steps": 12, "save_steps": 4, "eval_steps": 12}
    return arguments(text, output_dir, **{**settings, "trits_per_weight": "2", **changes})


def training_state(model):
    """name -> tensor, of the tensors that inference does not need."""
    return {
        f"{name}.{key}": getattr(module, key)
        for name, module in model.integer_states().items()
        for key, spec in module.layout().items()
        if not spec.inference
    }


def is_fresh(model):
    """Whether all training state is at its beginning: zero, but every motif of a codebook counts as used."""
    return all(
        (tensor == (1 if name.endswith(".usage") else 0)).all() for name, tensor in training_state(model).items()
    )


@pytest.mark.parametrize("preset", ["arb-tiny", "arb-tiny-full"])
@pytest.mark.parametrize("rule", ["momentum", "flip"])
def test_training_state_comes_along_where_the_checkpoint_has_it(tmp_path, preset, rule):
    stored = saved(tmp_path / "resumable", preset, update_rule=rule)
    model, origin = start_from(str(tmp_path / "resumable"))
    assert torch.equal(model.eval()(IDS).logits, stored(IDS).logits)
    assert training_state(model) and state_hash(model) == state_hash(stored)
    assert origin["training_state"] and describe_start(origin, model.config).endswith(" come along")
    assert origin["weights_sha256"] == inference_hash(stored) and origin["commit"] is None


@pytest.mark.parametrize("preset", ["arb-tiny", "arb-tiny-full"])
def test_from_an_inference_checkpoint_training_state_starts_at_zero(tmp_path, preset):
    stored = saved(tmp_path / "inference", preset, training_state=False)
    model, origin = start_from(str(tmp_path / "inference"))
    assert torch.equal(model.eval()(IDS).logits, stored(IDS).logits)
    assert model.config.training_state and training_state(model) and is_fresh(model)
    assert not origin["training_state"] and describe_start(origin, model.config).endswith(" start at zero")


@pytest.mark.parametrize(
    "changed", [{"update_rule": "flip"}, {"momentum_bits": 8}, {"table_rule": "momentum"}], ids=str
)
def test_another_rule_starts_its_state_at_zero_and_says_so(tmp_path, changed):
    saved(tmp_path / "resumable", "arb-tiny-full")
    model, origin = start_from(str(tmp_path / "resumable"), fields=changed)
    assert is_fresh(model) and not origin["training_state"]
    said = "its votes start at zero" if "update_rule" in changed else "its residuals and momentum start at zero"
    assert describe_start(origin, model.config).endswith(said)


@pytest.mark.parametrize(("stored_rule", "rule"), [("momentum", "flip"), ("flip", "momentum"), ("flip", "correlation")])
def test_another_rule_takes_the_weights_over(tmp_path, stored_rule, rule):
    stored = saved(tmp_path / "checkpoint", "arb-tiny-full", update_rule=stored_rule)
    model, _ = start_from(str(tmp_path / "checkpoint"), fields={"update_rule": rule, "momentum_bits": 8})
    assert torch.equal(model.eval()(IDS).logits, stored(IDS).logits)
    fresh = ArbForCausalLM(preset_config("arb-tiny-full", update_rule=rule, momentum_bits=8))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in fresh.state_dict().items()
    }


def test_correlation_goes_on_from_its_votes_and_is_not_left(tmp_path):
    torch.manual_seed(0)
    stored = ArbForCausalLM(preset_config("arb-tiny", update_rule="correlation")).eval()
    for matrix in stored.ternary_matrices().values():
        matrix.corr_accum.copy_(torch.randint(-20, 20, matrix.corr_accum.shape))
        matrix.step_counter.fill_(7)
    stored.save_pretrained(tmp_path / "checkpoint", training_state=False)
    model, _ = start_from(str(tmp_path / "checkpoint"))
    assert torch.equal(model.eval()(IDS).logits, stored(IDS).logits)
    with pytest.raises(ValueError, match="depend on correlation's votes"):
        start_from(str(tmp_path / "checkpoint"), fields={"update_rule": "momentum"})


@pytest.fixture(scope="module")
def tuned(text, checkpoints, tmp_path_factory):
    """One uninterrupted finetuning: its folder, and where its source stood, which is not there any more."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(checkpoints / "inference", folder / "source")
    assert run_script("pretrain", *finetuning(text, folder / "source", folder / "run")) == 0
    shutil.rmtree(folder / "source")
    return folder / "run", folder / "source"


def test_a_finetuning_learns_and_says_where_it_came_from(tuned, checkpoints, tmp_path):
    run_dir, source = tuned
    losses = [entry["loss"] for entry in report(run_dir)["history"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    start, _ = start_from(str(checkpoints / "inference"), fields={"trits_per_weight": 2})
    origin = {
        "source": str(source),
        "revision": None,
        "commit": None,
        "update_rule": "momentum",
        "training_state": False,
        "trits_per_weight": 1,
        "converted_matrices": len(start.ternary_matrices()),
        "relative_rms_error": 0.0,
        "largest_error": {"matrix": next(iter(start.ternary_matrices())), "relative_rms_error": 0.0},
        "weights_sha256": inference_hash(start),
    }
    assert report(run_dir)["settings"]["trits_per_weight"] == "2"
    assert report(run_dir)["init_from"] == origin
    assert json.loads((run_dir / "checkpoint-12" / "run.json").read_text())["init_from"] == origin
    assert run_script("export_hub", run_dir / "final", tmp_path / "export") == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| started from | source, weights sha256 {origin['weights_sha256'][:16]} |" in card


def test_it_goes_on_with_its_own_run(tuned, text, checkpoints, tmp_path, capsys):
    run_dir, source = tuned
    shutil.copytree(run_dir / "checkpoint-8", tmp_path / "part" / "checkpoint-8")
    for other, said in (
        (arguments(text, tmp_path / "part", **GOING_ON, trits_per_weight=2), "the checkpoint has init_from={"),
        (finetuning(text, checkpoints / "inference", tmp_path / "part", **GOING_ON), "started from"),
        (finetuning(text, source, tmp_path / "part", **GOING_ON, revision="main"), "started from"),
        (
            finetuning(text, source, tmp_path / "part", **GOING_ON, trits_per_weight=1),
            "has trits_per_weight=2, this run 1",
        ),
    ):
        assert run_script("pretrain", *other) == 2
        assert said in capsys.readouterr().err
    assert run_script("pretrain", *finetuning(text, source, tmp_path / "part", **GOING_ON)) == 0
    assert final_hash(tmp_path / "part") == final_hash(run_dir)
    assert report(tmp_path / "part")["init_from"] == report(run_dir)["init_from"]


def test_from_the_hub_at_a_pinned_revision(checkpoints, tmp_path, monkeypatch):
    with used_by_this_process(tmp_path / "cache") as hub:
        assert run_script("export_hub", checkpoints / "inference", "--push", "me/arb") == 0
        commit = hub.repositories["me/arb"].branches["main"]
        stored = saved(tmp_path / "other", hidden_size=32, trits_per_weight=2)
        assert run_script("export_hub", tmp_path / "other", "--push", "me/arb") == 0
        hub.requests.clear()
        model, origin = start_from("me/arb", commit)
        assert inference_hash(model) == inference_hash(ArbForCausalLM.from_pretrained(checkpoints / "inference"))
        assert (origin["source"], origin["revision"], origin["commit"]) == ("me/arb", commit, commit)
        assert inference_hash(start_from("me/arb")[0]) == inference_hash(stored)
        assert start_from("me/arb", fields={"trits_per_weight": 1})[1]["relative_rms_error"] > 0
        assert start_from("me/arb", commit, fields={"trits_per_weight": 2})[1]["relative_rms_error"] == 0
        fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
        assert {name.rpartition(".")[2] for name in fetched} == {"json", "safetensors"}  # no code
        metadata = card_metadata(RunFacts(init_from=origin), "tuned").to_dict()
        assert (metadata["base_model"], metadata["base_model_relation"]) == ("me/arb", "finetune")
        with pytest.raises(ValueError, match="init_from='me/nothing', no folder here: the hub has no such repository"):
            start_from("me/nothing")
        with pytest.raises(ValueError, match="init_from='me/arb', revision='nowhere': the hub has no such revision"):
            start_from("me/arb", "nowhere")
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="init_from='me/other', no folder here: not in the cache, and http://127"):
            start_from("me/other")


def missing(folder):
    shutil.rmtree(folder)


def without_config(folder):
    (folder / "config.json").unlink()


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def of_another_type(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_as_written(folder):
    (folder / "checksums.json").write_text(json.dumps({"model.safetensors": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "changes", "said"),
    [
        (missing, {}, "no such folder"),
        (without_config, {}, "config.json not found"),
        (without_weights, {}, "model.safetensors not found"),
        (of_another_type, {}, "model_type='gpt2'"),
        (truncated, {}, "model.safetensors: damaged or truncated"),
        (not_as_written, {}, "model.safetensors: damaged, its sha256"),
        (None, {"preset": "arb-small"}, "preset='arb-small' has hidden_size=192"),
        (None, {"blocks": '{"head_layers": 1}'}, "head_layers=1 contradicts"),
        (None, {"group_size": 32}, "group_size=32 contradicts"),
        (None, {"update_rule": "adam"}, "update_rule='adam' must be one of"),
        (None, {"trits_per_weight": "head:3"}, "trits_per_weight='head:3' must be 1, 2, or a dict"),
        (
            None,
            {"trits_per_weight": "2", "update_rule": "flip"},
            "trits_per_weight=2 must be 1 with update_rule='flip'",
        ),
        (None, {"revision": "main"}, "which has no revisions"),
        (None, {"init_from": None, "revision": "main"}, "only used with --init_from"),
    ],
)
def test_bad_starts_are_one_line(text, checkpoints, tmp_path, capsys, damage, changes, said):
    shutil.copytree(checkpoints / "inference", tmp_path / "checkpoint")
    if damage:
        damage(tmp_path / "checkpoint")
    given = {"preset": None, "init_from": tmp_path / "checkpoint", **changes}
    assert run_script("pretrain", *arguments(text, tmp_path / "run", **given)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said in line
    assert not (tmp_path / "run").exists()


def test_what_agrees_may_be_said(checkpoints):
    start_from(str(checkpoints / "inference"), None, "arb-tiny", {"head_layers": 0, "group_size": 0})
