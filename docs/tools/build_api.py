"""Write the reference of every module, from its docstrings, as HTML.

examples:
  python docs/tools/build_api.py            # into site/
  python docs/tools/build_api.py elsewhere/
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import sys
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = {
    "arb_kernels": "kernels",
    "configuration_arb": "configuration_arb",
    "tokenization_arb": "tokenization_arb",
    "modeling_arb": "modeling_arb",
    "training_arb": "training_arb",
}
NOT_MODULES = {"lm_eval_tasks"}  # lm-evaluation-harness loads these files by their paths


def modules() -> list[str]:
    """Full names of all modules of the packages. Scripts are left out: they describe themselves by --help."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if path.stem != "__init__" and not NOT_MODULES & {*inside}:
                found.append(".".join([package, *inside]))
    return found


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    # the quoted annotations of a named tuple: pdoc shows them as text
    warnings.filterwarnings("ignore", "Error parsing type annotation")
    pdoc.render.configure(docformat="markdown", footer_text="ARB")
    pdoc.pdoc(*modules(), output_directory=folder)
    print(f"written     {folder / 'index.html'}: {len(modules())} modules")


if __name__ == "__main__":
    main()
