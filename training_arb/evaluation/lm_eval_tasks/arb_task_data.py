"""Data of ARB's lm-eval tasks: rows of the .jsonl files in this folder."""

import json
from pathlib import Path

from datasets import Dataset


def _rows(name):
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def load_text(**_):
    """{"test": rows of text}, documents of prose, code and several scripts."""
    return _rows("arb_text.jsonl")


def load_python(**_):
    """{"test": rows of code, choices and answer}: the index of the choice that continues the code."""
    return _rows("arb_python.jsonl")
