"""Pushing to the hub and loading back, with a stand-in on loopback: bit-equal, whole, no pickles, plain errors."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load

from configuration_arb import preset_config
from configuration_arb.trits_per_weight import describe_trits
from modeling_arb import ArbForCausalLM
from support.fresh_process import NO_REPO, fresh_process
from support.loopback_hub import TOKEN, environment, metadata_errors, used_by_this_process
from support.pretraining import TEXT, arguments
from support.scripting import run_script
from tokenization_arb import ArbTokenizer
from training_arb.checkpoints.checkpoint_files import write_checksums
from training_arb.hub.hub_export import export_model
from training_arb.memory.state_audit import audit_folder, inference_hash
from training_arb.report.run_facts import RunFacts, shown_command, shown_sample

PICKLED = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt|npy)$")
FRESH_PROCESS = f"""{NO_REPO}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, commit, logits = sys.argv[1:]
first, second = torch.load(logits)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
ids = tokenizer("def f(x):", return_tensors="pt").input_ids
pinned = AutoModelForCausalLM.from_pretrained(name, revision=commit, trust_remote_code=True).eval()
newest = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
assert torch.equal(pinned(ids).logits, first) and torch.equal(newest(ids).logits, second)
assert not torch.equal(first, second)
assert pinned.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 13)
print("LOADED")
"""


@pytest.fixture
def hub(tmp_path):
    with used_by_this_process(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "checkpoint"
    torch.manual_seed(0)
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pushed_run(tmp_path_factory):
    """A run that pushes as it goes: its folder, and the repository that it leaves on the hub."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.py").write_bytes(TEXT)
    pushing = {
        "push_to_hub": "true",
        "hub_model_id": "me/run",
        "hub_token": TOKEN,
        "hub_always_push": "true",
        "save_steps": 4,
    }
    with used_by_this_process(folder / "cache") as hub:
        assert run_script("pretrain", *arguments(folder / "text.py", folder / "run", **pushing)) == 0
        return folder / "run", hub.repositories["me/run"]


def tensors_on(repository, revision="main"):
    files = repository.files(revision)
    return {
        name: tensor
        for file in sorted(files)
        if file.endswith(".safetensors")
        for name, tensor in load(files[file]).items()
    }


def score_at(report, step):
    (measured,) = (entry for entry in report["history"] if entry["step"] == step and "eval_loss" in entry)
    return measured["eval_bits_per_byte"]


def same_tensors(some, others):
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_round_trip_through_a_fresh_process(tmp_path, hub, capsys):
    ids, logits = torch.tensor([list(b"def f(x):")]), []
    for seed, size in ((0, "20KB"), (1, "5GB")):
        torch.manual_seed(seed)
        model = ArbForCausalLM(preset_config("arb-tiny")).eval()
        model.save_pretrained(tmp_path / f"model-{seed}")
        logits.append(model(ids).logits.detach())
        pushing = ("--push", "me/arb", "--max_shard_size", size)
        assert run_script("export_hub", tmp_path / f"model-{seed}", *pushing) == 0
    first, second = re.findall(r"commit ([0-9a-f]{40})", capsys.readouterr().out)
    repository = hub.repositories["me/arb"]
    sharded, whole = repository.files(first), repository.files(second)
    assert len([name for name in sharded if name.endswith(".safetensors")]) > 1
    assert [name for name in whole if ".safetensors" in name] == ["model.safetensors"]  # the shards are gone
    for files in (sharded, whole):
        assert {"README.md", "LICENSE", "generation_config.json", "tokenizer.json", "modeling_arb.py"} <= files.keys()
        assert not list(filter(PICKLED.search, files))
    assert same_tensors(
        tensors_on(repository),
        dict(
            ArbForCausalLM.from_pretrained(
                tmp_path / "model-1", config=preset_config("arb-tiny", training_state=False)
            ).state_dict()
        ),
    )
    torch.save(logits, tmp_path / "logits.pt")
    done = fresh_process(
        tmp_path, FRESH_PROCESS, "me/arb", first, tmp_path / "logits.pt", **environment(hub, tmp_path / "fresh")
    )
    assert done.stdout.endswith("LOADED\n"), done.stderr[-3000:]


def test_a_branch_of_a_private_repository_and_back(tmp_path, hub, checkpoint):
    pushing = ("--push", "me/arb", "--private", "--branch", "resumable", "--training_state")
    assert run_script("export_hub", checkpoint, *pushing) == 0
    repository = hub.repositories["me/arb"]
    assert repository.private and list(repository.files()) == [".gitattributes"]
    assert same_tensors(tensors_on(repository, "resumable"), ArbForCausalLM.from_pretrained(checkpoint).state_dict())
    assert run_script("export_hub", "me/arb", tmp_path / "back", "--revision", "resumable", "--training_state") == 0
    back = ArbForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert same_tensors(back, ArbForCausalLM.from_pretrained(checkpoint).state_dict())


