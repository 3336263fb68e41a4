"""Full finetuning: a run that starts from a checkpoint's weights, with fresh training state.

Only what inference needs is taken over, whether or not the checkpoint could be resumed: residual and momentum (or
votes) start at zero, so that equal weights make equal runs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from configuration_arb import ArbConfig, preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.blocks.ternary_codebook import TernaryCodebook
from modeling_arb.checkpoints.integrity import read_config, read_json_object
from training_arb.memory.state_audit import inference_hash

from .checkpoint_files import RUN_FILE, verify_checksums
from .checkpoint_source import find_checkpoint

# what a finetuning may choose for itself: how weights are updated and multiplied, not what they are
FREE_FIELDS = ("update_rule", "table_rule", "momentum_bits", "compute", "max_position_embeddings", "training_state")


def start_from(
    source: str,
    revision: str | None = None,
    preset: str | None = None,
    fields: dict[str, object] | None = None,
    ctx: int = 0,
    resumed: str | None = None,
) -> tuple[ArbForCausalLM, dict[str, str | None]]:
    """The model that a run from `source`, a folder or a hub name, begins with, and where it came from.

    preset, fields (of the config): must agree with the checkpoint, but for FREE_FIELDS. ctx: the longest text to come.
    resumed: the checkpoint of this very run that it goes on from; its weights are then the trainer's to load, and the
    source is not opened again. Raises ValueError when there is no such checkpoint, when it is damaged, or when the
    settings contradict it.
    """
    if resumed is not None:
        folder, origin = Path(resumed), _stored_origin(Path(resumed), source, revision)
    else:
        folder, commit = find_checkpoint(source, revision, "init_from")
        verify_checksums(folder)
        origin = {"source": source, "revision": revision, "commit": commit}
    stored = read_config(folder / "config.json")
    config = _agreed_config(stored, source, preset, fields or {})
    config.max_position_embeddings = max(config.max_position_embeddings, ctx)
    if resumed is not None:
        return ArbForCausalLM(config), origin
    origin["update_rule"] = stored.update_rule
    model = _load(folder, stored, config)
    return model, {**origin, "weights_sha256": inference_hash(model)}


def describe_start(origin: dict[str, str | None], config: ArbConfig) -> str:
    """What a run starts with, in one line."""
    fresh = "residual and momentum" if config.update_rule == "momentum" else "votes"
    goes_on = config.update_rule == origin["update_rule"] == "correlation"
    at = f" at {origin['commit']}" if origin["commit"] else ""
    return (
        f"weights of {origin['source']}{at}, trained by {origin['update_rule']}; now by {config.update_rule},"
        f" its {fresh} {'go on' if goes_on else 'start at zero'}"
    )


def _stored_origin(checkpoint: Path, source: str, revision: str | None) -> dict[str, str | None]:
    origin = read_json_object(checkpoint / RUN_FILE).get("init_from")
    if not origin:
        raise ValueError(f"init_from={source!r}: the run of {checkpoint} started from scratch")
    if (origin["source"], origin["revision"]) != (source, revision):
        began = f"{origin['source']!r}, revision {origin['revision'] or 'not given'}"
        raise ValueError(f"init_from={source!r}: the run of {checkpoint} started from {began}")
    return origin


def _agreed_config(stored: ArbConfig, source: str, preset: str | None, fields: dict[str, object]) -> ArbConfig:
    """The checkpoint's config with the free fields changed as asked."""
    if preset is not None:
        wanted = preset_config(preset, group_size=stored.group_size)
        name, value = _contradiction(stored, wanted) or (None, None)
        if name:
            raise ValueError(
                f"preset={preset!r} has {name}={value!r}, {source} {getattr(stored, name)!r}:"
                " the shape comes from the checkpoint"
            )
    config = ArbConfig.from_dict({**stored.to_dict(), **fields})
    name, value = _contradiction(stored, config) or (None, None)
    if name:
        raise ValueError(f"{name}={value!r} contradicts {source}, which has {getattr(stored, name)!r}")
    if stored.update_rule == "correlation" != config.update_rule:
        raise ValueError(
            f"update_rule={config.update_rule!r}: correlation's votes are part of the weights of {source}:"
            " only update_rule='correlation' can go on from them"
        )
    return config


def _contradiction(stored: ArbConfig, wanted: ArbConfig) -> tuple[str, object] | None:
    """The first field that says something else about the weights, and what it says."""
    for name in ArbConfig.__annotations__:
        if name not in FREE_FIELDS and getattr(stored, name, None) != getattr(wanted, name, None):
            return name, getattr(wanted, name, None)
    return None


def _load(folder: Path, stored: ArbConfig, config: ArbConfig) -> ArbForCausalLM:
    taking_up_votes = config.update_rule == "correlation" != stored.update_rule
    loaded = stored if taking_up_votes else config
    loaded.training_state = False
    model = ArbForCausalLM.from_pretrained(folder, config=loaded)
    if taking_up_votes:  # that inference needs and the checkpoint does not have
        weights, config.training_state = model.state_dict(), True
        model = ArbForCausalLM(config)
        for tensor in model.state_dict().values():
            tensor.zero_()
        model.load_state_dict(weights, strict=False)
    else:
        model.add_training_state()
    for module in model.modules():
        if isinstance(module, TernaryCodebook):  # no row is taken for unused before it had its chance
            torch.nn.init.ones_(module.usage)
    return model
