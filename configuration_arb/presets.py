"""Named shapes. Each is a function from overrides to an ArbConfig."""

from __future__ import annotations

from collections.abc import Callable

from .configuration_arb import ArbConfig
from .trits_per_weight import ROLES, TritsPerWeight


def _two_trits(overrides: dict) -> TritsPerWeight:
    """Two trits a weight where the update rules can move them: the loss at equal time is lower (docs/results.md)."""
    if overrides.get("update_rule", "momentum") != "momentum":
        return 1
    votes = overrides.get("table_rule", "momentum") == "votes"
    return dict.fromkeys((role for role in ROLES if role != "tables"), 2) if votes else 2


def arb_tiny(**overrides) -> ArbConfig:
    """0.1M weights: tests and smoke runs, seconds on a CPU."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ArbConfig(**{**shape, **overrides})


def arb_bench(**overrides) -> ArbConfig:
    """1.1M weights: the quality benchmark's default shape, two minutes a configuration on two CPU cores."""
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024}
    return ArbConfig(**{**shape, "trits_per_weight": _two_trits(overrides), **overrides})


def arb_small(**overrides) -> ArbConfig:
    """3.1M weights: `make pretrain`, minutes on two CPU cores. MemGram lowers the loss at equal time
    (docs/results.md)."""
    shape = {
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 1152,
        "memgram": {"slots": 1 << 15, "dim": 32},
        "table_rule": "momentum",
        "trits_per_weight": _two_trits(overrides),
    }
    return ArbConfig(**{**shape, **overrides})


def arb_14m(**overrides) -> ArbConfig:
    """14M weights: the shape of the speed benchmarks."""
    shape = {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2176,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "trits_per_weight": _two_trits(overrides),
    }
    return ArbConfig(**{**shape, **overrides})


def arb_tiny_full(**overrides) -> ArbConfig:
    """arb-tiny with every text block on."""
    blocks = {
        "text_sequencer": {"hidden_size": 48},
        "memgram": {"slots": 512, "dim": 16},
        "windowed_attention": {"window": 32, "stride": 8},
        "codebook": {"size": 64, "dim": 16},
        "moe_graph": {"num_experts": 4, "active_edges": 256},
        "composite": {"size": 256, "dim": 16},
        "output_router": {"num_heads": 2, "gate_size": 16},
        "head_layers": 1,
    }
    return arb_tiny(**{**blocks, **overrides})


def arb_seed(**overrides) -> ArbConfig:
    """Text sequencer, codebook, graph, composite and router at arb-small's width."""
    blocks = {
        "memgram": None,
        "text_sequencer": {},
        "codebook": {"size": 4096, "dim": 64},
        "moe_graph": {"num_experts": 8, "active_edges": 4096},
        "composite": {"size": 16384, "dim": 64},
        "output_router": {"num_heads": 2},
    }
    return arb_small(**{**blocks, **overrides})


def arb_3b(**overrides) -> ArbConfig:
    """3.0B weights, among them books of ten million motifs and five million motif pairs."""
    shape = {
        "hidden_size": 2048,
        "num_hidden_layers": 17,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "kv_latent_dim": 448,
        "head_layers": 10,
        "head_intermediate_size": 15296,
        "text_sequencer": {"hidden_size": 1808},
        "codebook": {"size": 10_000_000, "dim": 64},
        "moe_graph": {"num_experts": 16, "expert_size": 6528, "active_edges": 1 << 18},
        "composite": {"size": 5_000_000, "dim": 64, "hidden_size": 4352},
        "output_router": {"num_heads": 3},
        "video_head": {"latent_dim": 1024, "hidden_size": 18176},
        "talker_head": {"num_codes": 1024, "hidden_size": 18304},
    }
    return ArbConfig(**{**shape, **overrides})


PRESETS: dict[str, Callable[..., ArbConfig]] = {
    "arb-tiny": arb_tiny,
    "arb-tiny-full": arb_tiny_full,
    "arb-bench": arb_bench,
    "arb-small": arb_small,
    "arb-seed": arb_seed,
    "arb-14m": arb_14m,
    "arb-3b": arb_3b,
}


def preset_config(name: str, **overrides) -> ArbConfig:
    """The ArbConfig of a preset, with fields overridden. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name](**overrides)