def test_the_models_and_the_tokenizers_own_push(hub, checkpoint):
    model = ArbForCausalLM.from_pretrained(checkpoint)
    model.push_to_hub("me/stock")
    ArbTokenizer().push_to_hub("me/stock")
    files = hub.repositories["me/stock"].files()
    assert {"modeling_arb.py", "tokenizer.json", "config.json"} <= files.keys() and not list(
        filter(PICKLED.search, files)
    )
    assert same_tensors(tensors_on(hub.repositories["me/stock"]), model.state_dict())


def test_the_run_pushes_as_it_goes_and_leaves_nothing_behind(pushed_run):
    run_dir, repository = pushed_run
    assert repository.messages == [
        "initial commit",
        *(f"Training in progress, step {step}" for step in (4, 8)),
        "End of training",
    ]
    for files in repository.commits.values():
        assert not [name for name in files if PICKLED.search(name) or "/" in name]  # nor folders: no checkpoints
        assert not any(TOKEN.encode() in data for data in files.values())
    assert not list(run_dir.glob(".push-*"))
    final = ArbForCausalLM.from_pretrained(run_dir / "final")
    assert same_tensors(tensors_on(repository), final.state_dict())
    assert json.loads((run_dir / "report.json").read_text())["weights_sha256"] == inference_hash(final)


def test_the_card_of_a_run(pushed_run):
    run_dir, repository = pushed_run
    report = json.loads((run_dir / "report.json").read_text())
    text = repository.files()["README.md"].decode()
    card = ModelCard(text)
    assert metadata_errors(text) == [] and not re.search(r"\$[a-z]", text.replace(shown_sample(report["sample"]), ""))
    (result,) = card.data.eval_results
    assert result.metric_type == "bits_per_byte" and result.metric_value == round(report["bits_per_byte"], 4)
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == ("apache-2.0", "text-generation", "run")
    assert f"**{report['bits_per_byte']:.4f}** over {report['bytes']:,} bytes never trained on" in text
    assert f"| bytes trained on | {8 * 4 * 32:,} |" in text and "| steps | 8 |" in text
    assert "python scripts/pretrain.py --preset arb-tiny --data text.py " in text
    assert TOKEN not in text and str(run_dir.parent) not in text
    assert shown_sample(report["sample"]) in text and "![" in text and "loss.png" in repository.files()
    audit = audit_folder(run_dir / "final")
    for role in ("packed trits", "scale exponents"):
        size = sum(row.bytes for row in audit.tensors if row.role == role)
        assert re.search(rf"\| {role} \| u?int8 \| {size:,} \| {size / audit.logical_weights:.4f} \| yes \|", text)
    assert re.search(r"\| residual and momentum \| uint8 \| [\d,]+ \| 1\.0000 \| training only \|", text)
    early = ModelCard(list(repository.commits.values())[1]["README.md"].decode())
    (result,) = early.data.eval_results
    assert result.metric_value == round(score_at(report, 4), 4) and "| steps | 4 |" in early.text


def test_export_fills_the_card_from_what_lies_beside(pushed_run, tmp_path, checkpoint):
    run_dir, _ = pushed_run
    report = json.loads((run_dir / "report.json").read_text())
    for source, score in (("final", report["bits_per_byte"]), ("checkpoint-4", score_at(report, 4))):
        assert run_script("export_hub", run_dir / source, tmp_path / source) == 0
        (result,) = ModelCard((tmp_path / source / "README.md").read_text()).data.eval_results
        assert result.metric_value == round(score, 4)
        assert not [path.name for path in (tmp_path / source).iterdir() if PICKLED.search(path.name)]
    assert run_script("export_hub", checkpoint, tmp_path / "alone") == 0
    text = (tmp_path / "alone" / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None and metadata_errors(text) == []
    assert "No record of its run" in text


@pytest.mark.parametrize(
    ("trits", "levels", "decoded"),
    [
        (1, "trits to a byte: 1 trit a weight, levels -1 to 1.", "memory: 2 bits a weight of 1 trit"),
        (2, "trits to a byte: 2 trits a weight, levels -4 to 4.", "memory: 4 bits a weight of 2 trits"),
        (
            {"embedding": 2, "head": 2},
            ": 1 trit a weight, levels -1 to 1 (attention, mlp); 2 trits a weight, levels -4 to 4 (embedding, head).",
            "memory: 2 bits a weight of 1 trit and 4 bits a weight of 2 trits",
        ),
    ],
    ids=str,
)
def test_the_card_tells_trits_levels_and_bits(tmp_path, trits, levels, decoded):
    model = ArbForCausalLM(preset_config("arb-tiny", trits_per_weight=trits))
    export = tmp_path / "export"
    export.mkdir()
    audit = export_model(model, export, RunFacts())
    text = (export / "README.md").read_text()
    multiplied = [m for m in model.ternary_matrices().values() if isinstance(m, torch.nn.Linear)]
    size = sum(-(-m.rows // 16) * -(-m.columns // 16) * 64 * m.trits for m in multiplied)
    assert levels in " ".join(text.split()) and f"{decoded}, at most {size:,} bytes." in text
    bits = 8 * (export / "model.safetensors").stat().st_size / model.num_parameters()
    assert f"{bits:.2f} bits a weight" in text and audit.trits_by_role["head"] == model.config.trits_of("head")
    assert f"| `trits_per_weight` | {describe_trits(trits)} |" in text
    assert metadata_errors(text) == []


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["x/pretrain.py", "--data", "/home/ann/books/:0.7", "code/*.py"], "--data books/:0.7 'code/*.py'"),
        (["pretrain.py", "--output_dir=/home/ann/runs", "--seed", "1"], "--output_dir=runs --seed 1"),
        (["pretrain.py", "--hub_token", "hf_x", "--seed", "1"], "--seed 1"),
        (["pretrain.py", "--hub_token=hf_x", "--prompt", "a / b"], "--prompt 'a / b'"),
    ],
)
def test_a_shown_command_tells_no_secrets(argv, shown):
    assert shown_command(argv) == f"python scripts/pretrain.py {shown}"


