"""Writes the model's code beside a checkpoint, flat, so that `trust_remote_code=True` loads it without this repo.

transformers follows only `from .name import x` of files in one folder. Module file names are unique across our
packages, so each file keeps its name and its imports of other packages become relative ones.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

OWN_PACKAGES = ("arb_kernels", "configuration_arb", "modeling_arb")
ENTRY_MODULES = ("configuration_arb.configuration_arb", "modeling_arb.modeling_arb")


def _own_imports(module: str, tree: ast.Module) -> dict[int, str]:
    """Line number -> module of ours that a from-import names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            target = f"{module.rpartition('.')[0]}.{node.module}" if node.level else node.module or ""
            if target.partition(".")[0] in OWN_PACKAGES:
                found[node.lineno] = target
    return found


def bundled_modules() -> list[str]:
    """Every module of ours that the entry modules import, directly or not, themselves included."""
    found, waiting = [], list(ENTRY_MODULES)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.append(module)
            waiting += _own_imports(module, ast.parse(_source(module))).values()
    return sorted(found)


def _source(module: str) -> str:
    return Path(find_spec(module).origin).read_text(encoding="utf-8")


def flattened_source(module: str) -> str:
    """The module's code with its imports of ours made relative to one flat folder."""
    source = _source(module)
    lines = source.splitlines(keepends=True)
    for number, target in _own_imports(module, ast.parse(source)).items():
        flat = target.rpartition(".")[2]
        lines[number - 1] = re.sub(r"from\s+\S+\s+import", f"from .{flat} import", lines[number - 1], count=1)
    return f"# generated from {module}, do not edit\n" + "".join(lines)


def export_code(folder: str | Path) -> None:
    """Write the bundle into a checkpoint folder."""
    for module in bundled_modules():
        path = Path(folder) / f"{module.rpartition('.')[2]}.py"
        path.write_text(flattened_source(module), encoding="utf-8")
