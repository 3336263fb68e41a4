"""ArbConfig and its presets."""

from .configuration_arb import COMPUTE, ArbConfig
from .presets import PRESETS, preset_config

__all__ = ["COMPUTE", "PRESETS", "ArbConfig", "preset_config"]
