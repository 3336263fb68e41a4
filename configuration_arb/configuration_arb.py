"""ArbConfig: every setting of the model, checked at construction."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .optional_blocks import LARGEST_WIDTH, MOST_MODULES, OPTIONAL_BLOCKS, check_blocks, complete_settings, is_int
from .trits_per_weight import ROLES, TritsPerWeight, fault_of, trits_of

VOCAB_SIZE = 288
PAD_ID, EOS_ID, BOS_ID = 256, 257, 258
UPDATE_RULES = ("momentum", "flip", "correlation")
TABLE_RULES = ("votes", "momentum")
TABLE_BLOCKS = ("memgram", "codebook", "composite")
COMPUTE = ("auto", "int8", "float")
GROUP_SIZES = (0, 4, 6, 8, 16, 32, 64, 96, 128)
PACKING_VERSION = 1
AUTO_MAP = {
    "AutoConfig": "configuration_arb.ArbConfig",
    "AutoModel": "modeling_arb.ArbModel",
    "AutoModelForCausalLM": "modeling_arb.ArbForCausalLM",
}
# taken from a stored config beside the fields; quantization_config, to be refused
TAKEN_FIELDS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "name_or_path",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


class ArbConfig(PreTrainedConfig):
    """Configuration of ARB, a byte-level language model with packed ternary weights.

    Shape: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size` (0: four times the width),
    `qk_nope_head_dim` and `qk_rope_head_dim` (one head's query and key: without and with rotary position),
    `v_head_dim`, `kv_latent_dim` (what the cache keeps of keys and values; 0: half the width less the rotary key).
    Ternary state: `trits_per_weight` (1: levels -1 to 1; 2: levels -4 to 4; or a dict by role: embedding, attention,
    mlp, head, tables, experts, blocks, and 1 for those left out), `group_size` (weights sharing one scale exponent; 0:
    the whole row), `update_rule` (momentum, flip, correlation), `table_rule` (what moves the touched rows of large
    tables under momentum: votes, which is flip's rule, or momentum), `momentum_bits` (4 or 8), `training_state`
    (whether the model has the update rule's accumulators; inference checkpoints do not). Arithmetic: `compute` (int8:
    matmuls on int8 activations and gradients, exact int32 sums; float: on S * T in the activations' dtype; auto: int8
    with group_size 0, otherwise float). Head: `head_layers` (residual MLPs before the 288-way projection),
    `head_intermediate_size` (theirs; 0: four times the width). Blocks: each name in OPTIONAL_BLOCKS
    (optional_blocks.py) is a field, a dict of its settings or None for off.

    Raises ValueError naming the field and its value when they describe no model.
    """

    model_type = "arb"
    keys_to_ignore_at_inference = ["past_key_values", "auxiliary_loss"]

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int = 0
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    kv_latent_dim: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    trits_per_weight: TritsPerWeight = 1
    group_size: int = 0
    update_rule: str = "momentum"
    table_rule: str = "votes"
    momentum_bits: int = 4
    training_state: bool = True
    compute: str = "auto"
    packing_version: int = PACKING_VERSION
    head_layers: int = 0
    head_intermediate_size: int = 0
    text_sequencer: dict[str, Any] | None = None
    memgram: dict[str, Any] | None = None
    windowed_attention: dict[str, Any] | None = None
    codebook: dict[str, Any] | None = None
    moe_graph: dict[str, Any] | None = None
    composite: dict[str, Any] | None = None
    output_router: dict[str, Any] | None = None
    video_head: dict[str, Any] | None = None
    talker_head: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = PAD_ID
    bos_token_id: int | None = BOS_ID
    eos_token_id: int | None = EOS_ID

    def __post_init__(self, **kwargs):
        if self.dtype is None:
            self.dtype = "float32"  # otherwise the loader takes the first tensor's: uint8
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_state()
        for name in OPTIONAL_BLOCKS:
            setattr(self, name, complete_settings(name, getattr(self, name)))
        check_blocks(self)
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.head_intermediate_size = self.head_intermediate_size or 4 * self.hidden_size
        self.kv_latent_dim = self.kv_latent_dim or max(self.hidden_size // 2 - self.qk_rope_head_dim, 1)

    def _check_sizes(self) -> None:
        positive = ("hidden_size", "num_hidden_layers", "num_attention_heads", "qk_rope_head_dim", "v_head_dim")
        for name in (*positive, "max_position_embeddings"):
            self._require(name, is_int(getattr(self, name)) and getattr(self, name) > 0, "a positive integer")
        for name in ("intermediate_size", "qk_nope_head_dim", "kv_latent_dim", "head_layers", "head_intermediate_size"):
            self._require(name, is_int(getattr(self, name)) and getattr(self, name) >= 0, "a non-negative integer")
        for name in ("num_hidden_layers", "head_layers"):
            self._require(name, getattr(self, name) <= MOST_MODULES, f"at most {MOST_MODULES:,}")
        widths = ("hidden_size", "num_attention_heads", "intermediate_size", "head_intermediate_size", "kv_latent_dim")
        for name in (*widths, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            self._require(name, getattr(self, name) <= LARGEST_WIDTH, f"at most {LARGEST_WIDTH:,}")
        self._require("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even: rotary position turns pairs")
        self._require(
            "vocab_size",
            is_int(self.vocab_size) and self.vocab_size == VOCAB_SIZE,
            f"{VOCAB_SIZE}: 256 bytes and 32 specials",
        )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            self._require(name, isinstance(value, float | int) and 0 < value < math.inf, "a positive number")

    def _check_state(self) -> None:
        self._require("update_rule", self.update_rule in UPDATE_RULES, f"one of {', '.join(UPDATE_RULES)}")
        self._require("table_rule", self.table_rule in TABLE_RULES, f"one of {', '.join(TABLE_RULES)}")
        fault = fault_of(self.trits_per_weight)
        self._require("trits_per_weight", not fault, fault)
        finer = self.update_rule == "momentum" or not any(self.trits_of(role) > 1 for role in ROLES)
        self._require("trits_per_weight", finer, f"1 with update_rule={self.update_rule!r}: votes move single trits")
        voting = self.table_rule == "votes" and any(getattr(self, name) is not None for name in TABLE_BLOCKS)
        self._require(
            "trits_per_weight",
            self.trits_of("tables") == 1 or not voting,
            "1 for tables with table_rule='votes', whose votes move single trits; set table_rule='momentum'",
        )
        sizes = ", ".join(map(str, GROUP_SIZES))
        self._require("group_size", is_int(self.group_size) and self.group_size in GROUP_SIZES, f"one of {sizes}")
        self._require("momentum_bits", is_int(self.momentum_bits) and self.momentum_bits in (4, 8), "4 or 8")
        self._require("training_state", isinstance(self.training_state, bool), "True or False")
        self._require("compute", self.compute in COMPUTE, f"one of {', '.join(COMPUTE)}")
        if hasattr(self, "quantization_config"):
            self._require("quantization_config", False, "absent: the weights are ternary already")
        known = self.packing_version == PACKING_VERSION
        self._require("packing_version", known, f"{PACKING_VERSION}, the only one that this version reads")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {expected}")

    def trits_of(self, role: str) -> int:
        """Trits a weight of the matrices with a role (trits_per_weight.py)."""
        return trits_of(self.trits_per_weight, role)

    def block(self, name: str) -> dict[str, Any]:
        """The settings of a block that is switched on."""
        settings = getattr(self, name)
        assert settings is not None, name
        return settings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> ArbConfig:
        """As in transformers, with two differences: overrides are checked like fields, and unknown entries of a stored
        config are dropped. An entry that names foreign code, a pipeline, a file or a model therefore never reaches a
        model or a saved config."""
        own = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        known = {*(field.name for field in fields(cls)), *TAKEN_FIELDS}
        stored = {name: value for name, value in config_dict.items() if name in known}
        if isinstance(stored.get("auto_map"), dict):
            stored["auto_map"] = {name: code for name, code in stored["auto_map"].items() if name in AUTO_MAP}
        return super().from_dict({**stored, **own}, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write config.json with the auto_map of this code, so that the folder loads as remote code."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
