"""The model card of an exported folder. Every number comes from the run's record or is counted in the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCardData

from arb_kernels.formats.decode_layout import BITS, layout_bytes
from arb_kernels.formats.packing import largest_level
from configuration_arb import ArbConfig
from configuration_arb.optional_blocks import OPTIONAL_BLOCKS
from configuration_arb.trits_per_weight import describe_trits
from modeling_arb.layers.ternary_linear import TernaryLinear
from training_arb.memory.state_audit import StateAudit, audit_config, unallocated_model
from training_arb.report.run_facts import RunFacts, without_folders

TEMPLATE_FILE = Path(__file__).with_name("model_card.md")
LICENCE = "apache-2.0"
TAGS = ["arb", "ternary", "byte-level", "integer-training"]
METRIC = "bits_per_byte"
SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "head_layers",
    "trits_per_weight",
    "group_size",
)
SETTINGS = (
    "update_rule",
    "table_rule",
    "momentum_bits",
    "learning_rate",
    "per_device_train_batch_size",
    "batch",
    "warmup_steps",
    "seed",
)
UNKNOWN_RUN = "No record of its run lies beside the checkpoint that this was exported from."


def fill_card(config: ArbConfig, audit: StateAudit, file_bytes: int, facts: RunFacts, repo_id: str | None) -> str:
    """The text of README.md. audit: of the exported files. repo_id: where it will be on the hub."""
    title = repo_id.rpartition("/")[2] if repo_id else "ARB model"
    return Template(TEMPLATE_FILE.read_text(encoding="utf-8")).substitute(
        metadata=card_metadata(facts, title).to_yaml(),
        title=title,
        name=repo_id or "path/to/this/folder",
        prompt=json.dumps(facts.settings.get("prompt", "def ")),
        weights=f"{audit.logical_weights:,}",
        file_bytes=f"{file_bytes:,}",
        levels=_levels(audit),
        bits_per_weight=f"{8 * file_bytes / audit.logical_weights:.2f}",
        training=_training(config, facts),
        shape=_table(("field", "value"), _shape(config)),
        float_tensors=len(audit.float_tensors),
        state=_state_table(config, audit),
        state_note=_state_note(config, audit),
        decoding_note=_decoding_note(config),
        commands=_commands(facts, repo_id),
        limit_of_figures=_limit_of_figures(facts),
    )


def card_metadata(facts: RunFacts, model_name: str) -> ModelCardData:
    """Metadata for the hub: licence, tags, data and base model if they are on the hub, held-out score."""
    results = None
    if facts.bits_per_byte is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=facts.dataset or "text",
                dataset_name=f"held-out part of {facts.data}",
                metric_type=METRIC,
                metric_name="Bits per byte",
                metric_value=round(facts.bits_per_byte, 4),
            )
        ]
    origin = facts.init_from or {}
    on_hub = {"base_model": origin["source"], "base_model_relation": "finetune"} if origin.get("commit") else {}
    return ModelCardData(
        license=LICENCE,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=[facts.dataset] if facts.dataset else None,
        model_name=model_name,
        eval_results=results,
        **on_hub,
    )


def _training(config: ArbConfig, facts: RunFacts) -> str:
    if facts.steps is None:
        return UNKNOWN_RUN
    rows = [
        ("data", facts.data),
        ("started from", _origin(facts)),
        ("steps", f"{facts.steps:,}"),
        ("bytes trained on", facts.trained_bytes and f"{facts.trained_bytes:,}"),
        ("context, bytes", facts.ctx),
        *((name, facts.settings.get(name, getattr(config, name, None))) for name in SETTINGS),
        ("held-out bits per byte", _score(facts)),
        ("wall time, seconds", facts.seconds and f"{facts.seconds:,.0f}"),
    ]
    parts = [
        _table(("", ""), ((f"`{key}`" if key in SETTINGS else key, value) for key, value in rows if value is not None))
    ]
    if facts.picture:
        parts.append(f"![loss, bits per byte and flips over the steps]({facts.picture.name})")
    if facts.sample:
        parts.append(f"A sample from the end of the run, not chosen among others:\n\n{_fenced(facts.sample)}")
    return "\n\n".join(parts)


def _score(facts: RunFacts) -> str | None:
    if facts.bits_per_byte is None:
        return None
    over = f" over {facts.measured_bytes:,} bytes never trained on" if facts.measured_bytes else ""
    return f"**{facts.bits_per_byte:.4f}**{over}{f', in windows of {facts.ctx}' if facts.ctx else ''}"


def _origin(facts: RunFacts) -> str | None:
    if not facts.init_from:
        return None
    source = without_folders(facts.init_from["source"] or "")
    commit, sha256 = facts.init_from.get("commit"), facts.init_from.get("weights_sha256")
    hashed = f", weights sha256 {sha256[:16]}" if sha256 else ""
    return f"{source}{f' at {commit}' if commit else ''}{hashed}"


def _shape(config: ArbConfig) -> Iterable[tuple[str, object]]:
    for name in SHAPE:
        value = getattr(config, name)
        yield f"`{name}`", describe_trits(value) if name == "trits_per_weight" else value
    for name, block in OPTIONAL_BLOCKS.items():
        if getattr(config, name):
            yield f"`{name}`, {block.about}", f"`{json.dumps(getattr(config, name))}`"


def _state_table(config: ArbConfig, audit: StateAudit) -> str:
    """Roles of the exported tensors and, of an inference export, of those that training adds."""
    there = {(row.role, row.dtype) for row in audit.tensors}
    training = audit_config(ArbConfig.from_dict({**config.to_dict(), "training_state": True}))
    rows = []
    for kept, source in (("yes", audit), ("training only", training)):
        for role, dtype in sorted({(row.role, row.dtype) for row in source.tensors}):
            if kept == "yes" or (role, dtype) not in there:
                size = sum(row.bytes for row in source.tensors if (row.role, row.dtype) == (role, dtype))
                rows.append((role, dtype, f"{size:,}", f"{size / audit.logical_weights:.4f}", kept))
    total = (
        "**in these files**",
        "",
        f"**{audit.state_bytes:,}**",
        f"**{audit.state_bytes / audit.logical_weights:.4f}**",
        "",
    )
    return _table(("state", "dtype", "bytes", "bytes per weight", "in these files"), [*rows, total])


def _state_note(config: ArbConfig, audit: StateAudit) -> str:
    if config.training_state:
        return "The files hold training state, so a run can be continued from them."
    training = audit_config(ArbConfig.from_dict({**config.to_dict(), "training_state": True}))
    per_weight = training.state_bytes / training.logical_weights
    return (
        f"Training kept {training.state_bytes:,} bytes, {per_weight:.3f} a weight, optimizer included. What is not here"
        " starts at zero in a finetuning."
    )


def _levels(audit: StateAudit) -> str:
    """How many trits a weight has and which levels they give, by role where they differ."""
    roles: dict[int, list[str]] = {}
    for role, trits in sorted(audit.trits_by_role.items()):
        roles.setdefault(trits, []).append(role)
    kinds = []
    for trits, named in sorted(roles.items()):
        largest = largest_level(trits)
        counted = f"{_trits(trits)} a weight, levels -{largest} to {largest}"
        kinds.append(counted if len(roles) == 1 else f"{counted} ({', '.join(named)})")
    return "; ".join(kinds)


def _decoding_note(config: ArbConfig) -> str:
    """What generation keeps in memory besides the stored weights."""
    matrices = unallocated_model(config).ternary_matrices().values()
    laid_out = [matrix for matrix in matrices if isinstance(matrix, TernaryLinear) and matrix.integer_matmuls]
    if not laid_out:
        return "Generation keeps nothing in memory besides the weights."
    size = sum(layout_bytes(matrix.rows, matrix.columns, matrix.trits) for matrix in laid_out)
    bits = [
        f"{BITS[trits]} bits a weight of {_trits(trits)}" for trits in sorted({matrix.trits for matrix in laid_out})
    ]
    return (
        "On a CPU with the compiled kernels, generation also keeps the matrices that it multiplies unpacked in memory:"
        f" {' and '.join(bits)}, at most {size:,} bytes."
    )


def _trits(number: int) -> str:
    return "1 trit" if number == 1 else f"{number} trits"


def _commands(facts: RunFacts, repo_id: str | None) -> str:
    name = repo_id or "path/to/this/folder"
    lines = ["# with the ARB repository checked out"]
    if facts.command:
        lines += ["# how this model was made", facts.command]
    lines += [
        "# its bits per byte on other text",
        f"python scripts/evaluate.py {name} --data FILE",
        "# finetune it, all weights, on integer state",
        f"python scripts/pretrain.py --init_from {name} --data FILES --output_dir runs/tuned",
    ]
    return _fenced("\n".join(lines), "sh")


def _limit_of_figures(facts: RunFacts) -> str:
    if facts.bits_per_byte is None:
        return "Measure its bits per byte on your own text."
    return "The bits per byte above are of text like the training text; measure yours with the command above."


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
