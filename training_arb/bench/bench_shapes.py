"""Shapes for the benches beyond the presets: the backbone alone, too large for a cache, small enough for a minute."""

from __future__ import annotations

from configuration_arb import PRESETS, ArbConfig, preset_config

SHAPES = {
    # 104M weights
    "100m": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "200m": {"hidden_size": 1536, "num_hidden_layers": 7, "num_attention_heads": 24, "intermediate_size": 6144},
}


def shape_config(name: str, **overrides) -> ArbConfig:
    """The ArbConfig of a preset or of a shape above. Raises ValueError on an unknown name."""
    shape = SHAPES.get(name.removeprefix("arb-"))
    if shape is None and name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join([*PRESETS, *SHAPES])}")
    return preset_config("arb-14m" if shape else name, **{**(shape or {}), **overrides})


def parse_batches(text: str) -> list[int]:
    """Batch sizes from a command line, with commas between. Raises ValueError on anything but positive integers."""
    for part in text.split(","):
        if not (part.isascii() and part.isdigit() and int(part)):
            raise ValueError(f"batch={part!r} must be a positive integer")
    return [int(part) for part in text.split(",")]
