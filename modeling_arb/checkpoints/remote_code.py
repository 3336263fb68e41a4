"""Writes the model's code beside a checkpoint, so that `trust_remote_code=True` loads it where this repository is not.

One file for each of our packages that the model needs: kernels_arb.py, configuration_arb.py, modeling_arb.py, made from
its modules by code_bundle.py. The tokenizer needs no code. This module and what it imports are left out of the files,
and `SavesItsCode` is struck from the bases of the classes there: a model loaded from the files is saved with them by
transformers itself.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

from .code_bundle import CodeFile, SourceModule, bundle

ENTRY_MODULES = ("configuration_arb.configuration_arb", "modeling_arb.modeling_arb")
LEFT_OUT = (__name__,)
FILES = [
    CodeFile("kernels_arb", "arb_kernels", "Kernels (packed trits, int8 matmuls, hashes)"),
    CodeFile("configuration_arb", "configuration_arb", "The configuration"),
    CodeFile("modeling_arb", "modeling_arb", "The modules ArbModel and ArbForCausalLM"),
]


class SavesItsCode(PreTrainedModel):
    """PreTrainedModel whose `save_pretrained` also writes the model's code."""

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            export_code(save_directory)


def export_code(folder: str | Path) -> None:
    """Write the code files into a checkpoint folder."""
    for name, text in code_files().items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


@cache
def code_files() -> dict[str, str]:
    """The text of each code file by its name."""
    return bundle(needed_modules(), FILES)


def needed_modules() -> list[SourceModule]:
    """The entry modules and all our modules that they import, directly or not, in import order."""
    packages = [file.package for file in FILES]
    found: dict[str, SourceModule] = {}

    def visit(name: str) -> None:
        if name not in found:
            spec = find_spec(name)
            assert spec is not None and spec.origin is not None, name
            module = SourceModule(name, Path(spec.origin).read_text(encoding="utf-8"), packages, LEFT_OUT)
            for imported in module.own_imports:
                visit(imported)
            found[name] = module

    for entry in ENTRY_MODULES:
        visit(entry)
    return list(found.values())
