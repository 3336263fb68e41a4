"""The audit finds what it must: floats, unlisted tensors, wrong types, bytes that do not encode trits."""

import json
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file

from arb_kernels.formats.decode_layout import decoding_bytes, decoding_form
from arb_kernels.formats.packing import pack_levels
from configuration_arb import PRESETS, preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from support.tensors import BACKENDS, random_trits
from training_arb.memory.state_audit import audit_config, audit_folder, audit_model, state_hash, zero_share
from training_arb.optim.integer_optimizer import IntegerOptimizer


@pytest.fixture
def model():
    return ArbForCausalLM(preset_config("arb-tiny"))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Load the folder's tensors, let `change` alter the dict, save them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_clean_model_and_optimizer(model):
    ids = torch.randint(0, 256, (2, 16))
    optimizer = IntegerOptimizer(model)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    audit = audit_model(model, optimizer)
    assert audit.clean
    assert audit.logical_weights == model.num_parameters()
    assert audit.state_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert "float tensors: 0" in audit.table()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("rule", "group_size", "most"),
    [("momentum", 0, 1.25), ("momentum", 32, 1.27), ("flip", 32, 1.29), ("correlation", 32, 0.6)],
)
def test_bytes_per_weight_of_one_trit(preset, rule, group_size, most):
    audit = audit_config(preset_config(preset, update_rule=rule, group_size=group_size, trits_per_weight=1))
    assert audit.clean
    if preset != "arb-tiny-full":  # rows of 16 weights carry their scale and their use for few weights
        assert audit.to_dict()["state_bytes_per_weight"] <= most


@pytest.mark.parametrize(
    ("preset", "trits", "most", "most_inference", "mean"),
    [
        ("arb-14m", 2, 1.42, 0.41, 2.0),
        ("arb-bench", 2, 1.43, 0.42, 2.0),
        ("arb-bench", {"embedding": 2, "head": 2}, 1.25, 0.24, 1.13),
        ("arb-small", 2, 1.45, 0.43, 2.0),
    ],
)
def test_two_trits_are_counted(preset, trits, most, most_inference, mean):
    config = preset_config(preset, trits_per_weight=trits)
    audit, one = audit_config(config), audit_config(preset_config(preset, trits_per_weight=1))
    assert audit.clean and audit.areas == one.areas
    planes = sum(row.bytes for row in audit.tensors if row.role == "packed trits")
    extra = planes - sum(row.bytes for row in one.tensors if row.role == "packed trits")
    assert audit.state_bytes == one.state_bytes + extra and extra > 0
    told = audit.to_dict()
    assert told["state_bytes_per_weight"] == pytest.approx(most, abs=0.005)
    assert told["inference_bytes_per_weight"] == pytest.approx(most_inference, abs=0.01)
    assert told["trits_per_weight"] == pytest.approx(mean, abs=0.005)
    assert told["trits_by_role"] == {role: config.trits_of(role) for role in told["trits_by_role"]}
    assert {"embedding", "attention", "mlp", "head"} <= told["trits_by_role"].keys()
    assert told["trits_by_area"]["ByteHead"] == 2


# DESIGN section 4: millions of logical weights
ARB_3B = {
    "embedding + sequencer": 33.5,
    "shared VQ + bridge": 640.9,
    "MoEGraph": 429.0,
    "KG VQ + composite": 329.3,
    "router": 12.9,
    "ByteHead": 626.9,
    "video/talker heads": 112.2,
    "MLA attention": 826.8,
}


def test_the_areas_of_arb_3b_are_the_designs():
    audit = audit_config(preset_config("arb-3b"))
    assert audit.areas.keys() == ARB_3B.keys()
    for area, millions in ARB_3B.items():
        assert audit.areas[area] == pytest.approx(1e6 * millions, rel=0.02), area
    assert audit.logical_weights == pytest.approx(3.0e9, rel=0.01)


@pytest.mark.parametrize(("rule", "most"), [("momentum", 3.6), ("flip", 3.6), ("correlation", 1.6)])
def test_state_of_arb_3b_in_gib(rule, most):
    assert audit_config(preset_config("arb-3b", update_rule=rule)).state_bytes <= most * 2**30


@pytest.mark.parametrize(("trits", "most"), [(1, 0.21), (2, 0.41)])
def test_inference_checkpoint_of_arb_14m_is_small(tmp_path, trits, most):
    model = ArbForCausalLM(preset_config("arb-14m", trits_per_weight=trits))
    model.save_pretrained(tmp_path, training_state=False)
    assert (tmp_path / "model.safetensors").stat().st_size / model.num_parameters() <= most


@pytest.mark.parametrize("persistent", [True, False])
def test_float_buffer_is_found(model, persistent):
    model.model.register_buffer("ema", torch.zeros(3), persistent=persistent)
    audit = audit_model(model)
    assert audit.float_tensors == ["model.ema"]
    assert not audit.clean


