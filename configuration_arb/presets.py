"""Named shapes. Each is a function from overrides to an ArbConfig."""

from __future__ import annotations

from collections.abc import Callable

from .configuration_arb import ArbConfig


def arb_tiny(**overrides) -> ArbConfig:
    """0.1M weights: tests and smoke runs, seconds on a CPU."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ArbConfig(**{**shape, **overrides})


def arb_bench(**overrides) -> ArbConfig:
    """1.1M weights: the quality benchmark's default shape, two minutes a configuration on two CPU cores."""
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024}
    return ArbConfig(**{**shape, **overrides})


def arb_small(**overrides) -> ArbConfig:
    """2.0M weights: the README's pretraining run, minutes on two CPU cores."""
    shape = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1152}
    return ArbConfig(**{**shape, **overrides})


def arb_14m(**overrides) -> ArbConfig:
    """14M weights: the seeds' benchmark shape."""
    shape = {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2176,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    }
    return ArbConfig(**{**shape, **overrides})


PRESETS: dict[str, Callable[..., ArbConfig]] = {
    "arb-tiny": arb_tiny,
    "arb-bench": arb_bench,
    "arb-small": arb_small,
    "arb-14m": arb_14m,
}


def preset_config(name: str, **overrides) -> ArbConfig:
    """The ArbConfig of a preset, with fields overridden. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name](**overrides)
