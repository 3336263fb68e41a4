"""ArbConfig and its presets."""

from .configuration_arb import ArbConfig
from .presets import PRESETS, preset_config

__all__ = ["PRESETS", "ArbConfig", "preset_config"]
