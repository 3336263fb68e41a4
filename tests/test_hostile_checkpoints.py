"""Checkpoints made to hurt: whatever the bytes, a ValueError of one line or the state as saved, and little memory."""

import copy
import json
import resource
import shutil
import struct

import pytest
import torch
from helpers import random_text, training_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_hub import used_by_this_process
from safetensors.torch import save_file
from scripting import run_script
from transformers import AutoModelForCausalLM

from arb_kernels.state_layout import state_layout
from configuration_arb import PRESETS, ArbConfig, preset_config
from modeling_arb import ArbForCausalLM, ArbModel
from modeling_arb.checkpoint_integrity import check_headers, check_values, open_tensor_file
from training_arb.checkpoint_files import check_checkpoint, write_checksums
from training_arb.integer_optimizer import IntegerOptimizer
from training_arb.live_memory import peak_memory_mb, reset_peak_memory
from training_arb.state_audit import state_hash, unallocated_model

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
def test_without_checksums_a_change_is_refused_in_one_line_or_harmless(source, scratch, saved_hash, data, name):
    (scratch / "checksums.json").unlink(missing_ok=True)
    content = (source / name).read_bytes()
    (scratch / name).write_bytes(mutate(data, content))
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
    "no-json": (b"{", "config.json: no JSON"),
    "no-text": (b"\xff\xfe\x00", "config.json: no JSON"),
    "nested": (b"[" * 200_000, "config.json: no JSON"),
    "list": (b"[1]", "must hold a JSON object, not a list"),
    "null": (b"null", "must hold a JSON object, not a NoneType"),
    "packing_version": ({"packing_version": 2}, "packing_version=2 must be 1"),
    "text-for-size": ({"hidden_size": "64"}, "hidden_size"),
    "wide": ({"hidden_size": 1 << 40}, "hidden_size=1099511627776 must be at most 1,048,576"),
    "widest": ({"hidden_size": 1 << 20}, "the config asks for"),
    "deep": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 1,024"),
    "deepest": ({"num_hidden_layers": 1024}, "the config asks for"),
    "deep-head": ({"head_layers": 10**9}, "head_layers=1000000000 must be at most 1,024"),
    "latent": ({"kv_latent_dim": 10**12}, "kv_latent_dim=1000000000000 must be at most"),
    "heads": ({"num_attention_heads": 10**12}, "num_attention_heads=1000000000000 must be at most"),
    "memory": ({"memgram": {"slots": 10**12, "dim": 64}}, "memgram.slots=1000000000000 must be an integer"),
    "memory-most": ({"memgram": {"slots": (1 << 31) - 1, "dim": 1 << 20}}, "the config asks for"),
    "codebook": ({"codebook": {"size": 10**12, "dim": 64}}, "codebook.size=1000000000000 must be an integer"),
    "codebook-most": ({"codebook": {"size": (1 << 31) - 1, "dim": 1 << 20}}, "the config asks for"),
    "edges": (
        {"codebook": {"size": 8, "dim": 4}, "moe_graph": {"num_experts": 2, "active_edges": (1 << 31) - 1}},
        "the config asks for",
    ),
    "experts": ({"moe_graph": {"num_experts": 10**9}}, "moe_graph.num_experts=1000000000 must be an integer"),
    "wrong-size": ({"hidden_size": 24}, "the config asks for"),
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


ODD_TENSORS = {
    "float-scales": ("byte_head.proj.E", lambda tensor: tensor + 0.5, "dtype torch.float32"),
    "wide-scales": ("byte_head.proj.E", lambda tensor: tensor.to(torch.int16), "dtype torch.int16"),
    "float-counter": ("model.moe_graph.motif_graph.edge_steps", lambda tensor: tensor.double(), "dtype torch.float64"),
    "no-trits": ("byte_head.proj.T_packed", lambda tensor: tensor.clone().fill_(243), "not packed trits"),
    "no-motif": ("model.moe_graph.motif_graph.active_edge_src", lambda tensor: tensor + 1000, "not edge sources"),
    "no-momentum": ("byte_head.proj.accum", lambda tensor: tensor.clone().fill_(0x85), "not residual and momentum"),
    "no-row": ("model.shared_vq.book.fade_position", lambda tensor: tensor + 8, "not code usage"),
    "another-shape": ("byte_head.proj.E", lambda tensor: tensor[1:].clone(), "the config asks for (288, 1)"),
}
EVERYWHERE = ("float-scales", "float-counter", "no-motif")
DOORS = ["folder", "subfolder", "hub", "hub-subfolder", "shards", "variant", "pickle", "pickle-shards", "state-dict"]


