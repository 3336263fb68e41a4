"""ArbConfig: every refusal names its field and value; presets; derived sizes; save and load."""

import json

import pytest

from configuration_arb import PRESETS, ArbConfig, preset_config
from configuration_arb.optional_blocks import OPTIONAL_BLOCKS

POSITIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
NOT_NEGATIVE = ("intermediate_size", "qk_nope_head_dim", "kv_latent_dim", "head_layers", "head_intermediate_size")
REFUSED = [
    *((name, value) for name in POSITIVE for value in (0, -8, 64.0, "64", True, None)),
    *((name, value) for name in NOT_NEGATIVE for value in (-1, 2.5, "16", True, None)),
    ("qk_rope_head_dim", 7),
    *(("vocab_size", value) for value in (0, 256, 289)),
    *((name, value) for name in ("rope_theta", "rms_norm_eps") for value in (0.0, -1.0, float("inf"), float("nan"))),
    *(("rope_theta", value) for value in ("10000", None)),
    *(("update_rule", value) for value in ("adam", "", None, 3)),
    *(("group_size", value) for value in (-1, 1, 5, 256, 32.0, "row", False, None)),
    *(("table_rule", value) for value in ("flip", None)),
    *(("momentum_bits", value) for value in (0, 2, 16, "4", None)),
    *(("packing_version", value) for value in (0, 2, None)),
    *((name, 1025) for name in ("num_hidden_layers", "head_layers")),
    *((name, (1 << 20) + 1) for name in (*POSITIVE, *NOT_NEGATIVE) if name != "max_position_embeddings"),
]
BOOK, GRAPH, MEMORY = {"size": 32, "dim": 8}, {"num_experts": 4}, {"slots": 8, "dim": 4}
REFUSED_BLOCKS = [
    ("codebook", {"codebook": {"size": 4096}}, "codebook.dim is missing"),
    ("codebook", {"codebook": {"dim": 64}}, "codebook.size is missing"),
    ("size", {"codebook": {**BOOK, "size": 0}}, "codebook.size=0 must be"),
    ("commitment", {"codebook": {**BOOK, "commitment": -1}}, "codebook.commitment=-1 must be"),
    ("unknown", {"codebook": {**BOOK, "rows": 3}}, "codebook.rows=3 is unknown"),
    ("dict", {"memgram": 4}, "memgram=4 must be None or a dict"),
    ("orders", {"memgram": {"slots": 8, "dim": 4, "orders": []}}, r"memgram.orders=\[\] must be"),
    ("top_k", {"moe_graph": {"num_experts": 2, "top_k": 3}}, "moe_graph.top_k=3 must be at most num_experts=2"),
    ("halt", {"moe_graph": {**GRAPH, "halt_threshold": 1.5}}, "moe_graph.halt_threshold=1.5 must be"),
    ("edges", {"moe_graph": {**GRAPH, "active_edges": 9}}, "moe_graph.active_edges=9 needs codebook"),
    ("pairs", {"composite": BOOK}, "composite is given but codebook is None"),
    ("router", {"output_router": {}}, "output_router.num_heads is missing"),
    ("heads", {"output_router": {"num_heads": 0}}, "output_router.num_heads=0 must be"),
    (
        "stride",
        {"windowed_attention": {"window": 4, "stride": 8}},
        "windowed_attention.stride=8 must be at most window=4",
    ),
    (
        "many-experts",
        {"moe_graph": {"num_experts": 1025}},
        "num_experts=1025 must be an integer of at least 1 and at most",
    ),
    ("many-rows", {"memgram": {**MEMORY, "slots": 1 << 31}}, "memgram.slots=2147483648 must be"),
    ("many-orders", {"memgram": {**MEMORY, "orders": [3] * 17}}, "memgram.orders=.* must be"),
    ("video", {"video_head": {}}, "video_head.latent_dim is missing"),
]


@pytest.mark.parametrize("name, value", [pytest.param(*case, id="{}={!r}".format(*case)) for case in REFUSED])
def test_refusal_names_field_and_value(name, value):
    with pytest.raises(ValueError) as refusal:
        ArbConfig(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name}={value!r} must be ")
    assert "\n" not in message


@pytest.mark.parametrize("given, message", [pytest.param(*case[1:], id=case[0]) for case in REFUSED_BLOCKS])
def test_refused_blocks(given, message):
    with pytest.raises(ValueError, match=message):
        ArbConfig(**given)


