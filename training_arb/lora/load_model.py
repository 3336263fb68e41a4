"""Loads a model by folder or hub name; the folder of an adapter gives its base with the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from modeling_arb import ArbForCausalLM
from training_arb.checkpoints.checkpoint_source import find_checkpoint


def load_model(name: str) -> ArbForCausalLM:
    """An ArbForCausalLM in evaluation mode, from a folder or a hub name.

    The folder of a peft adapter gives its base with the adapter on it. Raises ValueError when nothing is found.
    """
    if (Path(name) / "adapter_config.json").is_file():
        try:
            from .lora_adapter import load_adapter
        except ImportError as error:
            raise ValueError(f"model={name!r} is an adapter, and peft is not installed: {error}") from error
        return cast(ArbForCausalLM, load_adapter(name))  # peft's model passes on what it does not have itself
    return ArbForCausalLM.from_pretrained(find_checkpoint(name).folder).eval()