@pytest.fixture(scope="module")
def graph_model():
    torch.manual_seed(0)
    blocks = {"codebook": {"size": 8, "dim": 4}, "moe_graph": {"num_experts": 2, "active_edges": 16}}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_latent_dim": 8}
    return ArbForCausalLM(preset_config("arb-tiny", **shape, **blocks))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with used_by_this_process(tmp_path_factory.mktemp("cache")) as hub:
        yield hub


def open_door(door, folder, hub, config, tensors, load=ArbForCausalLM.from_pretrained):
    """The model that is loaded from the tensors when they come in by this door."""
    inner = folder / "sub" if "subfolder" in door else folder
    inner.mkdir(parents=True)
    (inner / "config.json").write_text(json.dumps(config))
    given = {"subfolder": "sub"} if "subfolder" in door else {}
    if door == "state-dict":
        return load(None, config=ArbConfig.from_dict(config), state_dict=tensors)
    if door.startswith("pickle"):
        write_pickles(inner, tensors, 2 if door == "pickle-shards" else 1)
    elif door == "shards":
        write_shards(inner, tensors)
    else:
        name = "model.safetensors" if door != "variant" else "model.fp16.safetensors"
        save_file(tensors, inner / name, metadata={"format": "pt"})
    if door == "variant":
        given["variant"] = "fp16"
    if not door.startswith("hub"):
        return load(folder, **given)
    repo = f"me/model-{len(hub.repositories)}"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add(repo).commit(files, "main", "weights")
    return load(repo, **given)


def write_pickles(folder, tensors, number):
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::number]} for i in range(number)]
    files = ["pytorch_model.bin"] if number == 1 else [f"pytorch_model-{i}.bin" for i in range(number)]
    for part, file in zip(parts, files, strict=True):
        torch.save(part, folder / file)
    if number > 1:
        write_index(folder / "pytorch_model.bin.index.json", parts, files)


def write_shards(folder, tensors):
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::2]} for i in range(2)]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for part, file in zip(parts, files, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder / "model.safetensors.index.json", parts, files)


def write_index(path, parts, files):
    weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("door", "fault"),
    [
        *((door, fault) for door in DOORS for fault in EVERYWHERE),
        *((door, fault) for door in ("hub", "pickle") for fault in sorted({*ODD_TENSORS} - {*EVERYWHERE})),
    ],
)
def test_an_odd_tensor_is_refused_at_every_door(graph_model, hub, tmp_path, door, fault):
    name, change, said = ODD_TENSORS[fault]
    tensors = graph_model.state_dict()
    with pytest.raises(ValueError) as refusal:
        open_door(door, tmp_path / "model", hub, graph_model.config.to_dict(), {**tensors, name: change(tensors[name])})
    assert name in str(refusal.value) and said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_lets_in_what_was_saved(graph_model, hub, tmp_path, door):
    loaded = open_door(door, tmp_path / "model", hub, graph_model.config.to_dict(), dict(graph_model.state_dict()))
    assert state_hash(loaded) == state_hash(graph_model)


HUGE = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 8, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("load", "door"),
    [*((ArbForCausalLM, door) for door in DOORS), *((AutoModelForCausalLM, door) for door in ("hub", "pickle"))],
)
def test_a_config_larger_than_its_files_is_refused_before_it_is_built(graph_model, hub, tmp_path, door, load):
    config = {**graph_model.config.to_dict(), **HUGE, "kv_latent_dim": 0}
    reset_peak_memory()
    before = peak_memory_mb()
    with pytest.raises(ValueError, match="the config asks for"):
        open_door(door, tmp_path / "model", hub, config, dict(graph_model.state_dict()), load.from_pretrained)
    assert peak_memory_mb() - before < 100