def test_float_parameter_and_float_optimizer_state_are_found(model):
    model.byte_head.gain = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([model.byte_head.gain])
    model.byte_head.gain.sum().backward()
    optimizer.step()
    found = audit_model(model, optimizer).float_tensors
    assert "byte_head.gain" in found
    assert any("exp_avg" in name for name in found)


def test_unlisted_integer_is_found(model):
    model.byte_head.register_buffer("counter", torch.zeros(2, dtype=torch.int64))
    audit = audit_model(model)
    assert audit.float_tensors == []
    assert audit.faults == ["byte_head.counter is not on the list of persistent state"]


def test_script_passes_a_clean_folder(folder, tmp_path, capsys):
    assert run_script("audit_state", folder, "--json", tmp_path / "audit.json") == 0
    written = json.loads((tmp_path / "audit.json").read_text())
    assert {"areas", "logical_weights", "state_bytes", "state_bytes_per_weight", "float_tensors", "tensors"} <= {
        *written
    }
    assert written["trits_by_area"] == dict.fromkeys(written["areas"], 1)
    assert sum(written["areas"].values()) == written["logical_weights"]
    assert "float tensors: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda t: t.update(master=torch.zeros(5)), "float: master", id="float"),
        pytest.param(
            lambda t: t.update(extra=torch.zeros(5, dtype=torch.int8)), "extra is not on the list", id="unlisted"
        ),
        pytest.param(
            lambda t: t["byte_head.proj.T_packed"].fill_(243), "outside 0 to 242: not packed trits", id="no-trits"
        ),
        pytest.param(lambda t: t.pop("byte_head.proj.E"), "byte_head.proj.E is missing", id="missing"),
        pytest.param(
            lambda t: t.update({"byte_head.proj.E": t["byte_head.proj.E"].half()}), "float: byte_head.proj.E", id="half"
        ),
    ],
)
def test_script_fails_a_changed_folder(folder, capsys, change, said):
    rewrite(folder, change)
    assert run_script("audit_state", folder) == 1
    assert said in capsys.readouterr().out


def test_a_folder_whose_config_names_other_trits_fails(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trits_per_weight": {"head": 2}}))
    assert run_script("audit_state", folder) == 1
    assert "byte_head.proj.T_packed is uint8 (288, 13), listed as torch.uint8 (288, 26)" in capsys.readouterr().out


def test_script_finds_a_float_in_the_optimizer_file(folder, capsys):
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, folder / "optimizer.pt")
    assert run_script("audit_state", folder) == 1
    assert "float: optimizer.state.0.exp_avg" in capsys.readouterr().out


class Foreign:
    """What an unpickler that trusts nobody does not make."""


def nested():
    inner = []
    inner.append(inner)
    return inner


def repacked(path):
    """The same archive, its entries deflated: as small as it likes, as large in memory as it likes."""
    with ZipFile(path) as stored:
        entries = {name: stored.read(name) for name in stored.namelist()}
    with ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for name, data in entries.items():
            packed.writestr(name, data)


UNREADABLE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x80\x02garbage" * 99),
    "foreign": lambda path: torch.save(Foreign(), path),
    "nested": lambda path: torch.save(nested(), path),
    "packed": repacked,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "text": lambda path: path.write_text("{"),
}


