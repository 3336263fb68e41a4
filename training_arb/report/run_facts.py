"""Collects what a model card says about a checkpoint's run, from the files that the run left beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import read_json_object
from training_arb.checkpoints.checkpoint_files import RUN_FILE, STATE_FILE
from training_arb.memory.state_audit import inference_hash

REPORT_FILE, PICTURE_FILE = "report.json", "loss.png"
ABSOLUTE_PATH = re.compile(r"^(--\w+=)?[/~](?:.*/)?([^/:]+/?(?::[\d.]+)?)$")
SECRETS = ("--hub_token",)


@dataclass
class RunFacts:
    """Every field is the recorded value, or None (empty) if it was not recorded."""

    data: str | None = None
    dataset: str | None = None  # on the hub
    steps: int | None = None
    ctx: int | None = None
    trained_bytes: int | None = None
    bits_per_byte: float | None = None
    measured_bytes: int | None = None
    seconds: float | None = None
    sample: str | None = None
    command: str | None = None
    init_from: dict[str, str | None] | None = None
    settings: dict[str, object] = field(default_factory=dict)
    picture: Path | None = None


def without_folders(word: str) -> str:
    """A word of a command or of a data description; an absolute path is cut to its last part, which is not private."""
    return ABSOLUTE_PATH.sub(r"\1\2", word)


def shown_command(argv: Sequence[str]) -> str:
    """The command of a run without tokens and local folders."""
    words, hidden = [], False
    for word in argv[1:]:
        if not hidden and not word.startswith(SECRETS):
            words.append(without_folders(word))
        hidden = not hidden and word in SECRETS
    return shlex.join(["python", f"scripts/{Path(argv[0]).stem}.py", *words])


def shown_sample(text: str | None) -> str | None:
    """A sample without control characters."""
    return text and "".join(
        sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def facts_of(folder: Path, model: ArbForCausalLM) -> RunFacts:
    """The facts of a checkpoint's folder: its run's report where that is about these weights, else the checkpoint's own
    record. Raises ValueError when a record is damaged."""
    report = folder.resolve().parent / REPORT_FILE
    if report.is_file():
        facts = facts_of_report(report, model)
        if facts is not None:
            return facts
    if (folder / STATE_FILE).is_file() and (folder / RUN_FILE).is_file():
        return facts_of_state(read_json_object(folder / STATE_FILE), read_json_object(folder / RUN_FILE))
    return RunFacts()


def facts_of_report(path: Path, model: ArbForCausalLM) -> RunFacts | None:
    """The facts of a report, or None when it is about other weights than the model's."""
    report = read_json_object(path)
    if report.get("weights_sha256") != inference_hash(model):
        return None
    settings = report.get("settings", {})
    picture = path.with_name(PICTURE_FILE)
    return RunFacts(
        data=_shown_data(report.get("data")),
        dataset=_hub_name(settings.get("dataset")),
        steps=report.get("steps"),
        ctx=report.get("ctx"),
        trained_bytes=report.get("trained_bytes"),
        bits_per_byte=report.get("bits_per_byte"),
        measured_bytes=report.get("bytes"),
        seconds=report.get("seconds"),
        sample=shown_sample(report.get("sample")),
        command=report.get("command"),
        init_from=report.get("init_from"),
        settings=settings,
        picture=picture if picture.is_file() else None,
    )


def facts_of_state(state: dict, run: dict) -> RunFacts:
    """The facts in Trainer's state and the run's description; the run may still be training."""
    step = state.get("global_step")
    measured = [entry for entry in state.get("log_history", []) if entry.get("step") == step]
    scores = [entry["eval_bits_per_byte"] for entry in measured if "eval_bits_per_byte" in entry]
    return RunFacts(
        data=_shown_data(run.get("data")),
        steps=step,
        ctx=run.get("ctx"),
        bits_per_byte=scores[-1] if scores else None,
        init_from=run.get("init_from"),
        settings={key: run[key] for key in ("seed", "batch") if key in run},
    )


def _shown_data(data: str | None) -> str | None:
    return data and " ".join(map(without_folders, data.split(" ")))


def _hub_name(dataset: str | None) -> str | None:
    """None for a folder."""
    return dataset if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not Path(dataset).exists() else None