def test_sizes_that_may_differ_stay_within_reach(graph_model, tmp_path):
    """A config of the same order may start tensors fresh where the caller says so, a huge one may not."""
    graph_model.save_pretrained(tmp_path)
    fresh = {"ignore_mismatched_sizes": True, "kv_latent_dim": 12}
    assert ArbForCausalLM.from_pretrained(tmp_path, **fresh).config.kv_latent_dim == 12
    reset_peak_memory()
    before = peak_memory_mb()
    with pytest.raises(ValueError, match="bytes of state, but"):
        ArbForCausalLM.from_pretrained(tmp_path, **{**fresh, **HUGE})
    assert peak_memory_mb() - before < 100


@pytest.mark.parametrize("preset", PRESETS)
def test_every_listed_tensor_has_one_dtype_and_another_is_refused(preset):
    """The list is the modules' own, so that no tensor can be left off it."""
    expected = unallocated_model(preset_config(preset)).state_dict()
    check_headers("here", expected, expected, {})
    for name in {name.rpartition(".")[2]: name for name in expected}.values():
        with pytest.raises(ValueError, match=f"tensor {name} has dtype torch.float32"):
            check_headers("here", {**expected, name: expected[name].float()}, expected, {})


def test_load_state_dict_casts_nothing(graph_model):
    name = "byte_head.proj.E"
    with pytest.raises(RuntimeError, match=f"tensor {name} has dtype torch.float32, expected torch.int8"):
        graph_model.load_state_dict({**graph_model.state_dict(), name: graph_model.state_dict()[name].float()})


def test_two_tensors_of_one_name_are_refused(graph_model, tmp_path):
    """The backbone finds its own with and without the language model's prefix."""
    tensors = dict(graph_model.state_dict())
    name = "blocks.0.mlp.up_proj.E"
    save_file({**tensors, name: tensors[f"model.{name}"].float()}, tmp_path / "model.safetensors")
    graph_model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"tensor {name} is stored twice"):
        ArbModel.from_pretrained(tmp_path)


PICKLES = {
    "expanded": lambda tensors: {
        **tensors,
        "byte_head.proj.T_packed": torch.zeros(1, dtype=torch.uint8).expand(288, 4),
    },
    "list": lambda tensors: list(tensors.values()),
    "number": lambda tensors: {**tensors, "step": 3},
    "sparse": lambda tensors: {**tensors, "byte_head.proj.E": tensors["byte_head.proj.E"].to_sparse()},
}


@pytest.mark.parametrize("how", [*PICKLES, "cut", "garbage", "old-format"])
def test_hostile_pickles_are_one_line(graph_model, tmp_path, how):
    path, tensors = tmp_path / "pytorch_model.bin", dict(graph_model.state_dict())
    graph_model.config.save_pretrained(tmp_path)
    old = how == "old-format"
    torch.save(PICKLES[how](tensors) if how in PICKLES else tensors, path, _use_new_zipfile_serialization=not old)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "garbage":
        path.write_bytes(b"\x80\x04garbage" * 99)
    with pytest.raises(ValueError) as refusal:
        ArbForCausalLM.from_pretrained(tmp_path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_shards_of_ranks_are_refused(graph_model, tmp_path):
    graph_model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="shards of ranks"):
        ArbForCausalLM.from_pretrained(tmp_path)


def test_illegal_values_are_counted_without_a_large_temporary():
    spec = state_layout("momentum", 1 << 10, 5 << 17, 5 << 17)["T_packed"]
    packed = torch.zeros(spec.shape, dtype=torch.uint8)
    packed[-1, -3:] = 243
    reset_peak_memory()
    before = peak_memory_mb()
    assert spec.count_illegal(packed) == 3
    assert peak_memory_mb() - before < 32  # of 128 MB


def test_training_leaves_only_legal_values(graph_model):
    """The momentum code below -7 is in no state that training makes, whatever the gradients."""
    model = copy.deepcopy(graph_model)
    optimizer = IntegerOptimizer(model, lr=0.9)
    for step in range(12):
        training_step(model, optimizer, random_text(step, 2, 24))
    check_values("trained", model)
