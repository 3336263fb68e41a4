"""Full finetuning: a new run that starts from a checkpoint's weights.

Training state (residuals and momentum, or votes) comes along where the checkpoint has it and the update rules stay the
same. It starts at zero from an inference checkpoint, and when a rule or its number of bits changes. Weights are
converted when the number of trits a weight changes (trit_conversion.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configuration_arb import ArbConfig, preset_config
from configuration_arb.trits_per_weight import ROLES, describe_trits
from modeling_arb import ArbForCausalLM
from modeling_arb.blocks.ternary_codebook import TernaryCodebook
from modeling_arb.checkpoints.integrity import read_config, read_json_object
from training_arb.memory.state_audit import inference_hash

from .checkpoint_files import RUN_FILE, verify_checksums
from .checkpoint_source import find_checkpoint
from .trit_conversion import carry_over

# what a finetuning may choose for itself: how weights are updated, multiplied and stored, not their shape
RULE_FIELDS = ("update_rule", "table_rule", "momentum_bits")
FREE_FIELDS = (*RULE_FIELDS, "trits_per_weight", "compute", "max_position_embeddings", "training_state")


def start_from(
    source: str,
    revision: str | None = None,
    preset: str | None = None,
    fields: dict[str, object] | None = None,
    ctx: int = 0,
    resumed: str | None = None,
) -> tuple[ArbForCausalLM, dict[str, object]]:
    """The initial model of a run from `source`, a folder or a hub name, and its origin.

    preset, fields (of the config): must agree with the checkpoint, except for FREE_FIELDS. ctx: the longest text to
    come. resumed: the checkpoint of this run that it continues from; the trainer then loads its weights, and the source
    is not opened again. Raises ValueError when the checkpoint is not found, when it is damaged, or when the settings
    contradict it.
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
    keeps_state = stored.training_state and all(getattr(stored, name) == getattr(config, name) for name in RULE_FIELDS)
    model, conversion = _load(folder, stored, config, keeps_state)
    origin |= {"update_rule": stored.update_rule, "training_state": keeps_state}
    origin |= {"trits_per_weight": stored.trits_per_weight, **conversion}
    return model, {**origin, "weights_sha256": inference_hash(model)}


def describe_start(origin: dict[str, Any], config: ArbConfig) -> str:
    """The start of a run, in one line."""
    state = "residuals and momentum" if config.update_rule == "momentum" else "votes"
    comes_along = origin.get("training_state") or config.update_rule == origin["update_rule"] == "correlation"
    at = f" at {origin['commit']}" if origin["commit"] else ""
    return (
        f"weights of {origin['source']}{at}, trained by {origin['update_rule']}; now by {config.update_rule},"
        f" its {state} {'come along' if comes_along else 'start at zero'}{_describe_conversion(origin, config)}"
    )


def _describe_conversion(origin: dict[str, Any], config: ArbConfig) -> str:
    if "converted_matrices" not in origin:
        return ""
    before, after = describe_trits(origin["trits_per_weight"]), describe_trits(config.trits_per_weight)
    said = f"; trits a weight from {before} to {after}, {origin['converted_matrices']} matrices converted"
    if not origin["relative_rms_error"]:
        return f"{said} without error"
    worst, residuals = origin["largest_error"], "; residuals hold the error within their cells"
    return (
        f"{said} with a relative RMS error of {origin['relative_rms_error']:.2%}, at most"
        f" {worst['relative_rms_error']:.2%} ({worst['matrix']}){residuals if config.update_rule == 'momentum' else ''}"
    )


def _stored_origin(checkpoint: Path, source: str, revision: str | None) -> dict[str, object]:
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
            f"update_rule={config.update_rule!r}: the weights of {source} depend on correlation's votes:"
            " only update_rule='correlation' can continue from them"
        )
    return config


def _contradiction(stored: ArbConfig, wanted: ArbConfig) -> tuple[str, object] | None:
    """The first field with a conflicting value, and that value."""
    for name in ArbConfig.__annotations__:
        if name not in FREE_FIELDS and getattr(stored, name, None) != getattr(wanted, name, None):
            return name, getattr(wanted, name, None)
    return None


def _load(
    folder: Path, stored: ArbConfig, config: ArbConfig, keeps_state: bool
) -> tuple[ArbForCausalLM, dict[str, object]]:
    """The model of `config` with the checkpoint's weights and, with `keeps_state`, its training state, which otherwise
    is zero; and the errors of a conversion (`carry_over`)."""
    takes_up_votes = config.update_rule == "correlation" != stored.update_rule
    conversion: dict[str, object] = {}
    if takes_up_votes or any(config.trits_of(role) != stored.trits_of(role) for role in ROLES):
        stored.training_state, config.training_state = keeps_state, True
        model = ArbForCausalLM(config)
        conversion = carry_over(ArbForCausalLM.from_pretrained(folder, config=stored), model)
    else:
        config.training_state = keeps_state
        model = ArbForCausalLM.from_pretrained(folder, config=config)
        model.add_training_state()
    if not keeps_state:
        for module in model.modules():
            if isinstance(module, TernaryCodebook):  # so that no row counts as unused from the start
                torch.nn.init.ones_(module.usage)
    return model, conversion