@pytest.mark.parametrize("how", UNREADABLE)
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "config.json"])
def test_what_the_script_cannot_read_is_one_line(folder, capsys, name, how):
    torch.save({"state": {}, "steps": torch.zeros(999, dtype=torch.int64)}, folder / "optimizer.pt")
    path = folder / name
    if how == "packed" and name != "optimizer.pt":
        how = "text"
    UNREADABLE[how](path)
    assert run_script("audit_state", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and (str(path) in line or (str(folder) in line and name in line))


def test_script_lists_a_preset_and_refuses_unreadable_input(folder, tmp_path, capsys):
    assert run_script("audit_state", "--preset", "arb-14m", "--tensors") == 0
    assert "MLA attention" in capsys.readouterr().out
    assert run_script("audit_state", "--preset", "arb-bench", "--trits_per_weight", "embedding:2,head:2") == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "1,133,568", "1.13", "1,417,152", "1.250"]
    (folder / "model.safetensors").write_bytes(b"nonsense")
    trits = ["--trits_per_weight", 2]
    refused = ([folder], [tmp_path / "nowhere"], ["--preset", "arb-9z"], [], [folder, *trits])
    for arguments in (*refused, ["--preset", "arb-3b", *trits]):
        assert run_script("audit_state", *arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_folder_audit_equals_model_audit(model, folder):
    assert audit_folder(folder).to_dict()["areas"] == audit_model(model).to_dict()["areas"]
    assert audit_folder(folder).state_bytes == audit_model(model).state_bytes


def test_state_hash_sees_one_bit(model):
    before = state_hash(model)
    model.byte_head.proj.E[0, 0] ^= 1
    assert state_hash(model) != before


@pytest.mark.parametrize("trits", [1, 2])
def test_zero_share_counts_levels_that_are_zero(trits):
    model = ArbForCausalLM(preset_config("arb-tiny", trits_per_weight=trits))
    levels = torch.cat([matrix.levels().flatten() for matrix in model.ternary_matrices().values()])
    assert zero_share(model) == pytest.approx((levels == 0).float().mean().item())
    assert zero_share(model) == pytest.approx(1 / 3**trits, rel=0.05)


def test_a_preset_can_be_allocated(tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert run_script("audit_state", "--preset", "arb-tiny-full", "--allocate", "--json", out) == 0
    built = json.loads(out.read_text())
    described = audit_config(preset_config("arb-tiny-full")).to_dict()
    assert built["areas"] == described["areas"] and built["state_bytes"] == described["state_bytes"]
    assert built["memory"]["state_mb"] == pytest.approx(built["state_bytes"] / 2**20)
    assert built["memory"]["peak_rss_mb"] >= built["memory"]["rss_before_mb"] > 0
    assert "peak over state" in capsys.readouterr().out
    assert run_script("audit_state", tmp_path, "--allocate") == 2
    assert "allocate" in capsys.readouterr().err


def test_a_training_step_is_forecast(tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert run_script("audit_state", "--preset", "arb-tiny", "--batch", 2, "--ctx", 32, "--json", out) == 0
    step = json.loads(out.read_text())["training_step"]
    assert step["peak"] == step["state"] + step["transient_peak"] and step["saved"] > 0
    assert f"needs {step['peak'] / 2**20:.1f} MB of tensors" in capsys.readouterr().out
    for wrong in (["--batch", 2], ["--batch", 0, "--ctx", 32], ["--batch", 2, "--ctx", 3]):
        assert run_script("audit_state", "--preset", "arb-tiny", *wrong) == 2
    assert run_script("audit_state", tmp_path, "--batch", 2, "--ctx", 32) == 2


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(
    ("preset", "trits"), [("arb-tiny", 1), ("arb-tiny", 2), ("arb-tiny-full", 1)], ids=lambda value: str(value)
)
def test_caches_are_beside_the_state_and_as_forecast(monkeypatch, preset, trits, backend):
    """Their float row scales do not count as float tensors of the state; before the first forward they are absent."""
    monkeypatch.setenv("ARB_BACKEND", backend)
    config = preset_config(preset, trits_per_weight=trits)
    forecast, model = audit_config(config), ArbForCausalLM(config).eval()
    fresh = audit_model(model)
    assert fresh.caches == [] and fresh.caches_are_held and not forecast.caches_are_held
    with torch.no_grad():
        model(torch.randint(0, 256, (2, 64)))  # enough bytes for every expert
    held = audit_model(model)
    assert held.caches == forecast.caches and held.cache_bytes > 0
    assert held.clean and held.state_bytes == fresh.state_bytes == forecast.state_bytes
    kept = [
        tensor
        for matrix in model.ternary_matrices().values()
        if matrix._decoded is not None
        for tensor in (matrix._decoded.weight, matrix._decoded.scale)
        if tensor is not matrix.T_packed
    ]
    assert held.cache_bytes == sum(tensor.nbytes for tensor in kept)
    if backend == "native":
        per_weight = held.cache_bytes / sum(matrix.logical_weights for matrix in linear(model))
        assert 0.25 * trits <= per_weight <= 0.5 * trits


def linear(model):
    return [matrix for matrix in model.ternary_matrices().values() if isinstance(matrix, torch.nn.Linear)]


def test_weights_kept_unpacked_in_training_are_a_cache():
    model = ArbForCausalLM(preset_config("arb-tiny", text_sequencer={"hidden_size": 48})).train()
    ids = torch.randint(0, 256, (2, 16))
    model(ids, labels=ids).loss.backward()
    (row,) = audit_model(model).caches
    assert (row.kind, row.bytes) == ("unpacked weights", 4 * 48 * 48) and "recurrent_proj" in row.name


def test_script_shows_the_caches_apart(folder, tmp_path, capsys):
    for given in ([folder], ["--preset", "arb-tiny"], ["--preset", "arb-tiny", "--allocate"]):
        assert run_script("audit_state", *given, "--json", tmp_path / "audit.json") == 0
        written = json.loads((tmp_path / "audit.json").read_text())
        assert written["cache_bytes"] == sum(row["bytes"] for row in written["caches"]) > 0
        assert written["caches_are_held"] is False and written["float_tensors"] == []
        assert written["state_bytes"] == sum(row["bytes"] for row in written["tensors"])
        shown = capsys.readouterr().out
        assert "cache, generation will hold" in shown and "row scales" in shown


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trits", [1, 2])
def test_what_decoding_keeps_is_known_before(monkeypatch, backend, trits):
    monkeypatch.setenv("ARB_BACKEND", backend)
    packed = pack_levels(random_trits(33, 100), trits)
    kept = decoding_form(packed, 100)
    assert decoding_bytes(33, 100, trits, packed.device) == (0 if kept is packed else kept.nbytes)
