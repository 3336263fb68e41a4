"""The exported folder is self-contained: it loads in a fresh process that cannot import this repo, bit-equal."""

import json

import pytest
import torch

from configuration_arb import preset_config
from configuration_arb.configuration_arb import AUTO_MAP
from modeling_arb import ArbForCausalLM
from support.fresh_process import NO_REPO, fresh_process
from support.scripting import run_script
from tokenization_arb import ArbTokenizer

FRESH_PROCESS = f"""{NO_REPO}
import os, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from pathlib import Path
folder, again, logits = sys.argv[1:]
code = {{path.name: path.read_text() for path in Path(folder).glob("*.py")}}
assert code.keys() == {{"configuration_arb.py", "kernels_arb.py", "modeling_arb.py"}}
expected = torch.load(logits)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "arb" and config.hidden_size == 64
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("def f(x):", return_tensors="pt").input_ids
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert backbone(ids).last_hidden_state.shape == (1, 9, 64)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
assert torch.equal(model(ids).logits, expected)
assert not any(tensor.is_floating_point() for tensor in model.state_dict().values())
model.save_pretrained(again)
assert {{path.name: path.read_text() for path in Path(again).glob("*.py")}} == code
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
assert torch.equal(second(ids).logits, expected)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("def f", max_new_tokens=4, do_sample=False)
assert text[0]["generated_text"].startswith("def f")
weights = model.state_dict()
weights["byte_head.proj.E"] = weights["byte_head.proj.E"].float()
os.remove(f"{{again}}/model.safetensors")
torch.save(weights, f"{{again}}/pytorch_model.bin")
try:
    AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
except ValueError as error:
    assert "byte_head.proj.E has dtype torch.float32" in str(error), error
else:
    raise SystemExit("a float scale was cast")
print("LOADED")
"""


@pytest.mark.parametrize(
    ("preset", "rule", "trits"),
    [("arb-tiny", "momentum", 2), ("arb-tiny", "correlation", 1), ("arb-tiny-full", "correlation", 1)],
)
def test_export_loads_without_the_repo(tmp_path, preset, rule, trits):
    config = preset_config(preset, update_rule=rule, group_size=32, trits_per_weight=trits)
    model = ArbForCausalLM(config).eval()
    if rule == "correlation":  # whose votes are part of the weights
        for matrix in model.ternary_matrices().values():
            matrix.corr_accum.copy_(torch.randint(-20, 20, matrix.corr_accum.shape))
            matrix.step_counter.fill_(7)
    model.save_pretrained(tmp_path / "checkpoint")
    assert run_script("export_hub", tmp_path / "checkpoint", tmp_path / "export") == 0
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "export").iterdir()} == {(tmp_path / "new").stat().st_mode}
    ids = torch.tensor([list(b"def f(x):")])
    torch.save(model(ids).logits.detach(), tmp_path / "logits.pt")
    arguments = (tmp_path / "export", tmp_path / "again", tmp_path / "logits.pt")
    done = fresh_process(tmp_path, FRESH_PROCESS, *arguments)
    assert done.stdout.endswith("LOADED\n"), done.stderr[-3000:]


def test_training_checkpoint_keeps_its_state_and_inference_drops_it(tmp_path):
    model = ArbForCausalLM(preset_config("arb-tiny"))
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "inference", training_state=False)
    everything = ArbForCausalLM.from_pretrained(tmp_path / "all").state_dict()
    assert everything.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in everything.items())
    small = ArbForCausalLM.from_pretrained(tmp_path / "inference")
    assert {name.rpartition(".")[2] for name in small.state_dict()} == {"T_packed", "E"}
    assert model.config.training_state
    with pytest.raises(ValueError, match="training_state=True"):
        small.save_pretrained(tmp_path / "no", training_state=True)


def test_sharded_checkpoint_round_trip(tmp_path):
    model = ArbForCausalLM(preset_config("arb-tiny")).eval()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = ArbForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


FOREIGN = {
    "config.json": {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForVision2Seq": "you/evil--evil.Model"},
        "custom_pipelines": {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}},
        "_name_or_path": "/home/evil/model",
        "tokenizer_class": "EvilTokenizer",
        "fusion_config": {"patch_embeddings": True},
        "vision_config": {"model_type": "evil"},
        "transformers_weights": "evil.safetensors",
    },
    "generation_config.json": {"custom_generate": "you/evil", "auto_map": {"evil": "evil.Generate"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "chat_template": "{{ evil }}"},
}


def test_an_export_carries_nothing_of_a_foreign_config(tmp_path):
    folder = tmp_path / "model"
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(folder)
    ArbTokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text("raise SystemExit('evil ran')")
    (folder / "chat_template.jinja").write_text("{{ evil }}")
    for name, entries in FOREIGN.items():
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**stored, **entries}))
    assert run_script("export_hub", folder, tmp_path / "export") == 0
    ArbForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for written in (tmp_path / "export", tmp_path / "saved"):
        assert json.loads((written / "config.json").read_text())["auto_map"] == AUTO_MAP
        for path in written.iterdir():
            assert b"evil" not in path.name.encode() + path.read_bytes(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path
        names = {key for path in written.glob("*.json") for key in json.loads(path.read_text())}
        assert not names & ({*FOREIGN["config.json"], "custom_generate"} - {"auto_map", "tokenizer_class"})


def test_export_refuses_an_existing_folder_and_a_missing_model(tmp_path, capsys):
    assert run_script("export_hub", tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere" in capsys.readouterr().err
    ArbForCausalLM(preset_config("arb-tiny")).save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    assert run_script("export_hub", tmp_path / "model", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_breaks_beside_the_hub_kernels_package(tmp_path):
    """A package named `kernels` is Hugging Face's: with one importable, ours is still `arb_kernels`."""
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("OTHER = True\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import kernels, arb_kernels.formats.packing, modeling_arb\n"
        "assert kernels.OTHER and not hasattr(kernels, 'packing')\n"
        "print('FINE')\n"
    )
    done = fresh_process(tmp_path, code)
    assert done.stdout.endswith("FINE\n"), done.stderr[-3000:]