def no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def another_model(hub, monkeypatch):
    hub.add("me/arb", private=True).commit({"config.json": b'{"model_type": "gpt2"}'}, "main", "a model")


def a_public_one(hub, monkeypatch):
    hub.add("me/arb")


def a_commit_fails(hub, monkeypatch):
    hub.answers["/commit/"] = 501


def validation_fails(hub, monkeypatch):
    hub.answers["validate-yaml"] = 501


def a_large_file_fails(hub, monkeypatch):
    hub.answers["lfs-store"] = 403


def no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("trouble", "target", "said"),
    [
        (no_token, "me/arb", "no token found"),
        (wrong_token, "me/arb", "the hub does not accept the token"),
        (None, "you/arb", "the token has no right to write there (403)"),
        (None, "me/a/rb", "me/a/rb"),
        (another_model, "me/arb", "the repository holds a model of type 'gpt2'"),
        (a_public_one, "me/arb", "the repository exists and is public"),
        (a_commit_fails, "me/arb", "the hub answered 501: the stand-in was told to fail"),
        (validation_fails, "me/arb", "the hub answered 501"),
        (a_large_file_fails, "me/arb", "Error while uploading 'model.safetensors' to the Hub: the token has no right"),
        (no_network, "me/arb", "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_a_push_that_fails_says_so_in_one_line(tmp_path, hub, checkpoint, monkeypatch, capsys, trouble, target, said):
    if trouble:
        trouble(hub, monkeypatch)
    before = {name: dict(repository.commits) for name, repository in hub.repositories.items()}
    pushing = ("--push", target, "--private")
    assert run_script("export_hub", checkpoint, tmp_path / "out" / "export", *pushing) == 2
    (line,) = re.findall("error: .*", capsys.readouterr().err)
    assert said in line
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))
    for name, repository in hub.repositories.items():
        after = dict(repository.commits)
        assert after == before.get(name, after) and not any("model.safetensors" in files for files in after.values())


def test_options_that_do_not_go_together(tmp_path, checkpoint, capsys):
    for given, said in (
        ((checkpoint,), "output=None: give a folder"),
        ((checkpoint, tmp_path / "x", "--private"), "private goes with --push"),
        ((checkpoint, tmp_path / "x", "--branch", "b"), "branch goes with --push"),
        ((checkpoint, tmp_path / "x", "--max_shard_size", "big"), "max_shard_size='big' must be a number and KB"),
        ((checkpoint, tmp_path / "x", "--revision", "b"), "which has no revisions"),
    ):
        assert run_script("export_hub", *given) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path, checkpoint, capsys):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    write_checksums(tmp_path / "damaged")
    weights = bytearray((tmp_path / "damaged" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "damaged" / "model.safetensors").write_bytes(weights)
    assert run_script("export_hub", tmp_path / "damaged", tmp_path / "out" / "export") == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_goes_on_when_a_push_fails_and_says_how_to_push_it(tmp_path, hub, capsys, caplog):
    (tmp_path / "text.py").write_bytes(TEXT)
    hub.answers["/commit/"] = 501
    pushing = {"push_to_hub": "true", "hub_model_id": "me/run", "max_steps": 2}
    assert run_script("pretrain", *arguments(tmp_path / "text.py", tmp_path / "run", **pushing)) == 2
    assert "step 2 is not on the hub: push to 'me/run': the hub answered 501" in caplog.text
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: push to 'me/run'") and f"{tmp_path}/run/final --push me/run" in line
    assert not list((tmp_path / "run").glob(".push-*"))
    hub.answers.clear()
    assert run_script("export_hub", tmp_path / "run" / "final", "--push", "me/run") == 0
    assert len(ModelCard(hub.repositories["me/run"].files()["README.md"].decode()).data.eval_results) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hub_strategy": "checkpoint"}, "would push the pickles"),
        ({"hub_model_id": "you/run"}, "no right to write there"),
    ],
)
def test_what_can_be_known_before_training_is_said_before_it(tmp_path, hub, capsys, changes, said):
    (tmp_path / "text.py").write_bytes(TEXT)
    pushing = {"push_to_hub": "true", "hub_model_id": "me/run", **changes}
    assert run_script("pretrain", *arguments(tmp_path / "text.py", tmp_path / "run", **pushing)) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoint-*"))
