"""Every way to load a model: what is odd is refused in one line before anything large is made, what was saved loads."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from arb_kernels.formats.state_layout import state_layout
from configuration_arb import PRESETS, ArbConfig, preset_config
from modeling_arb import ArbForCausalLM, ArbModel
from modeling_arb.checkpoints.integrity import check_headers, check_values
from support.loopback_hub import used_by_this_process
from support.tensors import random_text, training_step
from training_arb.memory.live_memory import peak_memory_mb, reset_peak_memory
from training_arb.memory.state_audit import state_hash, unallocated_model
from training_arb.optim.integer_optimizer import IntegerOptimizer

ODD_TENSORS = {
    "float-scales": ("byte_head.proj.E", lambda tensor: tensor + 0.5, "dtype torch.float32"),
    "wide-scales": ("byte_head.proj.E", lambda tensor: tensor.to(torch.int16), "dtype torch.int16"),
    "float-counter": ("model.moe_graph.motif_graph.edge_steps", lambda tensor: tensor.double(), "dtype torch.float64"),
    "no-trits": ("byte_head.proj.T_packed", lambda tensor: tensor.clone().fill_(243), "not packed trits"),
    "no-motif": ("model.moe_graph.motif_graph.active_edge_src", lambda tensor: tensor + 1000, "not edge sources"),
    "no-momentum": ("byte_head.proj.accum", lambda tensor: tensor.clone().fill_(0x85), "not residual and momentum"),
    "no-row": ("model.shared_vq.book.fade_position", lambda tensor: tensor + 8, "not code usage"),
    "another-shape": ("byte_head.proj.E", lambda tensor: tensor[1:].clone(), "the config requires (288, 1)"),
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


@pytest.mark.parametrize("door", ["folder", "hub", "pickle-shards", "state-dict"])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        pytest.param(2, "one trit a weight instead of two", id="two-asked"),
        pytest.param(1, "two trits a weight instead of one", id="one-asked"),
        pytest.param({"head": 1, "mlp": 2}, "T_packed has shape", id="by-role"),
    ],
)
def test_a_config_of_other_trits_than_the_tensors_is_refused(hub, tmp_path, door, asked, said):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_latent_dim": 8}
    stored = ArbForCausalLM(preset_config("arb-tiny", **shape, trits_per_weight=1 if asked == 2 else 2))
    config = {**stored.config.to_dict(), "trits_per_weight": asked}
    with pytest.raises(ValueError) as refusal:
        open_door(door, tmp_path / "model", hub, config, dict(stored.state_dict()))
    assert said in str(refusal.value) and "trits_per_weight" in str(refusal.value) and "\n" not in str(refusal.value)


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
    with pytest.raises(ValueError, match="the config requires"):
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
    with pytest.raises(ValueError, match="a distributed checkpoint is not supported"):
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
