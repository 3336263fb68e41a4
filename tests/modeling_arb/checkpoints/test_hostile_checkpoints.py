"""Checkpoints made to hurt: whatever the bytes, a ValueError of one line or the state as saved, and little memory."""

import json
import resource
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configuration_arb import ArbConfig, preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import open_tensor_file
from support.scripting import run_script
from training_arb.checkpoints.checkpoint_files import check_checkpoint, write_checksums
from training_arb.memory.state_audit import state_hash

FUZZ = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
STATE = {"global_step": 4, "max_steps": 8, "log_history": [{"loss": 2.5, "step": 4}]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small training checkpoint, as ArbTrainer lays it out."""
    folder = tmp_path_factory.mktemp("source") / "checkpoint-4"
    torch.manual_seed(0)
    config = preset_config("arb-tiny", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, kv_latent_dim=8)
    model = ArbForCausalLM(config)
    model.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"ctx": 32, "seed": 0}))
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    torch.save({"state": {}, "steps": 4}, folder / "optimizer.pt")
    write_checksums(folder)
    return folder


@pytest.fixture
def checkpoint(source, tmp_path):
    return shutil.copytree(source, tmp_path / "checkpoint-4")


@pytest.fixture(scope="module")
def scratch(source, tmp_path_factory):
    """A copy that a fuzz test damages and mends again: its examples must not copy a whole folder each."""
    return shutil.copytree(source, tmp_path_factory.mktemp("scratch") / "checkpoint-4")


@pytest.fixture(scope="module")
def saved_hash(source):
    return state_hash(ArbForCausalLM.from_pretrained(source))


def refused(check, folder):
    """The one line that `check` refuses the folder with; None when it does not."""
    try:
        check(folder)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return str(error)


def load(folder):
    return state_hash(ArbForCausalLM.from_pretrained(folder))


def mutate(data, content):
    """Bytes flipped, cut off or written over."""
    how, place, what = data.draw(
        st.tuples(st.sampled_from(["flip", "cut", "write"]), st.integers(0, len(content) - 1), st.binary(min_size=1))
    )
    if how == "cut":
        return content[:place]
    if how == "flip":
        return content[:place] + bytes([content[place] ^ (what[0] | 1)]) + content[place + 1 :]
    return content[:place] + what + content[place + len(what) :]


@FUZZ
@given(data=st.data(), name=st.sampled_from(["model.safetensors", "config.json", "trainer_state.json", "optimizer.pt"]))
def test_any_change_is_found_by_the_checksums(source, scratch, data, name):
    content = (source / name).read_bytes()
    changed = mutate(data, content)
    (scratch / name).write_bytes(changed)
    fault = refused(check_checkpoint, scratch)
    (scratch / name).write_bytes(content)
    assert (fault is None) == (changed == content)
    assert fault is None or name in fault


@FUZZ
@given(data=st.data(), name=st.sampled_from(["config.json", "trainer_state.json", "run.json", "optimizer.pt"]))
def test_a_change_that_the_checksums_cover_is_refused_in_one_line_or_harmless(source, scratch, saved_hash, data, name):
    content = (source / name).read_bytes()
    (scratch / name).write_bytes(mutate(data, content))
    write_checksums(scratch)
    fault, loaded = refused(check_checkpoint, scratch), None
    if fault is None and name == "config.json":
        loaded = load_or_none(scratch)
    (scratch / name).write_bytes(content)
    shutil.copy(source / "checksums.json", scratch)
    assert fault is None or name in fault
    assert loaded in (None, saved_hash)


def load_or_none(folder):
    hashes = []
    refused(lambda folder: hashes.append(load(folder)), folder)
    return hashes[0] if hashes else None


@FUZZ
@given(data=st.data())
def test_a_changed_header_never_loads_another_shape(source, scratch, data):
    """Past the header any byte may be state: only the checksum knows. Names and types are held to the config."""
    content = (source / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(st.integers(0, end - 1))
    changed = content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]
    (scratch / "model.safetensors").write_bytes(changed)
    loaded = []
    refused(lambda folder: loaded.append(ArbForCausalLM.from_pretrained(folder)), scratch)
    (scratch / "model.safetensors").write_bytes(content)
    for model in loaded:
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
        config = json.loads((source / "config.json").read_text())
        wanted = ArbForCausalLM(ArbConfig.from_dict(config)).state_dict()
        assert layout == {name: (tensor.dtype, tensor.shape) for name, tensor in wanted.items()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers(10**6, 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(field=st.sampled_from([*sorted(ArbConfig.__annotations__), "dtype", "id2label"]), value=JSON)
def test_any_field_of_the_config_is_refused_in_one_line_or_harmless(source, scratch, saved_hash, field, value):
    text = (source / "config.json").read_text()
    (scratch / "config.json").write_text(json.dumps({**json.loads(text), field: value}))
    loaded = load_or_none(scratch)
    (scratch / "config.json").write_text(text)
    assert loaded in (None, saved_hash)


def header_of(size):
    return lambda content: struct.pack("<Q", size) + content[8:]


def many_tensors(content):
    entries = (f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(400_000))
    header = ("{" + ",".join(entries) + "}").encode()
    return struct.pack("<Q", len(header)) + header


HOSTILE_WEIGHTS = {
    "header-beyond-file": header_of(1 << 20),
    "header-of-99-MB": header_of(99 << 20),
    "header-of-2^62": header_of(1 << 62),
    "header-of-all-ones": header_of((1 << 64) - 1),
    "400000-tensors": many_tensors,
    "huge-shape": lambda content: content.replace(b'"shape":[', b'"shape":[9999999999,', 1),
    "nested": lambda _: struct.pack("<Q", 1 << 20) + b"[" * (1 << 20),
    "empty": lambda _: b"",
    "four-bytes": lambda content: content[:4],
    "half": lambda content: content[: len(content) // 2],
    "no-zip": lambda _: b"PK\x03\x04" * 500,
}


@pytest.mark.parametrize("how", HOSTILE_WEIGHTS)
@pytest.mark.parametrize("script", ["generate", "audit_state"])
def test_hostile_weights_are_one_line_and_little_memory(checkpoint, capsys, script, how):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(HOSTILE_WEIGHTS[how](weights.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_script(script, checkpoint, *(["--prompt", "a"] if script == "generate" else [])) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert str(weights) in error and "damaged or truncated" in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert "model.safetensors" in refused(check_checkpoint, checkpoint)


HOSTILE_CONFIGS = {
    "no-json": (b"{", "config.json: not JSON"),
    "no-text": (b"\xff\xfe\x00", "config.json: not JSON"),
    "nested": (b"[" * 200_000, "config.json: not JSON"),
    "list": (b"[1]", "must hold a JSON object, not a list"),
    "null": (b"null", "must hold a JSON object, not a NoneType"),
    "packing_version": ({"packing_version": 2}, "packing_version=2 must be 1"),
    "text-for-size": ({"hidden_size": "64"}, "hidden_size"),
    "wide": ({"hidden_size": 1 << 40}, "hidden_size=1099511627776 must be at most 1,048,576"),
    "widest": ({"hidden_size": 1 << 20}, "the config requires"),
    "deep": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 1,024"),
    "deepest": ({"num_hidden_layers": 1024}, "the config requires"),
    "deep-head": ({"head_layers": 10**9}, "head_layers=1000000000 must be at most 1,024"),
    "latent": ({"kv_latent_dim": 10**12}, "kv_latent_dim=1000000000000 must be at most"),
    "heads": ({"num_attention_heads": 10**12}, "num_attention_heads=1000000000000 must be at most"),
    "memory": ({"memgram": {"slots": 10**12, "dim": 64}}, "memgram.slots=1000000000000 must be an integer"),
    "memory-most": ({"memgram": {"slots": (1 << 31) - 1, "dim": 1 << 20}}, "the config requires"),
    "codebook": ({"codebook": {"size": 10**12, "dim": 64}}, "codebook.size=1000000000000 must be an integer"),
    "codebook-most": ({"codebook": {"size": (1 << 31) - 1, "dim": 1 << 20}}, "the config requires"),
    "edges": (
        {"codebook": {"size": 8, "dim": 4}, "moe_graph": {"num_experts": 2, "active_edges": (1 << 31) - 1}},
        "the config requires",
    ),
    "experts": ({"moe_graph": {"num_experts": 10**9}}, "moe_graph.num_experts=1000000000 must be an integer"),
    "wrong-size": ({"hidden_size": 24}, "the config requires"),
}


@pytest.mark.parametrize("how", HOSTILE_CONFIGS)
def test_hostile_configs_are_one_line_and_little_memory(checkpoint, capsys, how):
    changes, said = HOSTILE_CONFIGS[how]
    config = checkpoint / "config.json"
    if isinstance(changes, dict):
        changes = json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 2, **changes}).encode()
    config.write_bytes(changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_script("generate", checkpoint, "--prompt", "a") == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert said in error and str(checkpoint) in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_tensor_file_is_closed_again(checkpoint):
    for _ in range(3):
        with open_tensor_file(checkpoint / "model.safetensors") as file:
            assert len(file.keys()) > 10
