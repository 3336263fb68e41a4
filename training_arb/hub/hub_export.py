"""Writes a self-contained folder: weights, config, code, tokenizer, generation config, model card, licence. No
pickles."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from configuration_arb import ArbConfig
from modeling_arb import ArbForCausalLM
from tokenization_arb import ArbTokenizer
from training_arb.memory.state_audit import StateAudit, audit_folder
from training_arb.report.run_facts import RunFacts

from .model_card import fill_card

LICENCE_FILE = Path(__file__).with_name("LICENSE")
CARD_FILE = "README.md"
SHARD_SIZE = "5GB"
CARRIED = (".safetensors", ".json", ".py", ".jinja", ".md", ".png", "")  # suffixes; LICENSE has none


def export_model(
    model: ArbForCausalLM,
    folder: Path,
    facts: RunFacts,
    repo_id: str | None = None,
    training_state: bool = False,
    max_shard_size: str = SHARD_SIZE,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> StateAudit:
    """Fill the empty `folder`. Returns the audit of the written files. Raises ValueError if the model has state that is
    not on the list of integer state, or, before anything is written, if training_state is requested and missing.
    """
    model.save_pretrained(folder, training_state=training_state, max_shard_size=max_shard_size)
    (ArbTokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    audit = audit_folder(folder)
    if not audit.clean:
        raise ValueError(f"the audit refuses the export: {[*audit.float_tensors, *audit.faults][0]}")
    if facts.picture:
        shutil.copyfile(facts.picture, folder / facts.picture.name)
    shutil.copyfile(LICENCE_FILE, folder / "LICENSE")
    config = ArbConfig.from_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / CARD_FILE).write_text(fill_card(config, audit, size, facts, repo_id), encoding="utf-8")
    strangers = sorted(path.name for path in folder.iterdir() if path.suffix not in CARRIED)
    if strangers:
        raise ValueError(f"the export would contain {strangers[0]}, which is not an allowed type of file")
    return audit