def test_blocks_are_completed_and_survive_a_checkpoint(tmp_path):
    config = ArbConfig(codebook=BOOK, moe_graph={**GRAPH, "active_edges": 16}, memgram={**MEMORY, "orders": (2, 4)})
    assert config.codebook == {"size": 32, "dim": 8, "commitment": 0.25, "hashes": 4, "probes": 4}
    assert config.moe_graph["top_k"] == 2 and config.memgram["orders"] == [2, 4]
    config.save_pretrained(tmp_path)
    stored = ArbConfig.from_pretrained(tmp_path)
    assert all(getattr(stored, name) == getattr(config, name) for name in OPTIONAL_BLOCKS)


@pytest.mark.parametrize("group_size", [0, 4, 6, 8, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("update_rule", ["momentum", "flip", "correlation"])
@pytest.mark.parametrize("momentum_bits", [4, 8])
def test_every_listed_state_is_accepted(group_size, update_rule, momentum_bits):
    config = ArbConfig(group_size=group_size, update_rule=update_rule, momentum_bits=momentum_bits)
    assert (config.group_size, config.update_rule, config.momentum_bits) == (group_size, update_rule, momentum_bits)


def test_defaults():
    config = ArbConfig()
    assert (config.model_type, config.vocab_size, config.update_rule, config.group_size) == ("arb", 288, "momentum", 0)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (256, 257, 258)
    assert str(config.dtype) in ("float32", "torch.float32")
    assert config.training_state and not config.tie_word_embeddings
    assert all(getattr(config, name) is None for name in OPTIONAL_BLOCKS)


@pytest.mark.parametrize(
    "given, intermediate_size, kv_latent_dim",
    [
        pytest.param({"hidden_size": 256}, 1024, 112, id="both-derived"),
        pytest.param({"hidden_size": 256, "qk_rope_head_dim": 32}, 1024, 96, id="rotary-key-counts"),
        pytest.param({"hidden_size": 8, "qk_rope_head_dim": 16}, 32, 1, id="at-least-one"),
        pytest.param({"hidden_size": 256, "intermediate_size": 77, "kv_latent_dim": 5}, 77, 5, id="both-given"),
    ],
)
def test_derived_sizes(given, intermediate_size, kv_latent_dim):
    config = ArbConfig(**given)
    assert (config.intermediate_size, config.kv_latent_dim) == (intermediate_size, kv_latent_dim)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset_config(name)
    assert isinstance(config, ArbConfig) and config.vocab_size == 288
    other = preset_config(name, hidden_size=96, update_rule="flip")
    assert (other.hidden_size, other.update_rule) == (96, "flip")
    assert preset_config(name).hidden_size == config.hidden_size != 96


def test_presets_differ():
    assert {"arb-tiny", "arb-tiny-full", "arb-small", "arb-14m", "arb-3b"} <= set(PRESETS)
    shapes = [preset_config(name).to_json_string() for name in PRESETS]
    assert len(set(shapes)) == len(shapes)


def test_a_preset_refuses_a_bad_override():
    with pytest.raises(ValueError, match="group_size=5 must be"):
        preset_config("arb-tiny", group_size=5)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset='arb-huge' is not one of .*arb-tiny"):
        preset_config("arb-huge")


@pytest.mark.parametrize("name", PRESETS)
def test_save_and_load(name, tmp_path):
    config = preset_config(name, group_size=32, momentum_bits=8, rope_theta=5000.0, training_state=False)
    config.save_pretrained(tmp_path)
    loaded = ArbConfig.from_pretrained(tmp_path)
    saved = config.to_dict()
    assert {key: loaded.to_dict()[key] for key in saved} == saved
    assert (loaded.group_size, loaded.momentum_bits, loaded.rope_theta) == (32, 8, 5000.0)
    assert not loaded.training_state


def test_saved_config_names_the_code(tmp_path):
    """With the auto_map in config.json the folder loads as remote code."""
    ArbConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "arb" and written["packing_version"] == 1
    assert written["auto_map"] == {
        "AutoConfig": "configuration_arb.ArbConfig",
        "AutoModel": "modeling_arb.ArbModel",
        "AutoModelForCausalLM": "modeling_arb.ArbForCausalLM",
    }


def test_loading_a_foreign_packing_version(tmp_path):
    ArbConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "packing_version": 99}))
    with pytest.raises(ValueError, match="packing_version=99"):
        ArbConfig.from_pretrained(tmp_path)


def test_every_declared_block_is_a_field_and_every_such_field_declared():
    fields = [name for name, kind in ArbConfig.__annotations__.items() if "dict" in str(kind)]
    assert fields == list(OPTIONAL_BLOCKS)
    assert all(block.about and bool(block.part) == bool(block.area) for block in OPTIONAL_BLOCKS.values())
