"""Write the reference of every module, from its docstrings, as HTML.

examples:
  python docs/build_api.py            # into site/
  python docs/build_api.py elsewhere/
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import sys
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "arb_kernels": "kernels",
    "configuration_arb": "configuration_arb",
    "tokenization_arb": "tokenization_arb",
    "modeling_arb": "modeling_arb",
    "training_arb": "training_arb",
}


def modules() -> list[str]:
    """Every module of the packages; scripts speak for themselves, by --help."""
    return [
        f"{package}.{path.stem}"
        for package, folder in FOLDERS.items()
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem != "__init__"
    ]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # a named tuple's, quoted: it is shown as it is
    pdoc.render.configure(docformat="markdown", footer_text="ARB")
    pdoc.pdoc(*modules(), output_directory=folder)
    print(f"written     {folder / 'index.html'}: {len(modules())} modules")


if __name__ == "__main__":
    main()
